"""Means and standard deviations that tiles and theta are normalised with: norm_stats.json."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from common.artifacts import read_json, sha256_of_json, write_json
from common.errors import UserError
from data.moments import Moments
from data.schema import N_BINS, THETA_NAMES

NORM_STATS_NAME = "norm_stats.json"


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

    @property
    def sha256(self) -> str:
        """Hash of the numbers; checkpoints carry it."""
        return sha256_of_json({name: list(values) for name, values in asdict(self).items()})

    def normalise_theta(self, theta: np.ndarray) -> np.ndarray:
        """(..., 2) physical to normalised."""
        return (theta - np.array(self.theta_mean)) / np.array(self.theta_std)

    def physical_theta(self, theta: np.ndarray) -> np.ndarray:
        """(..., 2) normalised to physical."""
        return theta * np.array(self.theta_std) + np.array(self.theta_mean)

    def normalise_tiles(self, kappa: np.ndarray) -> np.ndarray:
        """(m, 4, N, N) float32 convergence to zero mean and unit variance, as a new array whose bins run fastest."""
        m, _, nside, _ = kappa.shape
        mean = np.tile(np.array(self.tile_mean, dtype=np.float32), nside)  # (N * 4,), a row of pixels
        inverse_std = np.tile((1.0 / np.array(self.tile_std)).astype(np.float32), nside)  # (N * 4,)
        rows = kappa.transpose(0, 2, 3, 1).reshape(m * nside, nside * N_BINS)  # (m * N, N * 4)
        rows = rows - mean
        rows *= inverse_std
        return rows.reshape(m, nside, nside, N_BINS).transpose(0, 3, 1, 2)  # (m, 4, N, N)


def compute_norm_stats(theta: np.ndarray, moments: Moments) -> NormStats:
    """Statistics of tiles with theta (n, 2) and these moments.

    The variance of all pixels is the mean of the tiles' variances plus the variance of their means.

    Raises:
        UserError: a bin or a parameter is constant.
    """
    mean = moments.mean.mean(axis=0)  # (4,)
    std = np.sqrt((moments.variance + np.square(moments.mean - mean)).mean(axis=0))  # (4,)
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
        stats = NormStats(**{name: tuple(float(v) for v in content[name]) for name in lengths})
        good = content == {name: list(values) for name, values in asdict(stats).items()}
        good = good and all(len(getattr(stats, name)) == length for name, length in lengths.items())
        good = good and np.isfinite(np.concatenate([getattr(stats, name) for name in lengths])).all()
        good = good and min(stats.tile_std + stats.theta_std) > 0
    except (KeyError, TypeError, ValueError, OverflowError):
        good = False
    if not good:
        raise UserError(f"{path} is not what stage 1 writes ({', '.join(lengths)}); run stage 1 again")
    return stats
