"""Shards that somebody has tampered with: read to equal arrays, or refused in one line. `python tests/fuzz.py 1000`.

Prints how many files were tried, refused and accepted as equal, the longest time and the largest memory of a reading.
Our own shards are read as they come; published ones, which carry no hash, have been read once before.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from conftest import make_tiles, write_tiles

from common.errors import UserError
from data.cache import FOLDER, read_tiles_through_cache
from data.schema import KEY_NAMES, PARAM_NAMES
from data.shard_metadata import CONTENT_KEY, METADATA_KEY
from data.tiles import Tiles

LMAX, NSIDE, LEVEL, ROWS = 64, 32, "des_y3", 60
LABELS = [*KEY_NAMES, *PARAM_NAMES]
Rng = np.random.Generator


# ------------------------------------------------- bytes


def flip_bits(content: bytes, rng: Rng) -> bytes:
    out = bytearray(content)
    for _ in range(rng.integers(1, 9)):
        out[rng.integers(len(out))] ^= 1 << int(rng.integers(8))
    return bytes(out)


def flip_in_footer(content: bytes, rng: Rng) -> bytes:
    """Where parquet says what lies where."""
    out, size = bytearray(content), int.from_bytes(content[-8:-4], "little")
    for _ in range(rng.integers(1, 5)):
        out[len(out) - 1 - int(rng.integers(size + 8))] ^= 1 << int(rng.integers(8))
    return bytes(out)


def truncate(content: bytes, rng: Rng) -> bytes:
    return content[: int(rng.integers(len(content)))]


def zero_a_block(content: bytes, rng: Rng) -> bytes:
    start, size = int(rng.integers(len(content))), int(rng.integers(1, 5000))
    return content[:start] + bytes(len(content[start : start + size])) + content[start + size :]


def append(content: bytes, rng: Rng) -> bytes:
    return content + rng.bytes(int(rng.integers(1, 100)))


# ------------------------------------------------- tables, written anew, so that every checksum of parquet fits


def drop_column(table: pa.Table, rng: Rng) -> pa.Table:
    return table.drop_columns([str(rng.choice(table.column_names))])


def rename_column(table: pa.Table, rng: Rng) -> pa.Table:
    names = list(table.column_names)
    names[rng.integers(len(names))] = str(rng.choice(["x", "kappa", "sim_id", "S8"]))
    return table.rename_columns(names)


def retype(table: pa.Table, rng: Rng) -> pa.Table:
    name = str(rng.choice(LABELS))
    other = [pa.float32(), pa.float64(), pa.string(), pa.int32()][rng.integers(4)]
    column = pa.array([str(v) if other == pa.string() else v for v in table[name].to_pylist()])
    return table.set_column(table.column_names.index(name), name, column.cast(other, safe=False))


def retype_kappa(table: pa.Table, rng: Rng) -> pa.Table:
    other = [pa.float64(), pa.float16(), pa.int32(), pa.string()][rng.integers(4)]
    pixels = np.array(table["kappa"].to_pylist())
    nested = pa.array(pixels.astype(other.to_pandas_dtype() if other != pa.string() else str).tolist())
    return table.set_column(table.column_names.index("kappa"), "kappa", nested)


def duplicate_rows(table: pa.Table, rng: Rng) -> pa.Table:
    start = int(rng.integers(table.num_rows))
    return pa.concat_tables([table, table.slice(start, int(rng.integers(1, 20)))])


def drop_rows(table: pa.Table, rng: Rng) -> pa.Table:
    return table.take(np.flatnonzero(rng.random(table.num_rows) < 0.9))


def permute_rows(table: pa.Table, rng: Rng) -> pa.Table:
    return table.take(rng.permutation(table.num_rows))


def swap_label(table: pa.Table, rng: Rng) -> pa.Table:
    name, row = str(rng.choice(LABELS)), int(rng.integers(table.num_rows))
    values = table[name].to_pylist()
    values[row] = rng.choice([float("nan"), 1e300, -1.0, 0.0]) if name in PARAM_NAMES else rng.choice([-1, 2**62, 0])
    return table.set_column(
        table.column_names.index(name), table.schema.field(name), pa.array(values, table.schema.field(name).type)
    )


def swap_pixel(table: pa.Table, rng: Rng) -> pa.Table:
    pixels = np.array(table["kappa"].to_pylist())  # (n, 4, N, N)
    place = tuple(int(rng.integers(size)) for size in pixels.shape)
    pixels[place] = rng.choice([float("nan"), float("inf"), 1e30, -pixels[place], 0.0])
    field = table.schema.field("kappa")
    return table.set_column(table.column_names.index("kappa"), field, pa.array(pixels.tolist(), field.type))


def cut_tile(table: pa.Table, rng: Rng) -> pa.Table:
    pixels, row = table["kappa"].to_pylist(), int(rng.integers(table.num_rows))
    pixels[row] = [None, [], pixels[row][:3], [bin_[:-1] for bin_ in pixels[row]]][rng.integers(4)]
    nested = pa.list_(pa.list_(pa.list_(pa.float32())))
    return table.set_column(table.column_names.index("kappa"), "kappa", pa.array(pixels, nested))


def without_hash(table: pa.Table, rng: Rng) -> pa.Table:
    metadata = {k: v for k, v in (table.schema.metadata or {}).items() if k.decode() != CONTENT_KEY}
    return swap_pixel(table, rng).replace_schema_metadata(metadata)


OF_BYTES: list[Callable[[bytes, Rng], bytes]] = [flip_bits, flip_in_footer, truncate, zero_a_block, append]
OF_TABLES: list[Callable[[pa.Table, Rng], pa.Table]] = [
    drop_column, rename_column, retype, retype_kappa, duplicate_rows, drop_rows, permute_rows, swap_label, swap_pixel,
    cut_tile, without_hash,
]  # fmt: skip


def tampered(path: Path, rng: Rng) -> tuple[str, bytes]:
    """What was done to a shard, and its new content."""
    if rng.random() < 0.5:
        change = OF_BYTES[rng.integers(len(OF_BYTES))]
        return change.__name__, change(path.read_bytes(), rng)
    of_table = OF_TABLES[rng.integers(len(OF_TABLES))]
    table = pq.read_table(path)
    metadata = dict(table.schema.metadata or {}) | (pq.read_metadata(path).metadata or {})
    metadata = {k: v for k, v in metadata.items() if k != b"ARROW:schema"}
    changed = of_table(table.replace_schema_metadata(metadata), rng)
    sink = pa.BufferOutputStream()
    pq.write_table(changed, sink)
    return of_table.__name__, sink.getvalue().to_pybytes()


def make_published(tiles: Tiles, folder: Path) -> None:
    """Shards in the published layout: nested doubles, no metadata."""
    folder.mkdir()
    for number, start in enumerate(range(0, len(tiles.keys), ROWS)):
        rows = slice(start, start + ROWS)
        columns = {"kappa": tiles.kappa[rows].astype(np.float64).tolist()}
        columns |= {name: tiles.keys[rows, k] for k, name in enumerate(KEY_NAMES)}
        columns |= {"noise_level": [LEVEL] * len(tiles.keys[rows])}
        columns |= {name: tiles.params[rows, k] for k, name in enumerate(PARAM_NAMES)}
        pq.write_table(pa.table(columns), folder / f"shard_{number:04d}.parquet")


def peak_memory(reset: bool) -> int:
    """Peak resident bytes since the last reset (Linux; elsewhere 0)."""
    if not Path("/proc/self/clear_refs").exists():
        return 0
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) * 1024


def fuzz(n: int, seed: int) -> dict[str, float]:
    """Tamper with n shards, one at a time.

    Raises:
        AssertionError: one was read to other arrays; or whatever else than a UserError reading raised.
    """
    rng = np.random.default_rng(seed)
    tiles = make_tiles(10, NSIDE, LMAX, seed=3)
    found = {"tried": 0, "refused": 0, "equal": 0, "longest_s": 0.0, "extra_memory_mb": 0.0}
    with tempfile.TemporaryDirectory() as scratch:
        ours, published = Path(scratch) / "ours", Path(scratch) / "published"
        write_tiles(ours, tiles, ROWS, {METADATA_KEY: "{}"})
        make_published(tiles, published)
        read_tiles_through_cache(published, LMAX, LEVEL)
        before = peak_memory(reset=True)
        read_tiles_through_cache(ours, LMAX, LEVEL)
        usual = peak_memory(reset=False) - before
        shutil.rmtree(ours / FOLDER)
        for number in range(n):
            folder = ours if number % 2 else published
            path = folder / f"shard_000{rng.integers(2)}.parquet"
            original = path.read_bytes()
            what, content = tampered(path, rng)
            path.unlink()  # so that the file is another one, as it would be for a user
            path.write_bytes(content)
            print(f"{number} {folder.name} {what}", flush=True)
            before, start = peak_memory(reset=True), time.perf_counter()
            try:
                read, _ = read_tiles_through_cache(folder, LMAX, LEVEL)
            except UserError as error:
                refusal = str(error)
            else:
                refusal = ""
                names = ("kappa", "keys", "params")
                assert all(np.array_equal(getattr(read, name), getattr(tiles, name)) for name in names), what
            assert len(refusal.splitlines()) <= 1, refusal
            found["refused" if refusal else "equal"] += 1
            found["tried"] += 1
            found["longest_s"] = max(found["longest_s"], time.perf_counter() - start)
            extra = (peak_memory(reset=False) - before - usual) / 1e6
            found["extra_memory_mb"] = max(found["extra_memory_mb"], extra)
            path.write_bytes(original)
            shutil.rmtree(ours / FOLDER, ignore_errors=True)
    return found


if __name__ == "__main__":
    print(fuzz(int(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 0))
