"""Tiles whose variance is far from the variance of their simulation's or orientation's other tiles."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from common import results
from data.schema import A_IA

# In robust sigmas of ln variance. The scale is that of differences between neighbours: offsets from a median would be
# too small where a simulation has few tiles, or has them twice. In 791 simulations at lmax 64 and 200 and in 40 at 600,
# noiseless to des_y3, no tile lies beyond 4.8. A tile times 1.5 lies at 10 +- 1 at lmax 64 (3 of 10,000 below 6) and
# at 20 or beyond at 200, a tile of noise alone at 13 or beyond. At lmax 32 a factor of 1.5 does not show.
OUTLIER_SIGMA = 6.0
# Where alignments vary, the strongest widen the scatter: in 791 simulations at lmax 200 no tile lies beyond 8.0.
OUTLIER_SIGMA_ALIGNED = 10.0
MIN_ALIKE = {"sim": 8, "orientation": 4}  # tiles of one sky; the median of fewer says too little
MIN_TILES = 120  # of all such skies; the scatter of fewer says too little
SMALLEST_VARIANCE = 1e-12  # of the median tile's; stands for that of a constant tile
MEDIAN_TO_SIGMA = 1.4826  # of the absolute values of a normal variable


@dataclass(frozen=True)
class Outlier:
    """A tile whose variance is far from the variance of its simulation's other tiles."""

    key: list[int] = results.key("sim_id, orientation_id, tile_id")
    bin: int = results.key("the bin, from 0")
    factor: float = results.key("its variance over the median of its simulation, or orientation where nuisances vary")
    sigma: float = results.key("how far that is, in robust standard deviations")


def variance_outliers(keys: np.ndarray, variance: np.ndarray, nuisances: Iterable[str] = ()) -> list[Outlier]:
    """Tiles whose ln variance in a bin is far from the median of their simulation, the worst first.

    If nuisances vary, each orientation has its own, and is compared with itself alone. Skies of fewer than MIN_ALIKE
    tiles are left out, and a data set of fewer than MIN_TILES altogether.

    Args:
        keys, variance: (n, 3), in the canonical order, and (n, bins).
        nuisances: names of those that vary.
    """
    alike = "orientation" if nuisances else "sim"
    limit = OUTLIER_SIGMA_ALIGNED if A_IA in nuisances else OUTLIER_SIGMA
    floor = SMALLEST_VARIANCE * np.median(variance, axis=0) + np.finfo(np.float64).tiny  # (bins,)
    ln_variance = np.log(np.maximum(variance, floor))  # (n, bins)
    n_columns = 2 if nuisances else 1  # of keys, that tiles of one sky share
    changes = np.diff(keys[:, :n_columns], axis=0).any(axis=1)  # (n - 1,)
    skies = np.split(np.arange(len(keys)), np.flatnonzero(changes) + 1)
    skies = [rows for rows in skies if len(rows) >= MIN_ALIKE[alike]]
    if sum(map(len, skies)) < MIN_TILES:
        return []
    rows = np.concatenate(skies)  # (m,)
    offset = np.concatenate([ln_variance[r] - np.median(ln_variance[r], axis=0) for r in skies])  # (m, bins)
    steps = np.concatenate([np.diff(ln_variance[r], axis=0) for r in skies])
    sigma = MEDIAN_TO_SIGMA / np.sqrt(2) * np.median(np.abs(steps), axis=0)  # (bins,)
    pull = np.divide(offset, sigma, out=np.zeros_like(offset), where=sigma > 0)
    worst_bin = np.abs(pull).argmax(axis=1)  # (m,)
    order = np.argsort(-np.abs(pull).max(axis=1), kind="stable")
    return [
        Outlier(keys[rows[i]].tolist(), int(b), float(np.exp(offset[i, b])), float(pull[i, b]))
        for i, b in zip(order, worst_bin[order], strict=True)
        if abs(pull[i, b]) > limit
    ]
