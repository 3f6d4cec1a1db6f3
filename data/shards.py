"""Tiles in parquet shards: write, check, read.

Two layouts are read: the published one (kappa as nested lists of doubles) and our own compact one
(kappa as fixed-size lists of float32, with page checksums), which is what we write.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from common.artifacts import atomic_path
from common.errors import UserError
from common.machine import usable_cores
from common.progress import Progress
from data.config import TileGeometry
from data.schema import KEY_NAMES, N_BINS, PARAM_NAMES, THETA_COLUMNS, nside_of, s8_of
from data.sky import ORIENTATIONS, Orientations

S8_TOLERANCE = 1e-4  # relative; S8 is derived from two columns of the same table
VALUES_PER_READ = 1 << 20  # pixels at a time: what pyarrow needs beside the array grows with it
METADATA_KEY = "mock_suite"  # of the JSON that says how the mock suite made a shard; published shards have none
INGEST_KEY = "ingest"  # likewise of those that were made from lightcones or maps
CONTENT_KEY = "content_sha256"  # of the hash of all rows; every shard that we write has it, published ones do not
ORIENTATIONS_KEY = "orientations_zyz_deg"  # in it: data.sky.Orientations, or null for tiles without a common sky
CONFIGURATION = re.compile(r"lmax_(\d+)_")  # how the folder of a published configuration begins
BUFFER_SIZE = 1 << 20  # bytes read from the file at a time, in place of whole column chunks


@dataclass(frozen=True)
class Tiles:
    """Tiles in the canonical order (sim_id, orientation_id, tile_id).

    Attributes:
        kappa: convergence (dimensionless), float32, shape (n, 4, N, N): bins, then rows y and columns x of
            the HEALPix face (pixel [y, x] is `xyf2pix(x, y, face)`). In memory the bins run fastest.
        keys: int64 (n, 3): sim_id, orientation_id, tile_id.
        params: float64 (n, 8), in the order of PARAM_NAMES.
        lmax, noise_level: one for all tiles.
        digests: digests_of(kappa) if it is known, as it is for tiles that were read; else None.
    """

    kappa: np.ndarray
    keys: np.ndarray
    params: np.ndarray
    lmax: int
    noise_level: str
    digests: np.ndarray | None = None

    @property
    def theta(self) -> np.ndarray:
        """(Omega_m, S8), float64 (n, 2)."""
        return self.params[:, THETA_COLUMNS]


def empty_kappa(n_tiles: int, nside: int) -> np.ndarray:
    """Uninitialised float32 array (n, 4, N, N) whose bins run fastest in memory (channels_last)."""
    return np.empty((n_tiles, nside, nside, N_BINS), dtype=np.float32).transpose(0, 3, 1, 2)  # (n, 4, N, N)


def digests_of(kappa: np.ndarray) -> np.ndarray:
    """SHA-256 of every tile's pixels, little-endian float32 in the order (bin, y, x): uint8 (n, 32)."""
    digests = empty_digests(len(kappa))
    for digest, tile in zip(digests, kappa, strict=True):
        digest[:] = np.frombuffer(hashlib.sha256(np.ascontiguousarray(tile, dtype="<f4").data).digest(), np.uint8)
    return digests


def empty_digests(n_tiles: int) -> np.ndarray:
    """Uninitialised, uint8 (n, 32)."""
    return np.empty((n_tiles, hashlib.sha256().digest_size), dtype=np.uint8)


def _content_sha256(digests: np.ndarray, keys: np.ndarray, params: np.ndarray, noise_level: str) -> str:
    """Hash of all that a shard says, row by row, however parquet lays it out."""
    content = hashlib.sha256(digests.tobytes())
    content.update(keys.astype("<i8").tobytes())
    content.update(params.astype("<f8").tobytes())
    content.update(noise_level.encode())
    return content.hexdigest()


# ---------------------------------------------------------------- writing


