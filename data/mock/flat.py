"""Flat, periodic, Gaussian tiles: the one kind of tile whose likelihood is known exactly.

A tile is a square of side L with the area of a HEALPix base face, kappa(x) = sum_n a_n exp(2 pi i n.x / L).
The coefficients of different n are independent, those of the four bins complex normal with covariance
(C_ell + N_ell) / L^2 at ell = 2 pi |n| / L. Modes go up to lmax, and stay below the pixels' Nyquist frequency.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import scipy.fft
from numpy.random import Generator

from data.mock.fields import covariance_root, responses
from data.mock.nz import N_BINS
from data.mock.theory import BIN_PAIRS, theory_cl_at
from data.nuisance import Nuisance
from data.schema import noise_cl

SIDE = np.sqrt(np.pi / 3)  # [rad]


@dataclass(frozen=True)
class Modes:
    """Independent Fourier modes of a tile of N x N pixels, in the layout of rfft2."""

    inside: np.ndarray  # bool (N, N // 2 + 1), every mode that a tile has
    half: np.ndarray  # bool (N, N // 2 + 1), those of which no other is the complex conjugate
    group: np.ndarray  # int (n_modes,), for each mode of `half` the place of its ell in `ell`
    ell: np.ndarray  # (n_ell,) distinct multipoles, ascending; not integers
    count: np.ndarray  # (n_ell,) modes of each


@cache
def modes_of(lmax: int, nside: int) -> Modes:
    """Modes with 0 < ell <= lmax and both wave numbers below nside / 2."""
    row = np.fft.fftfreq(nside, 1 / nside).round().astype(int)[:, None]  # (N, 1)
    col = np.arange(nside // 2 + 1)[None, :]  # (1, N // 2 + 1)
    square = row**2 + col**2  # (N, N // 2 + 1), an integer tells ell apart exactly
    below_nyquist = (np.abs(row) < nside / 2) & (col < nside / 2)
    inside = below_nyquist & (square > 0) & (2 * np.pi / SIDE * np.sqrt(square) <= lmax)
    half = inside & ((col > 0) | (row > 0))
    distinct, group, count = np.unique(square[half], return_inverse=True, return_counts=True)
    return Modes(inside, half, group, 2 * np.pi / SIDE * np.sqrt(distinct), count)


def _coloured(roots: Sequence[np.ndarray], modes: Modes, n_tiles: int, rng: Generator) -> np.ndarray:
    """Coefficients L a_n, complex (n_tiles, 4, N, N // 2 + 1), of real fields; C_ell = root root^T (n_ell, 4, 4).

    Each root is that of as many tiles as of every other.
    """
    nside = len(modes.half)
    white = rng.standard_normal((n_tiles, N_BINS, nside, nside))  # its transform has <|w_n|^2> = N^2
    a = scipy.fft.rfft2(white) / nside  # (n_tiles, 4, N, N // 2 + 1)
    row, col = np.nonzero(modes.inside)
    # A mode has the ell of its conjugate, which `half` may hold in its stead (they differ in the column of zeros).
    group = np.zeros(modes.half.shape, dtype=int)
    group[modes.half] = modes.group
    group = np.where(modes.half, group, group[-np.arange(nside) % nside])[row, col]  # (n_inside,)
    coloured = np.zeros_like(a)
    for root, some in zip(roots, np.split(np.arange(n_tiles), len(roots)), strict=True):
        coloured[some[:, None], :, row, col] = np.einsum("kij,njk->nki", root[group], a[some][:, :, row, col])
    return coloured


def flat_tiles(
    cosmo: np.ndarray,
    noise_level: str,
    lmax: int,
    nside: int,
    n_tiles: int,
    signal_rng: Generator,
    noise_rng: Generator,
    nuisances: Sequence[Nuisance] = (),
) -> np.ndarray:
    """Independent tiles of one cosmology (7,), signal and noise: float32 (n_tiles, 4, N, N).

    Each of the nuisances, if there are any, is that of as many tiles as every other.
    """
    modes = modes_of(lmax, nside)
    signal_root = covariance_root(theory_cl_at(cosmo, modes.ell)[0])  # (n_ell, 4, 4)
    noise_root = np.broadcast_to(np.diag(np.sqrt(noise_cl(noise_level, N_BINS))), signal_root.shape)
    found = responses(cosmo, nuisances, modes.ell) if nuisances else [None]
    roots = [signal_root if response is None else response @ signal_root for response in found]
    a = _coloured(roots, modes, n_tiles, signal_rng) + _coloured([noise_root], modes, n_tiles, noise_rng)
    # irfft2 divides by N^2, which the sum over modes does not.
    return (scipy.fft.irfft2(a, s=(nside, nside)) * nside**2 / SIDE).astype(np.float32)  # (n_tiles, 4, N, N)


def powers_of(kappa: np.ndarray, lmax: int) -> np.ndarray:
    """Sufficient statistics of flat tiles (n, 4, N, N): the mean over the modes of each ell of L^2 Re(a_i a_j*).

    They are (n, 10, n_ell), pairs as in BIN_PAIRS; the expectation is C_ell + N_ell.
    """
    nside = kappa.shape[-1]
    modes = modes_of(lmax, nside)
    a = scipy.fft.rfft2(kappa.astype(np.float64))[:, :, modes.half] * SIDE / nside**2  # (n, 4, n_modes)
    powers = np.zeros((len(kappa), len(BIN_PAIRS), len(modes.ell)))
    for p, (i, j) in enumerate(BIN_PAIRS):
        product = (a[:, i] * a[:, j].conj()).real  # (n, n_modes)
        for n in range(len(kappa)):
            powers[n, p] = np.bincount(modes.group, product[n], len(modes.ell)) / modes.count
    return powers
