"""One shard, read and checked: the labels of its tiles, and their pixels a few tiles at a time.

There are two layouts: published shards have kappa as nested lists of doubles, our own as fixed-size lists of float32.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from common.errors import UserError
from data.schema import KEY_NAMES, NUISANCE, PARAM_NAMES, columns_of, in_order, s8_of
from data.shard_metadata import CONTENT_KEY, INGEST_KEY, METADATA_KEY, check_lmax, content_sha256

VALUES_PER_READ = 1 << 20  # pixels at a time: what pyarrow needs beside the array grows with it
BUFFER_SIZE = 1 << 20  # bytes read from the file at a time, instead of whole column chunks
S8_TOLERANCE = 1e-4  # relative; S8 is derived from two columns of the same table
FITS = {
    **dict.fromkeys(KEY_NAMES, pa.types.is_integer),
    **dict.fromkeys(PARAM_NAMES, pa.types.is_floating),
    "noise_level": lambda kind: kind in (pa.string(), pa.large_string()),
}  # the columns beside kappa, and whether one has the right type


@dataclass(frozen=True)
class ShardLabels:
    """The labels of one shard, in the order of its rows.

    Attributes:
        keys, params, noise_level, nuisances: as in Tiles.
        n_bins: tomographic bins of its tiles.
        content: the hash of its rows that it carries; empty for published ones.
    """

    path: Path
    keys: np.ndarray
    params: np.ndarray
    noise_level: str
    nuisances: dict[str, np.ndarray]
    n_bins: int
    content: str

    def check(self, digests: np.ndarray) -> None:
        """Raise UserError if the hash that the shard carries is not that of its rows, given their tiles' digests."""
        labels = self.keys, self.params, self.noise_level, self.nuisances
        if self.content not in ("", content_sha256(digests, *labels)):
            raise UserError(f"{self.path} is not what was written (its hash does not fit); make or download it again")


@contextmanager
def opened(path: Path, columns: Iterable[str] = ("kappa",)) -> Iterator[pq.ParquetFile]:
    """A shard's file; UserError if parquet cannot read it, within the block too, or if it lacks a column."""
    try:
        with pq.ParquetFile(path, pre_buffer=False, buffer_size=BUFFER_SIZE) as file:
            if missing := [name for name in columns if name not in file.schema_arrow.names]:
                raise UserError(f"{path} has no column {', '.join(missing)}; it is no shard of tiles, move it")
            yield file
    except (pa.ArrowException, OSError, ValueError) as error:  # ValueError: more or fewer pixels than its lists say
        reason = str(error).splitlines()[0][:160]
        raise UserError(f"{path} is truncated or damaged ({reason}); delete it and make or download it again") from None


def n_bins_of(path: Path, file: pq.ParquetFile) -> int:
    """Tomographic bins of the first tile of a shard; UserError if there is none, or kappa is of another type."""
    pixel = kappa = file.schema_arrow.field("kappa").type
    for _ in range(3):  # lists: tile, bin, row
        pixel = getattr(pixel, "value_type", None)
    if pixel not in (pa.float32(), pa.float64()):
        raise UserError(f"{path}: kappa has type {kappa}, not three nested lists of float or double; rebuild the shard")
    first = next(file.iter_batches(1, columns=["kappa"]), None)
    n_bins = None if first is None else pc.list_value_length(first.column(0))[0].as_py()
    if not n_bins:
        raise UserError(f"{path}, row 0: kappa is empty; rebuild the shard")
    return int(n_bins)


def read_labels(path: Path, lmax: int, noise_level: str = "") -> ShardLabels:
    """Read the labels of one shard, and check them row by row.

    Args:
        path: of the shard.
        lmax, noise_level: that its tiles must have; any noise level if it is empty.

    Raises:
        UserError: a missing column, another type, an empty or infinite value, another lmax or noise level, an S8 that
            does not fit, or no hash in a shard that we wrote.
    """
    with opened(path, ("kappa", *FITS)) as file:
        nuisances = in_order(name for name in file.schema_arrow.names if NUISANCE.fullmatch(name))
        n_bins, metadata = n_bins_of(path, file), file.metadata.metadata or {}
        table = file.read([*FITS, *nuisances])
    content = metadata.get(CONTENT_KEY.encode(), b"").decode(errors="replace")
    if not content and metadata.keys() & {METADATA_KEY.encode(), INGEST_KEY.encode()}:
        raise UserError(f"{path} was made here but carries no hash of its rows; make it again (--restart)")
    check_lmax(path, lmax)
    for name, fits in (FITS | dict.fromkeys(nuisances, pa.types.is_floating)).items():
        if not fits(kind := table.schema.field(name).type):
            raise UserError(f"{path}: column {name} has type {kind}; rebuild the shard (docs/data.md)")
    keys, params, values = _numbers(path, table, nuisances)
    levels = table["noise_level"].to_numpy()
    noise_level = noise_level or str(levels[0])
    if len(wrong := np.flatnonzero(levels != noise_level)):
        found = f"{path}, row {wrong[0]}: noise level {levels[wrong[0]]!r}, not {noise_level!r}"
        raise UserError(f"{found}; give another --noise-level or other tiles")
    return ShardLabels(path, keys, params, noise_level, values, n_bins, content)


