"""The tiles of a folder as one flat file beside the shards: parquet is decoded and checked once, not at every start.

    cache/tiles.f32   kappa, float32 (n, N, N, 4), canonical order, bins fastest
    cache/tiles.npz   keys, params, and what the shards were: size, identity and SHA-256 of each

tiles.npz is written last and removed first, so it never stands beside pixels that it does not describe.
"""

from __future__ import annotations

import hashlib
import json
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from common.artifacts import atomic_path
from common.errors import warn
from common.progress import Progress
from data.schema import N_BINS, nside_of
from data.shards import Tiles, empty_kappa, read_tiles, shard_paths

FOLDER, PIXELS, LABELS = "cache", "tiles.f32", "tiles.npz"
FORMAT = 1
BYTES_AT_A_TIME = 1 << 26
HASHING_THREADS = 4  # hashlib lets go of the interpreter
DAMAGED = (OSError, EOFError, ValueError, KeyError, TypeError, zipfile.BadZipFile, zlib.error)


def read_tiles_through_cache(folder: Path, lmax: int, noise_level: str, nside: int = 0) -> Tiles:
    """What read_tiles gives, from the cache if there is one that fits; otherwise the shards are read and it is made.

    A shard counts as unchanged if its size, inode and times are those of when the cache was made, or else if its
    content is. Where the cache cannot be written (no space, no permission) there is a warning and no cache.

    Raises:
        UserError: as read_tiles.
    """
    paths = shard_paths(folder, lmax, noise_level)
    cache = folder / FOLDER
    wanted = {"format": FORMAT, "lmax": lmax, "noise_level": noise_level, "nside": nside_of(lmax, nside)}
    if (tiles := _from_cache(cache, paths, wanted)) is not None:
        return tiles
    before = [_identity(path) for path in paths]
    tiles = read_tiles(folder, lmax, noise_level, nside)
    shards = {
        path.name: {"identity": identity, "sha256": digest}
        for path, identity, digest in zip(paths, before, _hashes(paths), strict=True)
    }
    if [_identity(path) for path in paths] == before:  # else someone writes there; the next start sees to it
        try:
            _write_cache(cache, tiles, wanted | {"shards": shards})
        except OSError as error:
            warn(f"no cache in {cache} ({error.strerror}): the next start will read the shards again")
    return tiles


def _identity(path: Path) -> list[int]:
    """Changes whenever a file is written, even if its size and time of change are set back."""
    stat = path.stat()
    return [stat.st_size, stat.st_ino, stat.st_mtime_ns, stat.st_ctime_ns]


def _hashes(paths: list[Path]) -> list[str]:
    """SHA-256 of every file."""

    def sha256(path: Path) -> str:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    with ThreadPoolExecutor(HASHING_THREADS) as pool:
        return list(pool.map(sha256, paths))


def _write_cache(cache: Path, tiles: Tiles, made_of: dict[str, Any]) -> None:
    cache.mkdir(exist_ok=True)
    (cache / LABELS).unlink(missing_ok=True)
    with atomic_path(cache / PIXELS) as temporary, open(temporary, "wb") as file:
        for start in range(0, len(tiles.kappa), 64):
            np.ascontiguousarray(tiles.kappa[start : start + 64].transpose(0, 2, 3, 1)).tofile(file)  # (n, N, N, 4)
    _write_labels(cache, tiles.keys, tiles.params, made_of)


def _write_labels(cache: Path, keys: np.ndarray, params: np.ndarray, made_of: dict[str, Any]) -> None:
    with atomic_path(cache / LABELS) as temporary, open(temporary, "wb") as file:
        np.savez(file, keys=keys, params=params, made_of=np.array(json.dumps(made_of)))


def _from_cache(cache: Path, paths: list[Path], wanted: dict[str, Any]) -> Tiles | None:
    """The tiles, or None if there is no cache of these very shards."""
    try:
        with np.load(cache / LABELS) as labels:
            keys, params, made_of = labels["keys"], labels["params"], json.loads(str(labels["made_of"]))
        nside = wanted["nside"]
        right_size = (cache / PIXELS).stat().st_size == 4 * len(keys) * N_BINS * nside**2
        shards = made_of.pop("shards")
        if not right_size or made_of != wanted or set(shards) != {path.name for path in paths}:
            return None
        if moved := [path for path in paths if _identity(path) != shards[path.name]["identity"]]:
            if _hashes(moved) != [shards[path.name]["sha256"] for path in moved]:
                return None
            for path in moved:  # copied or touched, not changed
                shards[path.name]["identity"] = _identity(path)
            _write_labels(cache, keys, params, made_of | {"shards": shards})
        return Tiles(
            _read_pixels(cache / PIXELS, len(keys), nside), keys, params, wanted["lmax"], wanted["noise_level"]
        )
    except DAMAGED:  # absent, half there, of another version, or on a read-only disk
        return None


def _read_pixels(path: Path, n_tiles: int, nside: int) -> np.ndarray:
    kappa = empty_kappa(n_tiles, nside)
    flat = kappa.transpose(0, 2, 3, 1).reshape(-1).view(np.uint8).data  # (n * N * N * 4,) floats, as bytes
    with open(path, "rb", buffering=0) as file, Progress("reading tiles", n_tiles, "tiles") as progress:
        start = 0
        while start < len(flat):
            if not (read := file.readinto(flat[start : start + BYTES_AT_A_TIME])):
                raise OSError(f"{path} ended early")
            start += read
            progress.advance(start * n_tiles // len(flat) - progress.done)
    return kappa
