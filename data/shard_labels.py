"""Everything in a shard but its pixels: keys, noise level and cosmology of every tile, checked."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from common.errors import UserError
from data.schema import KEY_NAMES, PARAM_NAMES, columns_of, name_of_tile, s8_of
from data.shard_metadata import CONTENT_KEY, INGEST_KEY, METADATA_KEY, check_lmax, content_sha256
from data.shard_pixels import n_bins_of, opened

S8_TOLERANCE = 1e-4  # relative; S8 is derived from two columns of the same table


@dataclass(frozen=True)
class ShardLabels:
    """The labels of one shard, in the order of its rows.

    Attributes:
        keys, params, noise_level: as in Tiles.
        n_bins: tomographic bins of its tiles.
        content: the hash of its rows that it carries; empty for published ones.
    """

    path: Path
    keys: np.ndarray
    params: np.ndarray
    noise_level: str
    n_bins: int
    content: str

    def check(self, digests: np.ndarray) -> None:
        """Compare the shard, whose tiles have these digests, with the hash that it carries.

        Raises:
            UserError: it is not what was written.
        """
        found = content_sha256(digests, self.keys, self.params, self.noise_level)
        if self.content not in ("", found):
            raise UserError(f"{self.path} is not what was written (its hash does not fit); make or download it again")


def read_labels(path: Path, lmax: int, noise_level: str = "") -> ShardLabels:
    """Read the labels of one shard, and check them row by row.

    Args:
        path: of the shard.
        lmax: that its tiles must have.
        noise_level: that they must have; empty if any will do.

    Raises:
        UserError: a missing column, another type, an empty or infinite value, another lmax or noise level, no hash.
    """
    with opened(path) as file:
        columns = [*KEY_NAMES, "noise_level", *PARAM_NAMES]
        if missing := [name for name in ("kappa", *columns) if name not in file.schema_arrow.names]:
            raise UserError(f"{path} has no column {', '.join(missing)}; it is not a shard of tiles, move it elsewhere")
        n_bins = n_bins_of(path, file)
        table = file.read(columns)
        metadata = {key.decode(errors="replace"): value for key, value in (file.metadata.metadata or {}).items()}
    if {METADATA_KEY, INGEST_KEY} & metadata.keys() and CONTENT_KEY not in metadata:
        raise UserError(f"{path} was made here but carries no hash of its rows; make it again (--restart)")
    check_lmax(path, lmax)
    for field, column in zip(table.schema, table.columns, strict=True):
        if not _fits(field.name, field.type):
            raise UserError(f"{path}: column {field.name} has type {field.type}; rebuild the shard (docs/data.md)")
        if column.null_count:
            row = int(np.argmax(column.is_null()))
            raise UserError(f"{path}, row {row}: {field.name} is empty; rebuild the shard")
    levels = table["noise_level"].to_numpy()
    noise_level = noise_level or levels[0]
    if (wrong := levels != noise_level).any():
        row = int(np.argmax(wrong))
        raise UserError(
            f"{path}, row {row}: noise level {levels[row]!r}, not {noise_level!r}; change --noise-level or --tiles-dir"
        )
    keys = np.stack([table[name].to_numpy() for name in KEY_NAMES], axis=1).astype(np.int64)  # (n, 3)
    params = np.stack([table[name].to_numpy() for name in PARAM_NAMES], axis=1).astype(np.float64)  # (n, 8)
    if not (finite := np.isfinite(params)).all():
        row, column = np.argwhere(~finite)[0]
        raise UserError(f"{path}, row {row}: {PARAM_NAMES[column]} is not finite; rebuild the shard")
    content = metadata.get(CONTENT_KEY, b"").decode(errors="replace")
    return ShardLabels(path, keys, params, noise_level, n_bins, content)


def _fits(name: str, arrow_type: pa.DataType) -> bool:
    if name in KEY_NAMES:
        return pa.types.is_integer(arrow_type)
    if name in PARAM_NAMES:
        return pa.types.is_floating(arrow_type)
    return pa.types.is_string(arrow_type) or pa.types.is_large_string(arrow_type)


def joined(shards: list[ShardLabels]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Keys (n, 3) and params (n, 8) of all shards of a folder, and the canonical order of the tiles (n,).

    Raises:
        UserError: shards of other bins, a tile twice, two cosmologies of one simulation, or an S8 that is not theirs.
    """
    for shard in shards:
        if shard.n_bins != shards[0].n_bins:
            raise UserError(
                f"{shard.path} has tiles of {shard.n_bins} bins, {shards[0].path} of {shards[0].n_bins}; the folder "
                "mixes two suites, separate them"
            )
    keys, params = (np.concatenate([getattr(shard, name) for shard in shards]) for name in ("keys", "params"))
    places = [f"{shard.path}, row {row}" for shard in shards for row in range(len(shard.keys))]
    omega_m, sigma_8, given = columns_of(params, ("Omega_m", "sigma_8", "S8")).T
    s8 = s8_of(sigma_8, omega_m)
    if (wrong := ~(np.abs(given - s8) <= S8_TOLERANCE * np.abs(s8))).any():
        i = int(np.argmax(wrong))
        raise UserError(
            f"{places[i]}: S8 = {given[i]:.5f}, but sigma_8 (Omega_m/0.3)^0.5 = {s8[i]:.5f}; "
            "rebuild the shard from a consistent table"
        )
    order = np.lexsort(keys.T[::-1])
    first, second = order[:-1], order[1:]
    if (same := (keys[first] == keys[second]).all(axis=1)).any():
        i = int(np.argmax(same))
        raise UserError(
            f"{places[second[i]]}: {name_of_tile(keys[first[i]])} is in {places[first[i]]} already; remove one of the "
            "two shards"
        )
    if (clash := (keys[first, 0] == keys[second, 0]) & (params[first] != params[second]).any(axis=1)).any():
        i = int(np.argmax(clash))
        raise UserError(
            f"{places[second[i]]}: simulation {keys[first[i], 0]} has another cosmology than in {places[first[i]]}; "
            "the folder mixes two suites, separate them"
        )
    return keys, params, order
