"""Matter power spectrum as a function of cosmology, from a shipped table.

Lengths are in units of c / H_0, wave numbers in their inverse, so that h drops out of the geometry. The table is a
polynomial in seven parameters for the principal components of ln P(k, z). `make_theory_table.py` makes it.
"""

from functools import cache
from pathlib import Path

import numpy as np
from scipy.interpolate import RectBivariateSpline

from data.mock.theory import chebyshev_basis, table_features

TABLE_PATH = Path(__file__).with_name("matter_power_table.npz")


@cache
def _load_table() -> dict[str, np.ndarray]:
    with np.load(TABLE_PATH) as table:
        return {name: table[name].astype(np.float64) for name in table.files}


def matter_power(cosmo: np.ndarray, k: np.ndarray, z: np.ndarray) -> np.ndarray:
    """Non-linear P(k, z) in (c / H_0)^3 of one cosmology (7,), for k (..., n_z) in H_0 / c and z (n_z,): (..., n_z).

    Halofit (Takahashi et al. 2012, arXiv:1208.2701). Beyond the table's k it goes on as a power law of its last slope.
    The cosmology must lie in the table's box, which is that of theory_cl.
    """
    table = _load_table()
    x = table_features(cosmo[None], table["lower"], table["upper"])
    scores = chebyshev_basis(x, table["exponents"].astype(int)) @ table["coefficients"]  # (1, n_pc)
    ln_p = (scores @ table["components"] + table["mean"]).reshape(len(table["ln_k"]), len(table["z"]))
    spline = RectBivariateSpline(table["ln_k"], table["z"], ln_p)
    first, last = table["ln_k"][[0, -1]]
    ln_k = np.log(k)
    inside = np.clip(ln_k, first, last)
    z = np.broadcast_to(z, k.shape)
    return np.exp(spline(inside, z, grid=False) + (ln_k - inside) * spline(inside, z, dx=1, grid=False))
