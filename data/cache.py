"""The tiles of a folder as one flat file beside the shards: parquet is decoded and checked once, not at every start.

    cache/tiles.f32   kappa, float32 (n, N, N, bins), canonical order, bins fastest
    cache/tiles.npz   keys, params, digests, moments, and of what it was made: identity and SHA-256 of every shard

tiles.npz is written last and removed first, so it never stands beside pixels that it does not describe; one process
at a time writes, and the others wait for it.
"""

import json
import threading
import zipfile
import zlib
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np

from common.artifacts import CannotWriteError, atomic_path, sha256_of_file
from common.errors import UserError, warn
from common.lock import FOREVER, locked
from common.machine import free_memory
from data.moments import Moments
from data.read_shards import TileIndex, read_index, read_into_memory, read_pixels, shard_paths
from data.schema import NUISANCE, nside_of
from data.shard_metadata import check_lmax
from data.tiles import Tiles, digests_of

FOLDER, PIXELS, LABELS, LOCK = "cache", "tiles.f32", "tiles.npz", "lock"
FORMAT = 5
HASHING_THREADS = 4  # hashlib lets go of the interpreter
DAMAGED = (OSError, EOFError, ValueError, KeyError, TypeError, zipfile.BadZipFile, zlib.error)


def read_tiles_through_cache(folder: Path, lmax: int, noise_level: str, nside: int = 0) -> tuple[Tiles, Moments]:
    """What read_tiles gives, and its moments; kappa is the cache mapped into memory, made first unless one fits.

    Mapped pixels are read-only and take no memory but what the system has to spare, so any number of tiles can be
    opened. Where the cache cannot be written (no space, no permission) there is a warning, and kappa is in memory.

    Raises:
        UserError: as read_tiles; or a shard has changed since the cache was made; or the cache cannot be written and
            memory does not hold the tiles.
    """
    paths = shard_paths(folder, lmax, noise_level)
    cache = folder / FOLDER
    wanted = {"format": FORMAT, "lmax": lmax, "noise_level": noise_level, "nside": nside_of(lmax, nside)}
    check_lmax(paths[0], lmax)  # the folder may have been renamed since the cache was made
    if (found := _from_cache(cache, paths, wanted)) is not None:
        return found
    before = {path: _identity(path) for path in paths}
    index = read_index(folder, lmax, noise_level, nside)
    try:
        cache.mkdir(exist_ok=True)
        with locked(cache / LOCK, FOREVER):
            # Another process may have made it while this one waited.
            return _from_cache(cache, paths, wanted) or _make_cache(cache, index, before, wanted)
    except (OSError, CannotWriteError) as error:
        reason = f"no cache in {cache} ({error.strerror if isinstance(error, OSError) else error.reason})"
    size, free = 4 * len(index.keys) * index.n_bins * index.nside**2, free_memory()  # float32
    if size > free:
        problem = f"{reason}, and the tiles take {size / 1e9:.1f} GB where {free / 1e9:.1f} GB of memory are free"
        raise UserError(
            f"{problem}; make room or give write permission there, or copy the shards to another --tiles-dir"
        )
    warn(f"{reason}: the next start will read the shards again")
    return read_into_memory(index)


def _identity(path: Path) -> list[int]:
    """Changes whenever a file is written, even if its size and time of change are set back."""
    stat = path.stat()
    return [stat.st_size, stat.st_ino, stat.st_mtime_ns, stat.st_ctime_ns]


def _hashes(paths: Iterable[Path]) -> list[str]:
    """SHA-256 of every file: it protects from shards, published ones too, that changed after they were first read."""
    with ThreadPoolExecutor(HASHING_THREADS) as pool:
        return list(pool.map(sha256_of_file, paths))


