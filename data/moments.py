"""One pass over the pixels for all that the audit and the normalisation need to know of them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from functools import lru_cache

import numpy as np

N_PROJECTIONS = 2  # one to sort by, one to be sure
PROJECTION_SEED = 0


@dataclass(frozen=True)
class Moments:
    """Per tile what does not change under the symmetries of the square, float64.

    Attributes:
        mean, variance: of the pixels of every bin, (n, bins).
        projection: random projections, means of the pixels times random weights, (n, N_PROJECTIONS).
    """

    mean: np.ndarray
    variance: np.ndarray
    projection: np.ndarray

    def of(self, positions: np.ndarray) -> Moments:
        """Those of some tiles."""
        return Moments(*(getattr(self, field.name)[positions] for field in fields(self)))

    def put(self, positions: np.ndarray | slice, moments: Moments) -> None:
        """Take over the moments of some tiles."""
        for field in fields(self):
            getattr(self, field.name)[positions] = getattr(moments, field.name)


def empty_moments(n_tiles: int, n_bins: int) -> Moments:
    """Uninitialised."""
    return Moments(*(np.empty((n_tiles, size)) for size in (n_bins, n_bins, N_PROJECTIONS)))


def moments_of(kappa: np.ndarray) -> Moments:
    """Moments of kappa (m, bins, N, N), a tile at a time."""
    m, n_bins, nside, _ = kappa.shape
    moments = empty_moments(m, n_bins)
    weights = _symmetric_weights(n_bins, nside)  # (N_PROJECTIONS, N * N * bins)
    for i, tile in enumerate(kappa):
        # Rows of a tile with their bins interleaved, so that sums run along memory. No BLAS, which has threads of
        # its own where this already runs in several.
        pixels = tile.transpose(1, 2, 0).astype(np.float64).reshape(nside, nside * n_bins)  # (N, N * bins)
        moments.projection[i] = np.einsum("kp,p->k", weights, pixels.ravel()) / pixels.size
        moments.mean[i] = mean = pixels.sum(axis=0).reshape(nside, n_bins).sum(axis=0) / nside**2  # (bins,)
        pixels -= np.tile(mean, nside)
        np.square(pixels, out=pixels)
        moments.variance[i] = pixels.sum(axis=0).reshape(nside, n_bins).sum(axis=0) / nside**2  # (bins,)
    return moments


def square_symmetries(tile: np.ndarray) -> Iterator[np.ndarray]:
    """Views (..., N, N) of a tile under the eight symmetries of the square, the tile itself first."""
    for turned in (tile, tile.swapaxes(-1, -2)):
        for rows in (1, -1):
            for cols in (1, -1):
                yield turned[..., ::rows, ::cols]


@lru_cache(maxsize=2)
def _symmetric_weights(n_bins: int, nside: int) -> np.ndarray:
    """Random weights of unit rms with the symmetries of the square, (N_PROJECTIONS, N * N * bins)."""
    weights = np.random.default_rng(PROJECTION_SEED).standard_normal((N_PROJECTIONS, n_bins, nside, nside))
    weights = np.add.reduce(list(square_symmetries(weights)))  # (N_PROJECTIONS, bins, N, N)
    weights = weights.transpose(0, 2, 3, 1).reshape(N_PROJECTIONS, -1)  # (N_PROJECTIONS, N * N * bins)
    return weights / np.sqrt(np.square(weights).mean(axis=1, keepdims=True))