def _compact_schema(nside: int, metadata: dict[str, str]) -> pa.Schema:
    row = pa.list_(pa.float32(), nside)
    return pa.schema(
        [
            ("kappa", pa.list_(pa.list_(row, nside), N_BINS)),
            *[(name, pa.int64()) for name in KEY_NAMES],
            ("noise_level", pa.string()),
            *[(name, pa.float64()) for name in PARAM_NAMES],
        ],
        metadata=metadata,
    )


class ShardWriter:
    """Writes one shard in the compact layout, a row group per call of `write`."""

    def __init__(self, file: Path, nside: int, metadata: dict[str, str]) -> None:
        self.file, self.schema = file, _compact_schema(nside, metadata)
        self.rows: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
        self.noise_level = ""
        self.writer = pq.ParquetWriter(
            file,
            self.schema,
            compression="none",
            use_dictionary=False,
            write_page_checksum=True,
            write_statistics=False,
        )  # noise does not compress, and its values do not repeat

    def write(self, kappa: np.ndarray, keys: np.ndarray, params: np.ndarray, noise_level: str) -> None:
        """Append tiles: kappa (n, 4, N, N), keys (n, 3), params (n, 8)."""
        column = pa.array(np.ascontiguousarray(kappa, dtype=np.float32).reshape(-1))  # (n * 4 * N * N,)
        for size in (kappa.shape[3], kappa.shape[2], kappa.shape[1]):
            column = pa.FixedSizeListArray.from_arrays(column, size)  # innermost first: rows, bins, tiles
        columns = [column, *keys.T, pa.array([noise_level] * len(keys)), *params.T]
        self.writer.write_table(
            pa.table([pa.array(c) if isinstance(c, np.ndarray) else c for c in columns], self.schema)
        )
        self.rows.append((digests_of(kappa), keys, params))
        self.noise_level = noise_level

    def sync(self) -> None:
        """Have the disk take what was written so far: little is then left to do when all has to stop at once."""
        with open(self.file, "rb") as file:
            os.fsync(file.fileno())

    def seal(self) -> None:
        """Store the hash of all that was written."""
        digests, keys, params = (np.concatenate(parts) for parts in zip(*self.rows, strict=True))
        self.writer.add_key_value_metadata({CONTENT_KEY: _content_sha256(digests, keys, params, self.noise_level)})


@contextmanager
def open_shard(path: Path, nside: int, metadata: dict[str, str]) -> Iterator[ShardWriter]:
    """A writer for one shard; the file appears under its name only when the block ends well."""
    with atomic_path(path) as temporary:
        shard = ShardWriter(temporary, nside, metadata)
        with shard.writer:
            yield shard
            shard.seal()


# ---------------------------------------------------------------- reading


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


@dataclass(frozen=True)
class TileIndex:
    """What the shards of a folder hold beside the pixels, checked, and where every tile belongs.

    Attributes:
        keys, params, lmax, noise_level: as in Tiles, in the canonical order.
        nside: pixels per side of a tile.
        places: for every shard in the order of their names, the position in that order of each of its rows.
        contents: for every shard the hash of its rows that it carries; empty for published ones.
    """

    keys: np.ndarray
    params: np.ndarray
    lmax: int
    noise_level: str
    nside: int
    places: dict[Path, np.ndarray]
    contents: dict[Path, str]


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
    kappa = empty_kappa(len(index.keys), index.nside)
    digests = read_pixels(index, kappa.__setitem__)
    return Tiles(kappa, index.keys, index.params, lmax, noise_level, digests)


def read_index(folder: Path, lmax: int, noise_level: str, nside: int = 0) -> TileIndex:
    """Read everything but the pixels.

    Raises:
        UserError: as read_tiles.
    """
    paths = shard_paths(folder, lmax, noise_level)
    tables = [_read_labels(path, lmax, noise_level) for path in paths]
    keys = np.concatenate([table[0] for table in tables])  # (n, 3)
    params = np.concatenate([table[1] for table in tables])  # (n, 8)
    rows_per_shard = [len(table[0]) for table in tables]
    # For messages: which file and row tile i came from.
    places = [f"{path}, row {row}" for path, n in zip(paths, rows_per_shard, strict=True) for row in range(n)]
    order = np.lexsort(keys.T[::-1])
    _check_labels(keys, params, order, places)
    position = np.empty(len(keys), dtype=np.int64)
    position[order] = np.arange(len(keys))
    per_shard = np.split(position, np.cumsum(rows_per_shard)[:-1])
    return TileIndex(
        keys[order],
        params[order],
        lmax,
        noise_level,
        nside_of(lmax, nside),
        dict(zip(paths, per_shard, strict=True)),
        {path: table[2] for path, table in zip(paths, tables, strict=True)},
    )


