"""Means and standard deviations that tiles and theta are normalised with: norm_stats.json."""

from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np

from common.artifacts import read_json, sha256_of_json, write_json
from common.errors import UserError
from data.moments import Moments

NORM_STATS_NAME = "norm_stats.json"


@dataclass(frozen=True)
class NormStats:
    """Statistics of the compressor-train split.

    Attributes:
        tile_mean, tile_std: per tomographic bin, over tiles and pixels; dimensionless convergence.
        theta_mean, theta_std: per inferred parameter, over tiles.
    """

    tile_mean: tuple[float, ...]
    tile_std: tuple[float, ...]
    theta_mean: tuple[float, ...]
    theta_std: tuple[float, ...]

    @property
    def sha256(self) -> str:
        """Hash of the numbers, which checkpoints carry: it protects from a network that is fed other units."""
        return sha256_of_json(asdict(self))

    def normalise_theta(self, theta: np.ndarray) -> np.ndarray:
        """(..., d) physical to normalised."""
        return (theta - np.array(self.theta_mean)) / np.array(self.theta_std)

    def physical_theta(self, theta: np.ndarray) -> np.ndarray:
        """(..., d) normalised to physical."""
        return theta * np.array(self.theta_std) + np.array(self.theta_mean)

    def normalise_tiles(self, kappa: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
        """(m, bins, N, N) float32 convergence to zero mean and unit variance, in `out` or a new array, bins fastest."""
        m, n_bins, nside, _ = kappa.shape
        mean = np.tile(np.array(self.tile_mean, dtype=np.float32), nside)  # (N * bins,), a row of pixels
        inverse_std = np.tile((1.0 / np.array(self.tile_std)).astype(np.float32), nside)  # (N * bins,)
        rows = kappa.transpose(0, 2, 3, 1).reshape(m, nside, nside * n_bins)  # (m, N, N * bins)
        done = np.empty_like(rows) if out is None else out.transpose(0, 2, 3, 1).reshape(rows.shape)  # a view of out
        for i in range(m):  # a tile is still in the processor's cache when it is multiplied
            np.subtract(rows[i], mean, out=done[i])
            done[i] *= inverse_std
        return done.reshape(m, nside, nside, n_bins).transpose(0, 3, 1, 2)  # (m, bins, N, N)


def compute_norm_stats(theta: np.ndarray, moments: Moments) -> NormStats:
    """Statistics of tiles with theta (n, d) and these moments; UserError if a bin or a parameter is constant.

    The variance of all pixels is the mean of the tiles' variances plus the variance of their means.
    """
    mean = moments.mean.mean(axis=0)  # (bins,)
    std = np.sqrt((moments.variance + np.square(moments.mean - mean)).mean(axis=0))  # (bins,)
    if not (std > 0).all():
        raise UserError(f"bin {std.argmin() + 1} is constant over the training split; rebuild the tiles")
    if not (varies := np.ptp(theta, axis=0) > 0).all():  # rounding makes a standard deviation of equal numbers
        constant = f"parameter {varies.argmin() + 1} of --params is constant over the training split"
        raise UserError(f"{constant}; leave it out, or add simulations of other cosmologies")
    of_theta = theta.mean(axis=0), theta.std(axis=0)
    return NormStats(*(tuple(float(v) for v in values) for values in (mean, std, *of_theta)))


def write_norm_stats(folder: Path, stats: NormStats) -> None:
    """Write norm_stats.json."""
    write_json(folder / NORM_STATS_NAME, asdict(stats))


def read_norm_stats(folder: Path) -> NormStats:
    """Read norm_stats.json; UserError if it is missing, or has other fields or numbers than statistics can have."""
    path = folder / NORM_STATS_NAME
    content = read_json(path)
    names = [field.name for field in fields(NormStats)]
    try:
        stats = NormStats(**{name: tuple(map(float, content[name])) for name in names})
        good = content == {name: list(values) for name, values in vars(stats).items()}
        for mean, std in ((stats.tile_mean, stats.tile_std), (stats.theta_mean, stats.theta_std)):
            good = good and len(mean) == len(std) and bool(np.isfinite(mean + std).all()) and min(std) > 0
    except (KeyError, TypeError, ValueError, OverflowError):
        good = False
    if not good:
        raise UserError(f"{path} is not what stage 1 writes ({', '.join(names)}); run stage 1 again")
    return stats