def _numbers(path: Path, table: pa.Table, nuisances: list[str]) -> tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]]:
    """Keys (n, 3), params (n, 8) and the nuisances, finite and with the S8 that follows from the others."""
    names = (*KEY_NAMES, *PARAM_NAMES, *nuisances)
    columns = [table[name].to_numpy() for name in names]  # what is empty becomes NaN
    if len(places := np.argwhere(~np.isfinite(np.stack(columns, axis=1)))):
        row, column = places[0]
        raise UserError(f"{path}, row {row}: {names[column]} is empty, NaN or infinite; rebuild the shard")
    keys = np.stack(columns[: len(KEY_NAMES)], axis=1).astype(np.int64)  # (n, 3)
    of_params = slice(len(KEY_NAMES), len(KEY_NAMES) + len(PARAM_NAMES))
    params = np.stack(columns[of_params], axis=1).astype(np.float64)  # (n, 8)
    omega_m, sigma_8, given = columns_of(params, ("Omega_m", "sigma_8", "S8")).T
    s8 = s8_of(sigma_8, omega_m)
    if len(wrong := np.flatnonzero(~(np.abs(given - s8) <= S8_TOLERANCE * np.abs(s8)))):
        found = f"S8 = {given[wrong[0]]:.5f}, but sigma_8 (Omega_m/0.3)^0.5 = {s8[wrong[0]]:.5f}"
        raise UserError(f"{path}, row {wrong[0]}: {found}; rebuild the shard from a consistent table")
    return keys, params, dict(zip(nuisances, columns[of_params.stop :], strict=True))


def kappa_of_shard(path: Path, n_bins: int, nside: int, lmax: int) -> Iterator[np.ndarray]:
    """The tiles of one shard in the order of its rows, float32 (m, bins, N, N), a few at a time.

    Raises:
        UserError: a tile of another shape, or a pixel that is no finite float32.
    """
    shape, row = (n_bins, nside, nside), 0
    batch_size = max(1, VALUES_PER_READ // (n_bins * nside**2))
    with opened(path) as file:
        for batch in file.iter_batches(batch_size, columns=["kappa"], use_threads=False):
            pixels = _flat_pixels(batch.column(0), shape, lmax, path, row)
            tiles = pixels.reshape(len(batch), *shape)  # (m, bins, N, N)
            with np.errstate(over="ignore"):  # a double beyond float32 becomes infinite and is refused below
                tiles = tiles.astype(np.float32, copy=False)
            if len(wrong := np.flatnonzero(~np.isfinite(tiles).all(axis=(1, 2, 3)))):
                row += wrong[0]
                raise UserError(f"{path}, row {row}: kappa has empty, NaN or infinite pixels; rebuild the shard")
            yield tiles
            row += len(batch)


def _flat_pixels(array: pa.Array, shape: tuple[int, ...], lmax: int, path: Path, first_row: int) -> np.ndarray:
    """The pixels of a batch of tiles as one flat array (empty ones are NaN), every list having the right length."""
    lists_per_tile = 1
    for size in shape:
        lengths = pc.fill_null(pc.list_value_length(array), 0).to_numpy()
        if len(wrong := np.flatnonzero(lengths != size)):
            where, length = f"{path}, row {first_row + wrong[0] // lists_per_tile}: kappa is", lengths[wrong[0]]
            if not length:
                raise UserError(f"{where} empty; rebuild the shard")
            found = f"{where} not {shape}, the shape for lmax {lmax} (a list has length {length}, not {size})"
            raise UserError(f"{found}; change --lmax, --nside or --tiles-dir")
        array = array.flatten()
        lists_per_tile *= size
    return array.to_numpy(zero_copy_only=False)
