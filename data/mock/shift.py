"""Shift of the lognormal convergence: how empty a line of sight can be, in every cosmology."""

import numpy as np

from data.mock.nz import NZ_MEAN, nz_of_bins
from data.mock.theory import COSMO_NAMES

HILBERT_OMEGA_M, HILBERT_W = 0.25, -1.0  # of the simulations that Hilbert et al. fitted (the Millennium Simulation)
Z_MAX, N_Z = 4.0, 4001  # of the integrals over redshift: good to 1e-6


def hilbert_shift() -> np.ndarray:
    """Shift lambda of each bin in the cosmology of Hilbert et al. 2011, (4,).

    arXiv:1105.3980: 0.008 z + 0.029 z^2 - 0.0079 z^3 + 0.00065 z^4, at the bins' mean redshifts.
    """
    z = np.array(NZ_MEAN)
    return 0.008 * z + 0.029 * z**2 - 0.0079 * z**3 + 0.00065 * z**4


def empty_convergence(omega_m: float, w: float) -> np.ndarray:
    """Minus the convergence of a line of sight without matter, for the sources of each bin: (4,).

    (3/2) Omega_m (H_0/c)^2 int (1 + z) chi g(chi) dchi with g(chi) = int_chi^inf n(chi') (1 - chi / chi') dchi', for
    density contrast -1 in the Born approximation (the empty beam of Taruya et al. 2002, astro-ph/0202090). Distances
    are in c / H_0, so h drops out; flat, with dark energy of constant w, without radiation.
    """
    z = np.linspace(0, Z_MAX, N_Z)
    expansion = np.sqrt(omega_m * (1 + z) ** 3 + (1 - omega_m) * (1 + z) ** (3 * (1 + w)))
    chi = _running_integral(1 / expansion, z)
    # For sources at one chi_s it is the integral up to there of (1 + z) chi (1 - chi / chi_s), which has two parts.
    weight = (1 + z) * chi / expansion
    near, far = _running_integral(weight, z), _running_integral(weight * chi, z)
    of_source = near - np.divide(far, chi, out=np.zeros(N_Z), where=chi > 0)  # (N_Z,)
    return 1.5 * omega_m * _running_integral(nz_of_bins(z) * of_source, z)[:, -1]


def lognormal_shift(cosmo: np.ndarray) -> np.ndarray:
    """Shift lambda of each bin in a cosmology (7,): Hilbert's, as much larger as an empty line of sight is emptier.

    With one shift for all, the skewness at given variance would say nothing of Omega_m, and in simulations it does.
    """
    given = dict(zip(COSMO_NAMES, cosmo, strict=True))
    ratio = empty_convergence(given["Omega_m"], given["w"]) / empty_convergence(HILBERT_OMEGA_M, HILBERT_W)
    return hilbert_shift() * ratio


def _running_integral(y: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Trapezoidal integral from x[0] to every x: (..., n) over (n,) -> (..., n)."""
    steps = np.diff(x) * (y[..., 1:] + y[..., :-1]) / 2
    return np.concatenate([np.zeros_like(y[..., :1]), np.cumsum(steps, axis=-1)], axis=-1)
