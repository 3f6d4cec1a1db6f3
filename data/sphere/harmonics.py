"""Spherical-harmonic coefficients alm of Gaussian skies and of shape noise.

alm arrays are complex128 (..., n_alm) in healpy's order: m = 0 for ell = 0..lmax, then m = 1, ...
"""

from __future__ import annotations

import numpy as np

from data.schema import N_BINS, noise_cl


def ell_of_alm(lmax: int) -> np.ndarray:
    """Multipole ell of every coefficient, int (n_alm,)."""
    return np.concatenate([np.arange(m, lmax + 1) for m in range(lmax + 1)])


def white_alm(lmax: int, rng: np.random.Generator) -> np.ndarray:
    """Coefficients (4, n_alm) of independent Gaussian skies with C_ell = 1 from ell = 0 on."""
    draws = rng.standard_normal((N_BINS, len(ell_of_alm(lmax)), 2))
    white = draws.view(np.complex128)[..., 0]  # (4, n_alm)
    white /= np.sqrt(2)  # <|a|^2> = 1
    white[:, : lmax + 1] = white[:, : lmax + 1].real * np.sqrt(2)  # m = 0 is real
    return white


def gaussian_alm(root: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Correlated Gaussian coefficients of the four bins with covariance root root^T.

    Args:
        root: (lmax + 1, 4, 4).
        rng: source of the draws.

    Returns:
        alm (4, n_alm).
    """
    lmax = len(root) - 1
    return np.einsum("aij,ja->ia", root[ell_of_alm(lmax)], white_alm(lmax, rng))  # a: coefficient


def noise_alm(noise_level: str, lmax: int, rng: np.random.Generator) -> np.ndarray:
    """Shape noise of one sky, (4, n_alm): flat spectra from ell = 0 on, the same as white noise per pixel."""
    return np.sqrt(noise_cl(noise_level))[:, None] * white_alm(lmax, rng)  # bins have independent galaxies