def read_pixels(index: TileIndex, put: Callable[[np.ndarray, np.ndarray], None]) -> np.ndarray:
    """Read the pixels of every shard, shards side by side, a few tiles at a time.

    Args:
        index: of the folder.
        put: called from several threads with positions (m,) in the canonical order and their kappa (m, 4, N, N).

    Returns:
        the tiles' digests, in the canonical order.

    Raises:
        UserError: as read_tiles.
    """
    digests = empty_digests(len(index.keys))
    with Progress("reading tiles", len(index.keys), "tiles") as progress, ThreadPoolExecutor(usable_cores()) as pool:
        counting = threading.Lock()

        def read(path: Path) -> None:
            row, positions = 0, index.places[path]
            for tiles in kappa_of_shard(path, index.nside, index.lmax):
                if row + len(tiles) > len(positions):
                    break
                some = positions[row : row + len(tiles)]
                digests[some] = digests_of(tiles)
                put(some, tiles)
                row += len(tiles)
                with counting:
                    progress.advance(len(tiles))
            if row != len(positions):
                raise UserError(f"{path} changed while it was read; wait until it is complete and start again")
            labels = index.keys[positions], index.params[positions]
            if index.contents[path] not in ("", _content_sha256(digests[positions], *labels, index.noise_level)):
                raise UserError(f"{path} is not what was written (its hash does not fit); make or download it again")

        try:
            for _ in pool.map(read, index.places):
                pass  # the first error, in the order of the shards, is raised here
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return digests


def description_of(path: Path) -> str | None:
    """The JSON text that says how we made a shard; None if we did not write this file."""
    try:
        metadata = pq.read_schema(path).metadata or {}
    except (pa.ArrowException, OSError):
        return None
    text = metadata.get(METADATA_KEY.encode(), metadata.get(INGEST_KEY.encode()))
    return None if text is None else _text(text)


def check_lmax(path: Path, lmax: int) -> None:
    """Compare with the lmax that a shard states, or else, as published ones do not, the name of its folder.

    Several lmax have the same number of pixels.

    Raises:
        UserError: it is another one.
    """
    stated = _description(path).get("lmax")
    where = path
    if stated is None:  # the folder's name as it was given, or as it is behind a link
        names = (CONFIGURATION.match(folder.name) for folder in (path.parent.absolute(), path.parent.resolve()))
        if name := next(filter(None, names), None):
            stated, where = int(name[1]), path.parent
    if stated not in (None, lmax):
        raise UserError(
            f"{where} holds tiles of lmax {stated}, where {lmax} is due; give their lmax, or another folder of tiles"
        )


def _description(path: Path) -> dict[str, Any]:
    """How we made a shard; empty if we did not.

    Raises:
        UserError: it does not say so in JSON.
    """
    try:
        return dict(json.loads(description_of(path) or "{}"))
    except (ValueError, TypeError):
        raise UserError(f"{path} does not say in JSON how it was made; make it again") from None


def read_orientations(folder: Path, geometry: TileGeometry = "auto") -> Orientations | None:
    """Where the tiles of a folder lie: as the named geometry, or ("auto") its first shard says.

    Empty for tiles without a common sky, None if it is not said.
    """
    if geometry != "auto":
        return ORIENTATIONS[geometry]
    first = min(folder.glob("shard_*.parquet"), default=folder)
    description = _description(first)
    if ORIENTATIONS_KEY not in description:
        return None
    try:
        return tuple((float(a), float(b), float(c)) for a, b, c in description[ORIENTATIONS_KEY] or ())  # ZYZ
    except (ValueError, TypeError):
        raise UserError(f"{first} does not say where its tiles lie; make it again") from None


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except (pa.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0][:160]
        raise UserError(f"{path} is truncated or damaged ({reason}); delete it and make or download it again") from None


