"""Tiles whose variance is far from the variance of their simulation's other tiles."""

from dataclasses import dataclass

import numpy as np

from common import results

# In robust sigmas of ln variance. The scale is that of differences between neighbours: offsets from a median would be
# too small where a simulation has few tiles, or has them twice. In 791 simulations at lmax 64 and 200 and in 40 at 600,
# noiseless to des_y3, no tile lies beyond 4.8. A tile times 1.5 lies at 10 +- 1 at lmax 64 (3 of 10,000 below 6) and
# at 20 or beyond at 200, a tile of noise alone at 13 or beyond. At lmax 32 a factor of 1.5 does not show.
OUTLIER_SIGMA = 6.0
MIN_TILES_OF_SIM = 8  # the median of fewer says too little
MIN_TILES = 120  # of all such simulations; the scatter of fewer says too little
SMALLEST_VARIANCE = 1e-12  # of the median tile's; stands for that of a constant tile
MEDIAN_TO_SIGMA = 1.4826  # of the absolute values of a normal variable


@dataclass(frozen=True)
class Outlier:
    """A tile whose variance is far from the variance of its simulation's other tiles."""

    key: list[int] = results.key("sim_id, orientation_id, tile_id")
    bin: int = results.key("the bin, from 0")
    factor: float = results.key("its variance over the median of its simulation")
    sigma: float = results.key("how far that is, in robust standard deviations")


def variance_outliers(keys: np.ndarray, variance: np.ndarray) -> list[Outlier]:
    """Tiles whose ln variance in a bin is far from the median of their simulation, the worst first.

    Simulations of fewer than MIN_TILES_OF_SIM tiles are left out, and a data set of fewer than MIN_TILES altogether.

    Args:
        keys, variance: (n, 3), in the canonical order, and (n, bins).
    """
    floor = SMALLEST_VARIANCE * np.median(variance, axis=0) + np.finfo(np.float64).tiny  # (bins,)
    ln_variance = np.log(np.maximum(variance, floor))  # (n, bins)
    sims = np.split(np.arange(len(keys)), np.flatnonzero(np.diff(keys[:, 0])) + 1)
    sims = [rows for rows in sims if len(rows) >= MIN_TILES_OF_SIM]
    if sum(map(len, sims)) < MIN_TILES:
        return []
    rows = np.concatenate(sims)  # (m,)
    offset = np.concatenate([ln_variance[r] - np.median(ln_variance[r], axis=0) for r in sims])  # (m, bins)
    steps = np.concatenate([np.diff(ln_variance[r], axis=0) for r in sims])
    sigma = MEDIAN_TO_SIGMA / np.sqrt(2) * np.median(np.abs(steps), axis=0)  # (bins,)
    pull = np.divide(offset, sigma, out=np.zeros_like(offset), where=sigma > 0)
    worst_bin = np.abs(pull).argmax(axis=1)  # (m,)
    order = np.argsort(-np.abs(pull).max(axis=1), kind="stable")
    return [
        Outlier(keys[rows[i]].tolist(), int(b), float(np.exp(offset[i, b])), float(pull[i, b]))
        for i, b in zip(order, worst_bin[order], strict=True)
        if abs(pull[i, b]) > OUTLIER_SIGMA
    ]
