"""The tiles of a folder as one flat file beside the shards: parquet is decoded and checked once, not at every start.

    cache/tiles.f32   kappa, float32 (n, N, N, 4), canonical order, bins fastest
    cache/tiles.npz   keys, params, digests, moments, and what the shards were: size, identity and SHA-256 of each

tiles.npz is written last and removed first, so it never stands beside pixels that it does not describe; one process
at a time writes, and the others wait for it.
"""

from __future__ import annotations

import errno
import json
import os
import threading
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np

from common.artifacts import CannotWriteError, atomic_path, sha256_of_file
from common.errors import UserError, warn
from common.lock import FOREVER, locked
from common.machine import free_memory
from data.moments import Moments, empty_moments, moments_of, moments_of_chunk
from data.schema import N_BINS, nside_of
from data.shards import TileIndex, Tiles, check_lmax, digests_of, read_index, read_pixels, read_tiles, shard_paths

FOLDER, PIXELS, LABELS, LOCK = "cache", "tiles.f32", "tiles.npz", "lock"
FORMAT = 4
HASHING_THREADS = 4  # hashlib lets go of the interpreter
DAMAGED = (OSError, EOFError, ValueError, KeyError, TypeError, zipfile.BadZipFile, zlib.error)


def read_tiles_through_cache(folder: Path, lmax: int, noise_level: str, nside: int = 0) -> tuple[Tiles, Moments]:
    """What read_tiles gives, its kappa being the cache mapped into memory; that is made first unless one fits.

    The tiles' moments come with it.

    Mapped pixels are read-only and take no memory but what the system has to spare, so any number of tiles can be
    opened. A shard counts as unchanged if its size, inode and times are those of when the cache was made, or else if
    its content is. Where the cache cannot be written (no space, no permission) there is a warning, and kappa is in
    memory.

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
    before = [_identity(path) for path in paths]
    index = read_index(folder, lmax, noise_level, nside)
    try:
        cache.mkdir(exist_ok=True)
        with locked(cache / LOCK, FOREVER):
            if (found := _from_cache(cache, paths, wanted)) is not None:  # another one has made it meanwhile
                return found
            digests, moments = _write_pixels(cache, index)
            hashes = _hashes(paths)
            if [_identity(path) for path in paths] == before:  # else someone writes there; the next start sees to it
                identities = zip(paths, before, hashes, strict=True)
                shards = {path.name: {"identity": identity, "sha256": sha256} for path, identity, sha256 in identities}
                made_of = wanted | {"pixels": _identity(cache / PIXELS), "shards": shards}
                _write_labels(cache, index.keys, index.params, digests, moments, made_of)
            kappa = map_pixels(cache / PIXELS, len(index.keys), index.nside)
    except (OSError, CannotWriteError) as error:
        reason = error.strerror if isinstance(error, OSError) else error.reason
        size, free = _bytes_of(len(index.keys), index.nside), free_memory()
        if size > free:
            raise UserError(
                f"no cache in {cache} ({reason}), and the tiles take {size / 1e9:.1f} GB where "
                f"{free / 1e9:.1f} GB of memory are free; make room or give write permission there, or copy the "
                "shards elsewhere and name that folder as --tiles-dir"
            ) from None
        warn(f"no cache in {cache} ({reason}): the next start will read the shards again")
        tiles = read_tiles(folder, lmax, noise_level, nside)
        return tiles, moments_of(tiles.kappa)
    return Tiles(kappa, index.keys, index.params, lmax, noise_level, digests), moments


def _identity(path: Path) -> list[int]:
    """Changes whenever a file is written, even if its size and time of change are set back."""
    stat = path.stat()
    return [stat.st_size, stat.st_ino, stat.st_mtime_ns, stat.st_ctime_ns]


def _hashes(paths: list[Path]) -> list[str]:
    """SHA-256 of every file."""
    with ThreadPoolExecutor(HASHING_THREADS) as pool:
        return list(pool.map(sha256_of_file, paths))


def _write_pixels(cache: Path, index: TileIndex) -> tuple[np.ndarray, Moments]:
    moments = empty_moments(len(index.keys))
    (cache / LABELS).unlink(missing_ok=True)
    writing = threading.Lock()
    with atomic_path(cache / PIXELS) as temporary, open(temporary, "wb", buffering=0) as file:

        def put(positions: np.ndarray, tiles: np.ndarray) -> None:
            moments.put(positions, moments_of_chunk(tiles))
            for position, tile in zip(positions, np.ascontiguousarray(tiles.transpose(0, 2, 3, 1)), strict=True):
                with writing:
                    file.seek(_bytes_of(int(position), index.nside))
                    if file.write(tile.data) != tile.nbytes:
                        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        digests = read_pixels(index, put)
    return digests, moments


def _bytes_of(n_tiles: int, nside: int) -> int:
    return n_tiles * N_BINS * nside**2 * np.dtype(np.float32).itemsize


def _write_labels(
    cache: Path,
    keys: np.ndarray,
    params: np.ndarray,
    digests: np.ndarray,
    moments: Moments,
    made_of: dict[str, Any],
) -> None:
    arrays = {"keys": keys, "params": params, "digests": digests, **vars(moments)}
    with atomic_path(cache / LABELS) as temporary, open(temporary, "wb") as file:
        np.savez(file, made_of=np.array(json.dumps(made_of)), **arrays)


def _from_cache(cache: Path, paths: list[Path], wanted: dict[str, Any]) -> tuple[Tiles, Moments] | None:
    """The tiles and their moments, or None if there is no cache of these very shards.

    Raises:
        UserError: the content of a shard has changed since the cache was made.
    """
    try:
        with np.load(cache / LABELS) as labels:
            keys, params, digests = labels["keys"], labels["params"], labels["digests"]
            moments = Moments(*(labels[field.name] for field in fields(Moments)))
            made_of = json.loads(str(labels["made_of"]))
        shards, pixels = made_of.pop("shards"), made_of.pop("pixels")
        known = [path for path in paths if path.name in shards]
        if moved := [path for path in known if _identity(path) != shards[path.name]["identity"]]:
            for path, sha256 in zip(moved, _hashes(moved), strict=True):
                if sha256 != shards[path.name]["sha256"]:
                    raise UserError(
                        f"{path} is not what it was when it was first read; restore it, or delete {cache} if the "
                        "change is meant"
                    )
                shards[path.name]["identity"] = _identity(path)  # copied or touched, not changed
        right_size = (cache / PIXELS).stat().st_size == _bytes_of(len(keys), wanted["nside"])
        if not right_size or made_of != wanted or set(shards) != {path.name for path in paths}:
            return None
        kappa = map_pixels(cache / PIXELS, len(keys), wanted["nside"])
        if pixels != (now := _identity(cache / PIXELS)):
            if not np.array_equal(digests_of(kappa), digests):
                return None
            moved, pixels = paths, now
        if moved:
            _write_labels(cache, keys, params, digests, moments, made_of | {"pixels": pixels, "shards": shards})
        return Tiles(kappa, keys, params, wanted["lmax"], wanted["noise_level"], digests), moments
    except (*DAMAGED, CannotWriteError):  # absent, half there, of another version, or on a read-only disk
        return None


def map_pixels(path: Path, n_tiles: int, nside: int) -> np.ndarray:
    """The file as a read-only array (n, 4, N, N) whose bins run fastest in memory.

    Read-only, since a system that counts memory promises none for it, so that it may be larger than all there is.
    """
    pixels = np.memmap(path, dtype=np.float32, mode="r", shape=(n_tiles, nside, nside, N_BINS))
    return np.asarray(pixels).transpose(0, 3, 1, 2)  # (n, 4, N, N)