def _open(path: Path) -> pq.ParquetFile:
    return pq.ParquetFile(path, page_checksum_verification=True, pre_buffer=False, buffer_size=BUFFER_SIZE)


def _read_labels(path: Path, lmax: int, noise_level: str) -> tuple[np.ndarray, np.ndarray, str]:
    """Keys (n, 3) and parameters (n, 8) of one shard, checked row by row, and the hash that it carries, if any."""
    with _readable(path), _open(path) as file:
        names = file.schema_arrow.names
        if missing := [n for n in ("kappa", *KEY_NAMES, "noise_level", *PARAM_NAMES) if n not in names]:
            raise UserError(
                f"{path} has no column {', '.join(missing)}; it is not a shard of tiles, take it out of the folder"
            )
        _check_kappa_type(path, file.schema_arrow.field("kappa").type)
        table = file.read(columns=[*KEY_NAMES, "noise_level", *PARAM_NAMES])
        metadata = {_text(key): _text(value) for key, value in (file.metadata.metadata or {}).items()}
    if {METADATA_KEY, INGEST_KEY} & metadata.keys() and CONTENT_KEY not in metadata:
        raise UserError(f"{path} was made here but carries no hash of its rows; make it again (--restart)")
    check_lmax(path, lmax)
    for name in table.column_names:
        wanted = pa.types.is_integer if name in KEY_NAMES else pa.types.is_floating if name in PARAM_NAMES else _is_text
        if not wanted(table.schema.field(name).type):
            raise UserError(
                f"{path}: column {name} has type {table.schema.field(name).type}; "
                "rebuild the shard with the schema in the README"
            )
        if table[name].null_count:
            row = int(np.argmax(table[name].is_null().to_numpy()))
            raise UserError(f"{path}, row {row}: {name} is empty; rebuild the shard")
    levels = table["noise_level"].to_numpy()
    if (wrong := levels != noise_level).any():
        row = int(np.argmax(wrong))
        raise UserError(
            f"{path}, row {row}: noise level {levels[row]!r}, but {noise_level!r} was asked for; "
            "change --noise-level or --tiles-dir"
        )
    params = np.stack([table[name].to_numpy() for name in PARAM_NAMES], axis=1).astype(np.float64)  # (n, 8)
    if not (finite := np.isfinite(params).all(axis=1)).all():
        row = int(np.argmin(finite))
        name = PARAM_NAMES[int(np.argmin(np.isfinite(params[row])))]
        raise UserError(f"{path}, row {row}: {name} is not finite; rebuild the shard")
    keys = np.stack([table[name].to_numpy() for name in KEY_NAMES], axis=1).astype(np.int64)  # (n, 3)
    return keys, params, metadata.get(CONTENT_KEY, "")


def _text(value: bytes) -> str:
    return value.decode(errors="replace")


def _is_text(arrow_type: pa.DataType) -> bool:
    return pa.types.is_string(arrow_type) or pa.types.is_large_string(arrow_type)


def _is_list(arrow_type: pa.DataType) -> bool:
    return pa.types.is_list(arrow_type) or pa.types.is_large_list(arrow_type) or pa.types.is_fixed_size_list(arrow_type)


def _check_kappa_type(path: Path, arrow_type: pa.DataType) -> None:
    inner = arrow_type
    for _ in range(3):
        if not _is_list(inner):
            break
        inner = inner.value_type
    else:
        if pa.types.is_float32(inner) or pa.types.is_float64(inner):
            return
    raise UserError(
        f"{path}: kappa has type {arrow_type}, not three nested lists of float or double; rebuild the shard"
    )