def _make_cache(
    cache: Path, index: TileIndex, before: dict[Path, list[int]], wanted: dict[str, Any]
) -> tuple[Tiles, Moments]:
    """Write the pixels, and then the labels, unless a shard changed meanwhile: the next start makes the cache again."""
    digests, moments = _write_pixels(cache, index)
    kappa = map_pixels(cache / PIXELS, len(index.keys), index.n_bins, index.nside)
    tiles = index.tiles(kappa, digests)
    shards = {path.name: [known, sha256] for (path, known), sha256 in zip(before.items(), _hashes(before), strict=True)}
    if all(_identity(path) == known for path, known in before.items()):
        _write_labels(cache, tiles, moments, wanted | {"pixels": _identity(cache / PIXELS), "shards": shards})
    return tiles, moments


def _write_pixels(cache: Path, index: TileIndex) -> tuple[np.ndarray, Moments]:
    (cache / LABELS).unlink(missing_ok=True)
    writing = threading.Lock()
    with atomic_path(cache / PIXELS) as temporary, open(temporary, "wb") as file:

        def put(positions: np.ndarray, tiles: np.ndarray) -> None:
            for position, tile in zip(positions, np.ascontiguousarray(tiles.transpose(0, 2, 3, 1)), strict=True):
                with writing:
                    file.seek(int(position) * tile.nbytes)
                    file.write(tile.data)

        return read_pixels(index, put)


def _write_labels(cache: Path, tiles: Tiles, moments: Moments, made_of: dict[str, Any]) -> None:
    arrays = {"keys": tiles.keys, "params": tiles.params, "digests": tiles.digests, **vars(moments), **tiles.nuisances}
    with atomic_path(cache / LABELS) as temporary, open(temporary, "wb") as file:
        np.savez(file, made_of=np.array(json.dumps(made_of)), **arrays)


def _from_cache(cache: Path, paths: list[Path], wanted: dict[str, Any]) -> tuple[Tiles, Moments] | None:
    """The tiles and their moments; None if there is no cache of these shards, UserError if one has other content."""
    try:
        with np.load(cache / LABELS) as labels:
            keys, params, digests = (labels[name] for name in ("keys", "params", "digests"))
            moments = Moments(*(labels[field.name] for field in fields(Moments)))
            nuisances = {name: labels[name] for name in labels.files if NUISANCE.fullmatch(name)}
            made_of = json.loads(str(labels["made_of"]))
        shards, pixels = made_of.pop("shards"), made_of.pop("pixels")
        moved = [path for path in paths if path.name in shards and _identity(path) != shards[path.name][0]]
        for path, sha256 in zip(moved, _hashes(moved), strict=True):
            if sha256 != shards[path.name][1]:
                found = f"{path} is not what it was when it was first read"
                raise UserError(f"{found}; restore it, or delete {cache} if it was changed on purpose")
            shards[path.name][0] = _identity(path)  # copied or touched, not changed
        if made_of != wanted or set(shards) != {path.name for path in paths}:
            return None
        kappa = map_pixels(cache / PIXELS, len(keys), moments.mean.shape[1], wanted["nside"])
        tiles = Tiles(kappa, keys, params, wanted["lmax"], wanted["noise_level"], digests, nuisances)
        if pixels != (now := _identity(cache / PIXELS)):
            if not np.array_equal(digests_of(kappa), digests):
                return None
            moved, pixels = paths, now
        if moved:
            _write_labels(cache, tiles, moments, made_of | {"pixels": pixels, "shards": shards})
        return tiles, moments
    except (*DAMAGED, CannotWriteError):  # absent, half there, of another version, or on a read-only disk
        return None


def map_pixels(path: Path, n_tiles: int, n_bins: int, nside: int) -> np.ndarray:
    """The file as a read-only array (n, bins, N, N) whose bins run fastest in memory.

    Read-only, since a system that counts memory promises none for it, so that it may be larger than all there is.
    """
    pixels = np.memmap(path, dtype=np.float32, mode="r", shape=(n_tiles, nside, nside, n_bins))
    return np.asarray(pixels).transpose(0, 3, 1, 2)  # (n, bins, N, N)
