"""Spherical-harmonic coefficients alm of Gaussian skies and of shape noise.

alm arrays are complex128 (..., n_alm) in healpy's order: m = 0 for ell = 0..lmax, then m = 1, ...
"""

from functools import cache

import numpy as np

from data.schema import noise_cl


@cache
def ell_of_alm(lmax: int) -> np.ndarray:
    """Multipole ell of every coefficient, int (n_alm,)."""
    return np.concatenate([np.arange(m, lmax + 1) for m in range(lmax + 1)])


def white_alm(n_bins: int, lmax: int, rng: np.random.Generator) -> np.ndarray:
    """Coefficients (n_bins, n_alm) of independent Gaussian skies with C_ell = 1 from ell = 0 on."""
    draws = rng.standard_normal((n_bins, len(ell_of_alm(lmax)), 2))
    draws *= 1 / np.sqrt(2)  # <|a|^2> = 1
    white = draws.view(np.complex128)[..., 0]  # (n_bins, n_alm)
    white[:, : lmax + 1] = white[:, : lmax + 1].real * np.sqrt(2)  # m = 0 is real
    return white


def gaussian_alm(root: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Coefficients (n_bins, n_alm) of Gaussian skies with covariance root root^T: root (lmax + 1, n_bins, n_bins)."""
    n_ell, n_bins, _ = root.shape
    white = white_alm(n_bins, n_ell - 1, rng)
    return mixed(white, root.transpose(1, 2, 0)[..., ell_of_alm(n_ell - 1)])


def mixed(alm: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    """Coefficients (n_bins, n_alm) of bins that are sums of others, from those and a matrix (n_bins, n_bins, n_alm)."""
    return np.stack([sum(of_bin * one for of_bin, one in zip(row, alm, strict=True)) for row in matrix])


def noise_alm(noise_level: str, n_bins: int, lmax: int, rng: np.random.Generator) -> np.ndarray:
    """Shape noise of one sky, (n_bins, n_alm): flat spectra from ell = 0 on, the same as white noise per pixel."""
    power = noise_cl(noise_level, n_bins)
    return np.sqrt(power)[:, None] * white_alm(n_bins, lmax, rng)  # bins have independent galaxies
