"""Angular power spectra of convergence as a function of cosmology, from a shipped table.

The table is a polynomial in seven parameters for the principal components of ln C_ell of the ten
pairs of bins. `make_theory_table.py` makes it from pyccl; nothing here needs pyccl.
"""

from functools import cache
from itertools import combinations_with_replacement
from pathlib import Path

import numpy as np
from scipy.interpolate import CubicSpline

from common.errors import UserError
from data.mock.nz import N_BINS

TABLE_PATH = Path(__file__).with_name("theory_table.npz")
BIN_PAIRS = tuple(combinations_with_replacement(range(N_BINS), 2))  # (0,0), (0,1) ... (3,3): ten pairs
# The order of the parameters everywhere in this package.
COSMO_NAMES = ("Omega_m", "S8", "w", "h", "n_s", "Omega_b", "m_nu")


def polynomial_exponents(n_params: int, degree: int) -> np.ndarray:
    """All exponents of total degree at most `degree`: integers, shape (n_terms, n_params)."""
    rows: list[list[int]] = [[]]
    for _ in range(n_params):
        rows = [[*row, power] for row in rows for power in range(degree - sum(row) + 1)]
    return np.array(rows)


def table_features(cosmo: np.ndarray, lower: np.ndarray, upper: np.ndarray) -> np.ndarray:
    """Parameters (n, 7) in which ln C_ell is smooth, from cosmo (n, 7), scaled to [-1, 1] over the table's box.

    The edges of the box, lower and upper (7,), are in (ln Omega_m, ln S8, w, h, n_s, Omega_b h^2, m_nu).
    """
    omega_m, s8, w, h, n_s, omega_b, m_nu = np.asarray(cosmo, dtype=np.float64).T
    x = np.stack([np.log(omega_m), np.log(s8), w, h, n_s, omega_b * h**2, m_nu], axis=1)
    return 2.0 * (x - lower) / (upper - lower) - 1.0


def chebyshev_basis(x: np.ndarray, exponents: np.ndarray) -> np.ndarray:
    """Products of Chebyshev polynomials T_e(x): x (n, 7), exponents (n_terms, 7) -> (n, n_terms)."""
    # T[k, n, p] = T_k(x[n, p])
    cheb = np.stack([np.ones_like(x), x])
    for _ in range(2, exponents.max() + 1):
        cheb = np.concatenate([cheb, (2 * x * cheb[-1] - cheb[-2])[None]])
    basis = np.ones((x.shape[0], exponents.shape[0]))
    for p in range(x.shape[1]):
        basis *= cheb[exponents[:, p], :, p].T
    return basis


@cache
def _load_table() -> dict[str, np.ndarray]:
    with np.load(TABLE_PATH) as table:
        return {name: table[name].astype(np.float64) for name in table.files}


def theory_cl(cosmo: np.ndarray, lmax: int) -> np.ndarray:
    """Spectra at every integer ell up to lmax, as theory_cl_at gives them: (n, 10, lmax + 1); zero at ell = 0 and 1."""
    cl = np.zeros((len(np.atleast_2d(cosmo)), len(BIN_PAIRS), lmax + 1))
    cl[..., 2:] = theory_cl_at(cosmo, np.arange(2, lmax + 1))
    return cl


def theory_cl_at(cosmo: np.ndarray, ell: np.ndarray) -> np.ndarray:
    """Non-linear convergence spectra C_ell^{ij} (Limber, halofit; Takahashi et al. 2012), (n, 10, n_ell).

    cosmo is (n, 7); ell (n_ell,) are multipoles >= 2, not necessarily integers. Dimensionless; pairs as in BIN_PAIRS.

    Raises:
        UserError: a cosmology outside the table's box, or an ell beyond the table.
    """
    table = _load_table()
    if ell.max(initial=0) > table["ell"][-1]:
        raise UserError(f"the theory table ends at ell = {table['ell'][-1]:.0f}, below {ell.max():.0f}; lower --lmax")
    x = table_features(np.atleast_2d(cosmo), table["lower"], table["upper"])
    if (outside := np.abs(x).max(axis=1) > 1.0 + 1e-9).any():
        n = int(np.argmax(outside))
        raise UserError(f"cosmology {n} ({np.atleast_2d(cosmo)[n]}) lies outside the box of {TABLE_PATH.name}")
    scores = chebyshev_basis(x, table["exponents"].astype(int)) @ table["coefficients"]  # (n, n_pc)
    # A spline is linear in what it interpolates: the few components are interpolated, not every cosmology.
    curves = np.vstack([table["components"], table["mean"]])  # (n_pc + 1, 10 * n_table)
    curves = curves.reshape(len(curves), len(BIN_PAIRS), -1)  # (n_pc + 1, 10, n_table)
    curves = CubicSpline(np.log(table["ell"]), curves, axis=-1)(np.log(ell))  # (n_pc + 1, 10, n_ell)
    return np.exp(np.tensordot(scores, curves[:-1], axes=1) + curves[-1])  # (n, 10, n_ell)


def cl_matrix(cl: np.ndarray) -> np.ndarray:
    """Ten pairs as symmetric matrices: (10, n_ell) -> (n_ell, 4, 4)."""
    matrix = np.empty((cl.shape[-1], N_BINS, N_BINS))
    for (i, j), row in zip(BIN_PAIRS, cl, strict=True):
        matrix[:, i, j] = matrix[:, j, i] = row
    return matrix
