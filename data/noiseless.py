"""The same tiles without noise (--noiseless-tiles), and whether they are the same."""

from pathlib import Path

import numpy as np

from common.errors import UserError
from data.cache import read_tiles_through_cache
from data.schema import NOISELESS
from data.tiles import Tiles

N_CHECKED = 64  # tiles
# The slope of noisy minus noiseless tile on the noiseless one is 0 if the difference is noise, however weak the noise,
# and -1 if the two are different skies.
LARGEST_SLOPE = 0.5


def read_noiseless(folder: Path, tiles: Tiles) -> Tiles:
    """The same tiles without noise.

    Raises:
        UserError: bad shards, other tiles, or a difference that is not noise: one that goes with the signal.
    """
    if not any(folder.glob("shard_*.parquet")):
        cure = f"`python run_mock.py --noise-level {NOISELESS}` with the suite's other options makes them"
        raise UserError(f"--noiseless-tiles {folder} has no shard_*.parquet; {cure}")
    signal, _ = read_tiles_through_cache(folder, tiles.lmax, NOISELESS, tiles.nside)
    same = all(np.array_equal(getattr(signal, name), getattr(tiles, name)) for name in ("n_bins", "keys", "params"))
    same &= list(signal.nuisances) == list(tiles.nuisances)
    if not (same and all(np.array_equal(signal.nuisances[n], tiles.nuisances[n]) for n in tiles.nuisances)):
        raise UserError(f"--noiseless-tiles {folder} holds other simulations than the tiles; make both from one suite")
    some = np.linspace(0, len(tiles.keys) - 1, N_CHECKED).astype(int)
    if not (np.abs(slope_on_signal(tiles.kappa[some], signal.kappa[some])) <= LARGEST_SLOPE).all():
        problem = f"--noiseless-tiles {folder}: the tiles are not these ones with noise added"
        raise UserError(f"{problem}; make both from one suite, with the same --seed")
    return signal


def slope_on_signal(kappa: np.ndarray, signal: np.ndarray) -> np.ndarray:
    """How much of a bin's signal is in the difference from it, (bins,): cov(kappa - signal, signal) / var(signal).

    For tiles kappa and signal (m, bins, N, N) it is 0 where the difference is noise, give or take the noise's rms over
    the signal's and the root of the number of modes; -1 where kappa is another sky.
    """
    clean = signal - signal.mean(axis=(0, 2, 3), keepdims=True, dtype=np.float64)
    return (clean * (kappa - clean)).sum(axis=(0, 2, 3)) / np.square(clean).sum(axis=(0, 2, 3))