def _check_labels(keys: np.ndarray, params: np.ndarray, order: np.ndarray, places: list[str]) -> None:
    """Checks that need all shards: keys, cosmologies, S8."""
    s8 = s8_of(params[:, PARAM_NAMES.index("sigma_8")], params[:, PARAM_NAMES.index("Omega_m")])
    given = params[:, PARAM_NAMES.index("S8")]
    if (wrong := ~(np.abs(given - s8) <= S8_TOLERANCE * np.abs(s8))).any():
        i = int(np.argmax(wrong))
        raise UserError(
            f"{places[i]}: S8 = {given[i]:.5f}, but sigma_8 (Omega_m/0.3)^0.5 = {s8[i]:.5f}; "
            "rebuild the shard from a consistent table"
        )
    first, second = order[:-1], order[1:]
    if (same := (keys[first] == keys[second]).all(axis=1)).any():
        i = int(np.argmax(same))
        sim, orientation, tile = keys[first[i]]
        raise UserError(
            f"{places[second[i]]}: tile (sim {sim}, orientation {orientation}, tile {tile}) is in {places[first[i]]} "
            "already; remove one of the two shards"
        )
    clash = (keys[first, 0] == keys[second, 0]) & (params[first] != params[second]).any(axis=1)
    if clash.any():
        i = int(np.argmax(clash))
        raise UserError(
            f"{places[second[i]]}: simulation {keys[first[i], 0]} has another cosmology than in {places[first[i]]}; "
            "the folder mixes two suites, separate them"
        )


def kappa_of_shard(path: Path, nside: int, lmax: int) -> Iterator[np.ndarray]:
    """The tiles of one shard in the order of its rows, float32 (m, 4, N, N), a few at a time."""
    batch_size = max(1, VALUES_PER_READ // (N_BINS * nside * nside))
    row = 0
    with _readable(path), _open(path) as file:
        for batch in file.iter_batches(batch_size, columns=["kappa"], use_threads=False):
            values = _flat_values(batch.column(0), nside, lmax, path, row)
            tiles = values.reshape(len(batch), N_BINS, nside, nside)  # (m, 4, N, N)
            with np.errstate(over="ignore"):  # a double beyond float32 becomes infinite and is refused below
                tiles = tiles.astype(np.float32, copy=False)
            if not (finite := np.isfinite(tiles).all(axis=(1, 2, 3))).all():
                raise UserError(
                    f"{path}, row {row + int(np.argmin(finite))}: kappa has NaN or infinite pixels; rebuild the shard"
                )
            yield tiles
            row += len(batch)


def _flat_values(array: pa.Array, nside: int, lmax: int, path: Path, first_row: int) -> np.ndarray:
    """The pixels of a batch of tiles as one flat array, after checking that every list has the right length."""
    n_rows = len(array)
    lists_per_row = 1
    for size in (N_BINS, nside, nside):
        if array.null_count:
            row = first_row + int(np.argmax(array.is_null().to_numpy(zero_copy_only=False))) // lists_per_row
            raise UserError(f"{path}, row {row}: kappa is empty; rebuild the shard")
        if pa.types.is_fixed_size_list(array.type):
            lengths = np.full(len(array), array.type.list_size)
        else:
            lengths = np.diff(array.offsets.to_numpy())
        if (wrong := lengths != size).any():
            i = int(np.argmax(wrong))
            raise UserError(
                f"{path}, row {first_row + i // lists_per_row}: kappa is not ({N_BINS}, {nside}, {nside}), the shape "
                f"for lmax {lmax} (a length is {lengths[i]} where {size} is due); change --lmax, --nside or --tiles-dir"
            )
        array = array.flatten()
        lists_per_row *= size
    if array.null_count:
        row = first_row + int(np.argmax(array.is_null().to_numpy(zero_copy_only=False))) // lists_per_row
        raise UserError(f"{path}, row {row}: kappa has empty pixels; rebuild the shard")
    if len(array) != n_rows * lists_per_row:
        raise UserError(
            f"{path}, row {first_row}: kappa holds {len(array)} pixels for {n_rows} tiles; rebuild the shard"
        )
    return array.to_numpy()
