"""Means and standard deviations that tiles and theta are normalised with: norm_stats.json."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from common.artifacts import read_json, write_json
from common.errors import UserError
from data.schema import N_BINS, THETA_NAMES
from data.shards import Tiles

NORM_STATS_NAME = "norm_stats.json"
CHUNK = 64  # tiles at a time, as float64


@dataclass(frozen=True)
class NormStats:
    """Statistics of the compressor-train split.

    Attributes:
        tile_mean, tile_std: per tomographic bin (4), over tiles and pixels; dimensionless convergence.
        theta_mean, theta_std: of (Omega_m, S8), over tiles.
    """

    tile_mean: tuple[float, ...]
    tile_std: tuple[float, ...]
    theta_mean: tuple[float, ...]
    theta_std: tuple[float, ...]

    def normalise_theta(self, theta: np.ndarray) -> np.ndarray:
        """(..., 2) physical to normalised."""
        return (theta - np.array(self.theta_mean)) / np.array(self.theta_std)

    def physical_theta(self, theta: np.ndarray) -> np.ndarray:
        """(..., 2) normalised to physical."""
        return theta * np.array(self.theta_std) + np.array(self.theta_mean)

    def normalise_tiles_in_place(self, kappa: np.ndarray) -> None:
        """(n, 4, N, N) float32 convergence to zero mean and unit variance; once, so that no step pays for it."""
        mean = np.array(self.tile_mean, dtype=np.float32)[:, None, None]  # (4, 1, 1)
        inverse_std = (1.0 / np.array(self.tile_std)).astype(np.float32)[:, None, None]  # (4, 1, 1)
        for start in range(0, len(kappa), CHUNK):
            kappa[start : start + CHUNK] -= mean
            kappa[start : start + CHUNK] *= inverse_std


def compute_norm_stats(tiles: Tiles, indices: np.ndarray) -> NormStats:
    """Statistics of tiles[indices], accumulated in float64 in two passes (mean, then squared deviations)."""
    n_pixels = len(indices) * tiles.kappa.shape[2] * tiles.kappa.shape[3]
    chunks = np.array_split(indices, max(1, len(indices) // CHUNK))
    mean = sum(tiles.kappa[c].sum(axis=(0, 2, 3), dtype=np.float64) for c in chunks) / n_pixels  # (4,)
    deviation = (tiles.kappa[c].astype(np.float64) - mean[:, None, None] for c in chunks)
    std = np.sqrt(sum(np.square(d).sum(axis=(0, 2, 3)) for d in deviation) / n_pixels)  # (4,)
    theta = tiles.theta[indices]
    theta_std = theta.std(axis=0)
    if not (std > 0).all() or not (theta_std > 0).all():
        raise UserError(
            "a bin or a parameter is constant over the training split; add simulations with other cosmologies"
        )
    return NormStats(*(tuple(float(v) for v in values) for values in (mean, std, theta.mean(axis=0), theta_std)))


def write_norm_stats(folder: Path, stats: NormStats) -> None:
    """Write norm_stats.json."""
    write_json(folder / NORM_STATS_NAME, asdict(stats))


def read_norm_stats(folder: Path) -> NormStats:
    """Read norm_stats.json.

    Raises:
        UserError: missing, or not four and two finite numbers with positive standard deviations.
    """
    path = folder / NORM_STATS_NAME
    content = read_json(path)
    lengths = {"tile_mean": N_BINS, "tile_std": N_BINS, "theta_mean": len(THETA_NAMES), "theta_std": len(THETA_NAMES)}
    try:
        values = {name: tuple(float(v) for v in content[name]) for name in lengths}
        good = set(content) == set(lengths) and all(
            len(values[name]) == length and np.isfinite(values[name]).all() for name, length in lengths.items()
        )
        good = good and min(values["tile_std"] + values["theta_std"]) > 0
    except (KeyError, TypeError, ValueError):
        good = False
    if not good:
        raise UserError(f"{path} is not what stage 1 writes ({', '.join(lengths)}); run stage 1 again")
    return NormStats(**values)
