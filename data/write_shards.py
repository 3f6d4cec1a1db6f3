"""Writing shards of tiles, in our own compact layout: kappa as fixed-size lists of float32."""

import os
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from common.artifacts import atomic_path
from data.schema import KEY_NAMES, PARAM_NAMES
from data.shard_metadata import CONTENT_KEY, content_sha256
from data.tiles import digests_of


class ShardWriter:
    """Writes one shard, a row group per call of `write`; the first tiles give the number of bins and pixels."""

    def __init__(self, file: Path, metadata: dict[str, str]) -> None:
        self.file, self.metadata = file, metadata
        self.rows: list[tuple[np.ndarray, ...]] = []
        self.nuisance_names: tuple[str, ...] = ()
        self.noise_level = ""
        self.writer: Any = None

    def write(
        self,
        kappa: np.ndarray,
        keys: np.ndarray,
        params: np.ndarray,
        noise_level: str,
        nuisances: dict[str, np.ndarray] | None = None,
    ) -> None:
        """Append tiles: kappa (n, bins, N, N), keys (n, 3), params (n, 8), nuisances (n,) each."""
        nuisances = nuisances or {}
        column = pa.array(np.ascontiguousarray(kappa, dtype=np.float32).reshape(-1))  # (n * bins * N * N,)
        for size in kappa.shape[:0:-1]:
            column = pa.FixedSizeListArray.from_arrays(column, size)  # innermost first: rows, bins, tiles
        columns = {"kappa": column, **dict(zip(KEY_NAMES, keys.astype(np.int64).T, strict=True))}
        columns |= {"noise_level": [noise_level] * len(keys)}
        columns |= dict(zip(PARAM_NAMES, params.astype(np.float64).T, strict=True)) | nuisances
        table = pa.table(columns, metadata=self.metadata)
        if self.writer is None:  # noise does not compress, and its values do not repeat
            self.writer = pq.ParquetWriter(
                self.file, table.schema, compression="none", use_dictionary=False, write_statistics=False
            )
        self.writer.write_table(table)
        self.rows.append((digests_of(kappa), keys, params, *nuisances.values()))
        self.noise_level, self.nuisance_names = noise_level, tuple(nuisances)

    def sync(self) -> None:
        """Have the disk take what was written so far: little is then left to do when all has to stop at once."""
        with open(self.file, "rb") as file:
            os.fsync(file.fileno())

    def seal(self) -> None:
        """Store the hash of everything that was written."""
        digests, keys, params, *values = (np.concatenate(parts) for parts in zip(*self.rows, strict=True))
        nuisances = dict(zip(self.nuisance_names, values, strict=True))
        content = content_sha256(digests, keys, params, self.noise_level, nuisances)
        self.writer.add_key_value_metadata({CONTENT_KEY: content})

    def close(self) -> None:
        """Write parquet's footer."""
        if self.writer is not None:
            self.writer.close()


@contextmanager
def open_shard(path: Path, metadata: dict[str, str]) -> Iterator[ShardWriter]:
    """A writer for one shard; the file appears under its name only when the block ends well."""
    with atomic_path(path) as temporary, closing(ShardWriter(temporary, metadata)) as shard:
        yield shard
        shard.seal()
