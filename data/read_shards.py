"""Reading all shards of a folder: their labels first, checked, then the pixels, shards side by side."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from common.errors import UserError
from common.machine import usable_cores
from common.progress import Progress
from data.schema import nside_of
from data.shard_labels import ShardLabels, joined, read_labels
from data.shard_pixels import kappa_of_shard
from data.tiles import Tiles, digests_of, empty_digests, empty_kappa


@dataclass(frozen=True)
class TileIndex:
    """What the shards of a folder hold beside the pixels, checked, and where every tile belongs.

    Attributes:
        keys, params, lmax, noise_level: as in Tiles, in the canonical order.
        n_bins, nside: tomographic bins, and pixels per side of a tile.
        shards: in the order of their names.
        positions: for every shard the position in the canonical order of each of its rows.
    """

    keys: np.ndarray
    params: np.ndarray
    lmax: int
    noise_level: str
    n_bins: int
    nside: int
    shards: list[ShardLabels]
    positions: list[np.ndarray]


def shard_paths(folder: Path, lmax: int, noise_level: str) -> list[Path]:
    """The shards of a folder, in the order of their names.

    Raises:
        UserError: there are none.
    """
    paths = sorted(folder.glob("shard_*.parquet"))
    if not paths:
        raise UserError(
            f"no shard_*.parquet in {folder}; make tiles with `python run_mock.py --lmax {lmax} "
            f"--noise-level {noise_level}`, or give their folder as --tiles-dir"
        )
    return paths


def read_tiles(folder: Path, lmax: int, noise_level: str, nside: int = 0) -> Tiles:
    """Read every shard of a folder into one array, in the canonical order.

    Shards are read a few tiles at a time straight into the array: the peak memory is the array and
    some 100 MB for every core.

    Args:
        folder: holds shard_*.parquet.
        lmax, nside: the tiles must be nside_of(lmax, nside) pixels wide.
        noise_level: the tiles must be of this one.

    Raises:
        UserError: anything about the shards that would make a result wrong, with file, row and cure.
    """
    index = read_index(folder, lmax, noise_level, nside)
    kappa = empty_kappa(len(index.keys), index.n_bins, index.nside)
    digests = read_pixels(index, kappa.__setitem__)
    return Tiles(kappa, index.keys, index.params, lmax, noise_level, digests)


def read_index(folder: Path, lmax: int, noise_level: str, nside: int = 0) -> TileIndex:
    """Read everything but the pixels.

    Raises:
        UserError: as read_tiles.
    """
    shards = [read_labels(path, lmax, noise_level) for path in shard_paths(folder, lmax, noise_level)]
    keys, params, order = joined(shards)
    positions = np.split(np.argsort(order), np.cumsum([len(shard.keys) for shard in shards])[:-1])
    n_bins, nside = shards[0].n_bins, nside_of(lmax, nside)
    return TileIndex(keys[order], params[order], lmax, noise_level, n_bins, nside, shards, positions)


def read_pixels(index: TileIndex, put: Callable[[np.ndarray, np.ndarray], None]) -> np.ndarray:
    """Read the pixels of every shard, shards side by side, a few tiles at a time.

    Args:
        index: of the folder.
        put: called from several threads with positions (m,) in the canonical order and their kappa (m, bins, N, N).

    Returns:
        the tiles' digests, in the canonical order.

    Raises:
        UserError: as read_tiles.
    """
    digests = empty_digests(len(index.keys))
    with Progress("reading tiles", len(index.keys), "tiles") as progress, ThreadPoolExecutor(usable_cores()) as pool:
        counting = threading.Lock()

        def read(shard: ShardLabels, positions: np.ndarray) -> None:
            row = 0
            for tiles in kappa_of_shard(shard.path, index.n_bins, index.nside, index.lmax):
                some = positions[row : row + len(tiles)]
                row += len(tiles)
                if len(some) < len(tiles):
                    break
                digests[some] = digests_of(tiles)
                put(some, tiles)
                with counting:
                    progress.advance(len(tiles))
            if row != len(positions):
                raise UserError(f"{shard.path} changed while it was read; wait until it is complete and start again")
            shard.check(digests[positions])

        try:
            for _ in pool.map(read, index.shards, index.positions):
                pass  # the first error, in the order of the shards, is raised here
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return digests
