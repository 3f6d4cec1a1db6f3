"""Reading tiles: two layouts, any cut into shards, bounded memory, and every refusal."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import ROOT, SHARED_DATA, make_tiles, write_tiles

from common.errors import UserError
from data.read_shards import read_tiles
from data.schema import KEY_NAMES, PARAM_NAMES, nside_of
from data.single_tiles import read_single_tiles
from data.split import make_manifest
from data.write_shards import open_shard

LMAX, NSIDE = 16, 8


def published_table(kappa: np.ndarray, keys: np.ndarray, params: np.ndarray, noise_level: str) -> pa.Table:
    """The published layout: variable lists of doubles."""
    column, n = pa.array(kappa.astype(np.float64).reshape(-1)), kappa.size
    for size in kappa.shape[:0:-1]:
        n //= size
        column = pa.ListArray.from_arrays(pa.array(np.arange(n + 1, dtype=np.int32) * size), column)
    labels = {name: keys[:, k] for k, name in enumerate(KEY_NAMES)} | {
        name: params[:, k] for k, name in enumerate(PARAM_NAMES)
    }
    return pa.table({"kappa": column, **labels, "noise_level": [noise_level] * len(keys)})


@pytest.mark.parametrize("n_bins", [1, 4, 6])
def test_published_and_compact_layouts_give_bit_equal_tiles(tmp_path: Path, n_bins: int) -> None:
    tiles = make_tiles(6, NSIDE, LMAX, n_bins=n_bins)
    write_tiles(tmp_path / "compact", tiles, 30)
    (tmp_path / "published").mkdir()
    pq.write_table(
        published_table(tiles.kappa, tiles.keys, tiles.params, "des_y3"),
        tmp_path / "published" / "shard_0000.parquet",
        compression="snappy",
        row_group_size=17,
    )
    ours, theirs = (read_tiles(tmp_path / name, LMAX, "des_y3") for name in ("compact", "published"))
    assert np.array_equal(ours.kappa.view(np.uint32), theirs.kappa.view(np.uint32))
    assert np.array_equal(ours.keys, theirs.keys)
    assert np.array_equal(ours.params.view(np.uint64), theirs.params.view(np.uint64))
    order = np.lexsort(tiles.keys.T[::-1])
    assert np.array_equal(ours.kappa, tiles.kappa[order])


def test_shards_written_by_the_datasets_library_are_read() -> None:
    folder = SHARED_DATA / "published_layout" / "lmax_32_des_y3"
    if not folder.exists():
        pytest.skip("needs the sample of the published layout in ../shared/data")
    tiles = read_tiles(folder, 32, "des_y3")
    assert sorted(set(tiles.keys[:, 0])) == [107, 108, 109, 110, 111]
    for i, key in enumerate(tiles.keys):  # an independent way: row by row through Python objects
        for path in sorted(folder.glob("*.parquet")):
            table = pq.read_table(path)
            here = np.stack([table[name].to_numpy() for name in KEY_NAMES], axis=1)
            for row in np.flatnonzero((here == key).all(axis=1)):
                kappa = np.array(table["kappa"][int(row)].as_py())
                assert np.array_equal(tiles.kappa[i], kappa)
                assert tiles.params[i, 2] == table["S8"][int(row)].as_py()


def test_our_shards_open_in_the_datasets_library(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    tiles = make_tiles(3, NSIDE, LMAX)
    write_tiles(tmp_path, tiles, 40)
    loaded = datasets.Dataset.from_parquet(str(tmp_path / "shard_0000.parquet"), cache_dir=str(tmp_path / "cache"))
    row = loaded.with_format("numpy")[7]
    assert row["kappa"].dtype == np.float32
    assert np.array_equal(row["kappa"], tiles.kappa[7])
    assert [int(row[name]) for name in KEY_NAMES] == tiles.keys[7].tolist()


def test_the_cut_into_shards_and_the_order_of_rows_change_nothing(tmp_path: Path) -> None:
    tiles = make_tiles(9, NSIDE, LMAX)
    shuffled = np.random.default_rng(1).permutation(len(tiles.keys))
    mixed = replace(tiles, kappa=tiles.kappa[shuffled], keys=tiles.keys[shuffled], params=tiles.params[shuffled])
    write_tiles(tmp_path / "a", tiles, 1000)
    write_tiles(tmp_path / "b", mixed, 13)
    a, b = (read_tiles(tmp_path / name, LMAX, "des_y3") for name in "ab")
    assert np.array_equal(a.kappa, b.kappa)
    manifests = [make_manifest(tiles, 42, "tile", 109) for tiles in (a, b)]
    assert manifests[0] == manifests[1]


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak memory from /proc")
@pytest.mark.parametrize("layout", ["compact", "published"])
def test_peak_memory_stays_within_1_3_of_the_array(tmp_path: Path, layout: str) -> None:
    nside, lmax = 128, 200
    tiles = make_tiles(200, 8, lmax)
    n = len(tiles.keys)
    array_mb = n * 4 * nside**2 * 4 / 2**20  # 600 MB: the interpreter's own memory is measured and taken off
    kappa = np.random.default_rng(0).standard_normal((120, 4, nside, nside)).astype(np.float32)
    path = tmp_path / "shard_0000.parquet"  # one file: what is read ahead of it would double the memory
    with contextlib.ExitStack() as open_files:
        writer = None if layout == "published" else open_files.enter_context(open_shard(path, {}))
        for start in range(0, n, 120):
            keys, params = tiles.keys[start : start + 120], tiles.params[start : start + 120]
            if layout == "compact":
                writer.write(kappa, keys, params, "des_y3")
                continue
            table = published_table(kappa, keys, params, "des_y3")
            writer = writer or open_files.enter_context(pq.ParquetWriter(path, table.schema, compression="snappy"))
            writer.write_table(table)
    # VmHWM and not ru_maxrss, which a new process takes over from the one that started it.
    code = (
        "from pathlib import Path\nfrom data.read_shards import read_tiles\n"
        "peak = lambda: int(Path('/proc/self/status').read_text().split('VmHWM:')[1].split()[0]) / 1024\n"
        f"before = peak(); tiles = read_tiles(Path({str(tmp_path)!r}), {lmax}, 'des_y3'); print(peak() - before)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert array_mb <= float(done.stdout) <= 1.3 * array_mb


# ---------------------------------------------------------------- refusals

Rewrite = Callable[[pa.Table], pa.Table]


def _set(name: str, row: int, value: object) -> Rewrite:
    def rewrite(table: pa.Table) -> pa.Table:
        values = table[name].to_pylist()
        values[row] = value
        return table.set_column(table.column_names.index(name), name, pa.array(values, table.schema.field(name).type))

    return rewrite


def _set_pixel(row: int, value: float) -> Rewrite:
    def rewrite(table: pa.Table) -> pa.Table:
        kappa = table["kappa"].to_pylist()
        kappa[row][2][3][4] = value
        return table.set_column(0, "kappa", pa.array(kappa, table.schema.field("kappa").type))

    return rewrite


def _shorten_row(row: int) -> Rewrite:
    def rewrite(table: pa.Table) -> pa.Table:
        kappa = table["kappa"].to_pylist()
        kappa[row][1][5] = kappa[row][1][5][:-1]
        return table.set_column(0, "kappa", pa.array(kappa, table.schema.field("kappa").type))

    return rewrite


def _retype(name: str, arrow_type: pa.DataType) -> Rewrite:
    return lambda table: table.set_column(table.column_names.index(name), name, table[name].cast(arrow_type))


# What is done to shard_0001 (rows 0..11 are simulation 2, 12..23 are 3), and what the line must name.
REFUSALS: dict[str, tuple[Rewrite, list[str]]] = {
    "missing column": (lambda t: t.drop_columns(["S8"]), ["shard_0001.parquet", "no column S8"]),
    "missing kappa": (lambda t: t.drop_columns(["kappa"]), ["shard_0001.parquet", "no column kappa"]),
    "text for a number": (_retype("h", pa.string()), ["shard_0001.parquet", "column h has type string"]),
    "kappa is text": (
        lambda t: t.set_column(0, "kappa", pa.array(["x"] * len(t))),
        ["shard_0001.parquet", "kappa has type"],
    ),
    "short row": (_shorten_row(5), ["shard_0001.parquet, row 5", "not (4, 8, 8)", "--lmax"]),
    "NaN": (_set_pixel(7, float("nan")), ["shard_0001.parquet, row 7", "NaN or infinite"]),
    "infinity": (_set_pixel(7, float("inf")), ["shard_0001.parquet, row 7", "NaN or infinite"]),
    "beyond float32": (_set_pixel(3, 1e39), ["shard_0001.parquet, row 3", "NaN or infinite"]),
    "empty pixel": (lambda t: _set_pixel(3, None)(t), ["shard_0001.parquet, row 3", "empty, NaN"]),  # type: ignore[arg-type]
    "empty tile": (_set("kappa", 4, None), ["shard_0001.parquet, row 4", "kappa is empty"]),
    "empty label": (_set("w", 4, None), ["shard_0001.parquet, row 4", "w is empty"]),
    "parameter NaN": (_set("w", 4, float("nan")), ["shard_0001.parquet, row 4", "w is empty, NaN or infinite"]),
    "other noise": (_set("noise_level", 9, "lsst_y10"), ["shard_0001.parquet, row 9", "'lsst_y10'", "--noise-level"]),
    "duplicate key": (_set("tile_id", 1, 0), ["shard_0001.parquet, row 1", "shard_0001.parquet, row 0", "already"]),
    "two cosmologies": (_set("h", 13, 0.123), ["shard_0001.parquet, row", "simulation 3", "another cosmology"]),
    "S8 disagrees": (_set("S8", 6, 0.5), ["shard_0001.parquet, row 6", "S8 = 0.50000", "sigma_8"]),
}


@pytest.fixture
def published_shards(tmp_path: Path) -> Path:
    tiles = make_tiles(6, NSIDE, LMAX)
    for number, sims in enumerate(([1], [2, 3], [4, 5, 109])):
        part = np.isin(tiles.keys[:, 0], sims)
        table = published_table(tiles.kappa[part], tiles.keys[part], tiles.params[part], "des_y3")
        pq.write_table(table, tmp_path / f"shard_{number:04d}.parquet")
    return tmp_path


def refused(run_command: Callable, folder: Path, *options: object) -> str:
    code, _, err = run_command(
        "run_compressor.py", "--tiles-dir", folder, "--results-dir", folder / "out", "--lmax", LMAX, *options
    )
    assert code == 2
    lines = [line for line in err.splitlines() if not line.startswith("reading tiles")]
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    assert not (folder / "out").exists()  # nothing half-written
    return lines[0]


@pytest.mark.parametrize("case", REFUSALS)
def test_a_bad_shard_is_refused_with_file_and_row(published_shards: Path, run_command: Callable, case: str) -> None:
    rewrite, named = REFUSALS[case]
    path = published_shards / "shard_0001.parquet"
    pq.write_table(rewrite(pq.read_table(path)), path)
    line = refused(run_command, published_shards)
    for text in named:
        assert text in line


def test_the_same_shards_without_the_fault_are_read(published_shards: Path) -> None:
    assert len(read_tiles(published_shards, LMAX, "des_y3").keys) == 72


def test_tiles_of_another_lmax_are_refused(published_shards: Path, run_command: Callable) -> None:
    assert nside_of(200) != NSIDE
    line = refused(run_command, published_shards, "--lmax", 200)
    assert "shard_0000.parquet, row 0" in line
    assert "(4, 128, 128)" in line


@pytest.mark.parametrize("layout", ["compact", "published"])
def test_a_folder_of_two_numbers_of_bins_is_refused(tmp_path: Path, layout: str) -> None:
    for number, n_bins in enumerate((4, 6)):
        tiles = make_tiles(6, NSIDE, LMAX, n_bins=n_bins)
        part = tiles.keys[:, 0] % 2 == number
        tiles = replace(tiles, kappa=tiles.kappa[part], keys=tiles.keys[part], params=tiles.params[part])
        path = tmp_path / f"shard_000{number}.parquet"
        if layout == "published":
            pq.write_table(published_table(tiles.kappa, tiles.keys, tiles.params, "des_y3"), path)
        else:
            with open_shard(path, {}) as shard:
                shard.write(tiles.kappa, tiles.keys, tiles.params, "des_y3")
    with pytest.raises(UserError, match=r"shard_0001.parquet has tiles of 6 bins, .*shard_0000.parquet of 4"):
        read_tiles(tmp_path, LMAX, "des_y3")


def test_a_shard_without_tiles_is_refused(published_shards: Path) -> None:
    path = published_shards / "shard_0001.parquet"
    pq.write_table(pq.read_table(path)[:0], path)
    with pytest.raises(UserError, match=r"shard_0001.parquet, row 0: kappa is empty"):
        read_tiles(published_shards, LMAX, "des_y3")


def test_a_duplicate_shard_is_refused(published_shards: Path, run_command: Callable) -> None:
    (published_shards / "shard_0007.parquet").write_bytes((published_shards / "shard_0001.parquet").read_bytes())
    line = refused(run_command, published_shards)
    assert "shard_0007.parquet, row 0" in line
    assert "shard_0001.parquet, row 0" in line


def test_no_shards_are_refused(tmp_path: Path, run_command: Callable) -> None:
    line = refused(run_command, tmp_path)
    assert f"no shard_*.parquet in {tmp_path}" in line
    assert "run_mock.py" in line


@pytest.mark.parametrize("share", [0.0, 0.5, 0.999])
def test_a_truncated_shard_is_refused(published_shards: Path, run_command: Callable, share: float) -> None:
    path = published_shards / "shard_0001.parquet"
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    line = refused(run_command, published_shards)
    assert "shard_0001.parquet" in line
    assert "truncated or damaged" in line


def test_single_tiles_need_the_network_s_bins_and_a_shard_that_is_what_was_written(tmp_path: Path) -> None:
    tiles = make_tiles(2, NSIDE, LMAX, n_bins=6)
    write_tiles(tmp_path, tiles, 100)
    shard, array = tmp_path / "shard_0000.parquet", tmp_path / "tiles.npy"
    np.save(array, tiles.kappa)
    for path in (shard, array):
        assert np.array_equal(read_single_tiles(path, LMAX, NSIDE, 6).kappa, tiles.kappa)
        with pytest.raises(UserError, match=r"--tiles .* (6 bins|float32 \(24, 6, 8, 8\)).* (4 bins|\(4, 8, 8\))"):
            read_single_tiles(path, LMAX, NSIDE, 4)
    content = bytearray(shard.read_bytes())
    content[len(content) // 3] ^= 1  # in the pixels
    shard.write_bytes(content)
    with pytest.raises(UserError, match=r"shard_0000.parquet is not what was written"):
        read_single_tiles(shard, LMAX, NSIDE, 6)


def test_a_flipped_bit_in_a_compact_shard_is_refused(tmp_path: Path) -> None:
    write_tiles(tmp_path, make_tiles(6, NSIDE, LMAX), 100)
    path = tmp_path / "shard_0000.parquet"
    content = bytearray(path.read_bytes())
    content[len(content) // 3] ^= 1  # in the pixels of the only row group
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"shard_0000.parquet is (not what was written|truncated or damaged)"):
        read_tiles(tmp_path, LMAX, "des_y3")
