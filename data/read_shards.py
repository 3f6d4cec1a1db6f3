"""Reading all shards of a folder: their labels first, checked, then the pixels, shards side by side."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from common.artifacts import FRESH_TILES
from common.errors import UserError
from common.machine import usable_cores
from common.progress import Progress
from data.config import ALL, KINDS
from data.moments import Moments, empty_moments, moments_of
from data.schema import name_of_tile, nside_of
from data.shard import ShardLabels, kappa_of_shard, read_labels
from data.shard_metadata import check_complete, nuisance_priors_of
from data.tiles import DIGEST_SIZE, Tiles, digests_of, empty_kappa


@dataclass(frozen=True)
class TileIndex:
    """What the shards of a folder hold beside the pixels, checked, and where every tile belongs.

    Attributes:
        keys, params, lmax, noise_level, nuisances: as in Tiles, in the canonical order.
        n_bins, nside: tomographic bins, and pixels per side of a tile.
        shards: in the order of their names.
        positions: for every shard the position in the canonical order of each of its rows.
    """

    keys: np.ndarray
    params: np.ndarray
    lmax: int
    noise_level: str
    nuisances: dict[str, np.ndarray]
    n_bins: int
    nside: int
    shards: list[ShardLabels]
    positions: list[np.ndarray]

    def tiles(self, kappa: np.ndarray, digests: np.ndarray) -> Tiles:
        """The tiles, given their pixels and the digests of these."""
        return Tiles(kappa, self.keys, self.params, self.lmax, self.noise_level, digests, self.nuisances)


def shard_paths(folder: Path, lmax: int, noise_level: str) -> list[Path]:
    """The shards of a folder, in the order of their names; UserError if there are none."""
    paths = sorted(folder.glob("shard_*.parquet"))
    if not paths:
        # A folder of ours says in its name which tiles are missing.
        made = f"python run_mock.py --lmax {lmax} --noise-level {noise_level}"
        nuisance = folder.name.removeprefix(f"lmax_{lmax}_{noise_level}_")
        made += f" --nuisance {nuisance}" if set(nuisance.split("+")) <= {*KINDS, ALL} else ""
        made += " --fresh" if folder.parent.name == FRESH_TILES else ""
        raise UserError(f"no shard_*.parquet in {folder}; make tiles with `{made}`, or give another folder")
    return paths


def read_tiles(folder: Path, lmax: int, noise_level: str, nside: int = 0) -> Tiles:
    """Read every shard of a folder into one array, in the canonical order.

    Args:
        folder: holds shard_*.parquet.
        lmax, noise_level, nside: that the tiles must have; they are nside_of(lmax, nside) pixels wide.

    Raises:
        UserError: anything about the shards that would make a result wrong, with file, row and cure.
    """
    return read_into_memory(read_index(folder, lmax, noise_level, nside))[0]


def read_into_memory(index: TileIndex) -> tuple[Tiles, Moments]:
    """The tiles in one array, and their moments.

    The peak memory is the array and some 100 MB for every core: a few tiles at a time are read straight into it.
    """
    kappa = empty_kappa(len(index.keys), index.n_bins, index.nside)
    digests, moments = read_pixels(index, kappa.__setitem__)
    return index.tiles(kappa, digests), moments


def read_index(folder: Path, lmax: int, noise_level: str, nside: int = 0) -> TileIndex:
    """Read and check everything but the pixels; arguments and errors as those of read_tiles."""
    shards = [read_labels(path, lmax, noise_level) for path in shard_paths(folder, lmax, noise_level)]
    first, priors = shards[0], nuisance_priors_of(shards[0].path)
    for shard in shards:
        if shard.n_bins != first.n_bins:
            found = f"{shard.path} has tiles of {shard.n_bins} bins, {first.path} of {first.n_bins}"
            raise UserError(f"{found}; the folder mixes two suites, separate them")
        if list(shard.nuisances) != list(first.nuisances):
            found = f"{shard.path} varies {_named(shard.nuisances)}, {first.path} {_named(first.nuisances)}"
            raise UserError(f"{found}; the folder mixes two suites, separate them")
        if shard.nuisances and nuisance_priors_of(shard.path) != priors:
            found = f"{shard.path} has its nuisances from other priors than {first.path}"
            raise UserError(f"{found}; the folder mixes two suites, separate them")
    keys, params = (np.concatenate([getattr(shard, name) for shard in shards]) for name in ("keys", "params"))
    order = np.lexsort(keys.T[::-1])  # (n,)
    _check_neighbours(keys, params, order, shards)
    check_complete(first.path, keys[:, 0])
    positions = np.split(np.argsort(order), np.cumsum([len(shard.keys) for shard in shards])[:-1])
    nuisances = {n: np.concatenate([shard.nuisances[n] for shard in shards])[order] for n in first.nuisances}
    size = first.n_bins, nside_of(lmax, nside)
    return TileIndex(keys[order], params[order], lmax, noise_level, nuisances, *size, shards, positions)


def _named(nuisances: dict[str, np.ndarray]) -> str:
    return ", ".join(nuisances) or "no nuisances"


def _check_neighbours(keys: np.ndarray, params: np.ndarray, order: np.ndarray, shards: list[ShardLabels]) -> None:
    """Raise UserError for a tile that is there twice, or two cosmologies of one simulation."""
    place = [f"{shard.path}, row {row}" for shard in shards for row in range(len(shard.keys))]
    one, other = order[:-1], order[1:]
    if len(twice := np.flatnonzero((keys[one] == keys[other]).all(axis=1))):
        a, b = one[twice[0]], other[twice[0]]
        raise UserError(f"{place[b]}: {name_of_tile(keys[a])} is in {place[a]} already; remove one of the two shards")
    clash = (keys[one, 0] == keys[other, 0]) & (params[one] != params[other]).any(axis=1)
    if len(clashes := np.flatnonzero(clash)):
        a, b = one[clashes[0]], other[clashes[0]]
        found = f"{place[b]}: simulation {keys[a, 0]} has another cosmology than in {place[a]}"
        raise UserError(f"{found}; the folder mixes two suites, separate them")


def read_pixels(index: TileIndex, put: Callable[[np.ndarray, np.ndarray], None]) -> tuple[np.ndarray, Moments]:
    """Read the pixels of every shard, shards side by side, a few tiles at a time; errors as those of read_tiles.

    Args:
        index: of the folder.
        put: called from several threads with positions (m,) in the canonical order and their kappa (m, bins, N, N).

    Returns:
        the tiles' digests and moments, in the canonical order.
    """
    n = len(index.keys)
    digests, moments = np.empty((n, DIGEST_SIZE), np.uint8), empty_moments(n, index.n_bins)
    with Progress("reading tiles", n, "tiles") as progress, ThreadPoolExecutor(usable_cores()) as pool:
        counting = threading.Lock()

        def read(shard: ShardLabels, positions: np.ndarray) -> None:
            row = 0
            for tiles in kappa_of_shard(shard.path, index.n_bins, index.nside, index.lmax):
                some = positions[row : row + len(tiles)]
                row += len(tiles)
                if len(some) < len(tiles):
                    break
                digests[some] = digests_of(tiles)
                moments.put(some, moments_of(tiles))
                put(some, tiles)
                with counting:
                    progress.advance(len(tiles))
            if row != len(positions):
                raise UserError(f"{shard.path} changed while it was read; wait until it is complete and start again")
            shard.check(digests[positions])

        list(pool.map(read, index.shards, index.positions))  # raises the first error, and cancels what has not begun
    return digests, moments
