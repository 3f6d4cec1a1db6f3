"""The pixels of one shard, a few tiles at a time, in whichever of the two layouts.

The published layout has kappa as nested lists of doubles, our own as fixed-size lists of float32.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from common.errors import UserError

VALUES_PER_READ = 1 << 20  # pixels at a time: what pyarrow needs beside the array grows with it
BUFFER_SIZE = 1 << 20  # bytes read from the file at a time, instead of whole column chunks


@contextmanager
def opened(path: Path) -> Iterator[pq.ParquetFile]:
    """A shard's file.

    Raises:
        UserError: parquet cannot read it.
    """
    try:
        with pq.ParquetFile(path, pre_buffer=False, buffer_size=BUFFER_SIZE) as file:
            yield file
    except (pa.ArrowException, OSError, ValueError) as error:  # ValueError: more or fewer pixels than its lists say
        reason = str(error).splitlines()[0][:160]
        raise UserError(f"{path} is truncated or damaged ({reason}); delete it and make or download it again") from None


def n_bins_of(path: Path, file: pq.ParquetFile) -> int:
    """Tomographic bins of the first tile of a shard.

    Raises:
        UserError: kappa is not there or of another type, or there is no first tile.
    """
    schema = file.schema_arrow
    kappa = inner = schema.field("kappa").type if "kappa" in schema.names else pa.null()
    depth = 0
    while isinstance(inner, (pa.ListType, pa.LargeListType, pa.FixedSizeListType)):
        inner, depth = inner.value_type, depth + 1
    if depth != 3 or inner not in (pa.float32(), pa.float64()):
        raise UserError(f"{path}: kappa has type {kappa}, not three nested lists of float or double; rebuild the shard")
    first = next(file.iter_batches(1, columns=["kappa"]), None)
    n_bins = None if first is None else pc.list_value_length(first.column(0))[0].as_py()
    if not n_bins:
        raise UserError(f"{path}, row 0: kappa is empty; rebuild the shard")
    return int(n_bins)


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
            if not (finite := np.isfinite(tiles).all(axis=(1, 2, 3))).all():
                row += int(np.argmin(finite))
                raise UserError(f"{path}, row {row}: kappa has empty, NaN or infinite pixels; rebuild the shard")
            yield tiles
            row += len(batch)


def _flat_pixels(array: pa.Array, shape: tuple[int, ...], lmax: int, path: Path, first_row: int) -> np.ndarray:
    """The pixels of a batch of tiles as one flat array (empty ones are NaN), every list having the right length."""
    lists_per_tile = 1
    for size in shape:
        lengths = pc.list_value_length(array).to_numpy(zero_copy_only=False)  # NaN where there is no list
        if (wrong := lengths != size).any():
            i = int(np.argmax(wrong))
            where = f"{path}, row {first_row + i // lists_per_tile}: kappa is"
            if np.isnan(lengths[i]):
                raise UserError(f"{where} empty; rebuild the shard")
            raise UserError(
                f"{where} not {shape}, the shape for lmax {lmax} (a list has length {lengths[i]:.0f}, not {size}); "
                "change --lmax, --nside or --tiles-dir"
            )
        array = array.flatten()
        lists_per_tile *= size
    return array.to_numpy(zero_copy_only=False)
