"""The cache gives what the shards give, and never anything else."""

from __future__ import annotations

import os
import shutil
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import psutil
import pytest
from conftest import make_tiles, write_tiles

import data.cache
from common.errors import UserError
from data.cache import FOLDER, LABELS, PIXELS, map_pixels, read_tiles_through_cache
from data.moments import Moments, moments_of
from data.read_shards import TileIndex, read_tiles
from data.tiles import Tiles

LMAX, NSIDE, LEVEL = 32, 16, "des_y3"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_tiles(tmp_path, make_tiles(10, NSIDE, LMAX), rows_per_shard=50)
    return tmp_path


def through_cache(folder: Path) -> Tiles:
    return read_tiles_through_cache(folder, LMAX, LEVEL)[0]


def assert_same(one: Tiles, other: Tiles) -> None:
    assert np.array_equal(one.kappa, other.kappa)
    assert one.kappa.strides == other.kappa.strides
    assert np.array_equal(one.keys, other.keys)
    assert np.array_equal(one.params, other.params)
    assert (one.lmax, one.noise_level) == (other.lmax, other.noise_level)


def forbid(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    def fail(*_: object) -> None:
        raise AssertionError(f"{names} should not be needed")

    for name in names:
        monkeypatch.setattr(data.cache, name, fail)


def test_the_second_start_reads_the_cache_alone_and_gives_the_same(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from_shards = read_tiles(folder, LMAX, LEVEL)
    assert_same(through_cache(folder), from_shards)
    forbid(monkeypatch, "read_index", "sha256_of_file")
    tiles = through_cache(folder)
    assert_same(tiles, from_shards)
    with pytest.raises(ValueError, match="read-only"):
        tiles.kappa[:] = 0


@pytest.mark.parametrize("n_bins", [1, 6])
def test_the_cache_holds_as_many_bins_as_the_shards(n_bins: int, tmp_path: Path) -> None:
    write_tiles(tmp_path, make_tiles(10, NSIDE, LMAX, n_bins=n_bins), rows_per_shard=50)
    from_shards = read_tiles(tmp_path, LMAX, LEVEL)
    for _ in range(2):  # as it is made, and as it is read
        tiles, moments = read_tiles_through_cache(tmp_path, LMAX, LEVEL)
        assert_same(tiles, from_shards)
        assert np.array_equal(moments.variance, moments_of(tiles.kappa).variance)


def test_more_tiles_than_memory_and_swap_hold_can_be_mapped(tmp_path: Path) -> None:
    nside, path = 512, tmp_path / PIXELS
    tile_size = 4 * nside**2 * 4
    n_tiles = 2 * (psutil.virtual_memory().total + psutil.swap_memory().total) // tile_size
    last = np.random.default_rng(0).standard_normal(3, dtype=np.float32)
    with open(path, "wb") as file:  # sparse: it takes no room
        file.seek(n_tiles * tile_size - last.nbytes)
        file.write(last.tobytes())
    kappa = map_pixels(path, n_tiles, 4, nside)
    assert np.array_equal(kappa[-1, 1:, -1, -1], last)
    assert not kappa[0].any()


def test_a_changed_shard_is_noticed_even_with_its_size_and_time_set_back(folder: Path) -> None:
    through_cache(folder)
    before = {path: path.stat() for path in folder.glob("shard_*.parquet")}
    other = make_tiles(10, NSIDE, LMAX, seed=1)
    old = make_tiles(10, NSIDE, LMAX)
    write_tiles(folder, Tiles(other.kappa, old.keys, old.params, LMAX, LEVEL), rows_per_shard=50)
    for path, stat in before.items():
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
        assert path.stat().st_size == stat.st_size
    for _ in range(2):  # it stays so
        with pytest.raises(UserError, match=r"shard_0000.parquet is not what it was when it was first read"):
            through_cache(folder)
    shutil.rmtree(folder / FOLDER)  # the cure that it names
    assert np.array_equal(through_cache(folder).kappa, other.kappa)


def test_shards_that_were_only_touched_or_copied_are_not_decoded_again(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = through_cache(folder)
    for path in folder.glob("shard_*.parquet"):
        content = path.read_bytes()
        path.unlink()
        path.write_bytes(content)
    with monkeypatch.context() as patched:
        forbid(patched, "read_index")
        assert_same(through_cache(folder), first)
        forbid(patched, "read_index", "sha256_of_file")
        assert_same(through_cache(folder), first)  # and the new times are remembered


def test_a_shard_more_or_less_is_noticed(folder: Path) -> None:
    assert len(through_cache(folder).keys) == 120
    (folder / "shard_0002.parquet").unlink()
    assert len(through_cache(folder).keys) == 100
    with pytest.raises(UserError, match="--lmax"):  # other options are asked of the shards, not of the cache
        read_tiles_through_cache(folder, 64, LEVEL)
    with pytest.raises(UserError, match="noise level"):
        read_tiles_through_cache(folder, LMAX, "lsst_y10")


@pytest.mark.parametrize("name", [PIXELS, LABELS])
@pytest.mark.parametrize("damage", ["missing", "short", "garbage", "a bit flipped"])
def test_a_damaged_cache_is_made_again(folder: Path, name: str, damage: str) -> None:
    first = through_cache(folder)
    path = folder / FOLDER / name
    content = path.read_bytes()
    path.unlink()
    if damage == "short":
        path.write_bytes(content[: len(content) // 2])
    elif damage == "garbage":
        path.write_bytes(b"no" * 40)
    elif damage == "a bit flipped":
        path.write_bytes(content[:5000] + bytes([content[5000] ^ 1]) + content[5001:])
    assert_same(through_cache(folder), first)
    assert path.read_bytes() == content or name == LABELS


def test_an_interrupted_writing_leaves_no_cache_and_a_full_disk_is_no_failure(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    first = through_cache(folder)
    write_tiles(folder, make_tiles(12, NSIDE, LMAX), rows_per_shard=60)
    shutil.rmtree(folder / FOLDER)
    with monkeypatch.context() as patched:

        def full(*_: object) -> None:
            raise OSError(28, "No space left on device")

        patched.setattr(data.cache, "_write_labels", full)  # after the pixels are there
        changed = through_cache(folder)
    assert "No space left" in capsys.readouterr().err
    assert len(changed.keys) > len(first.keys)
    assert not (folder / FOLDER / LABELS).exists()
    assert_same(through_cache(folder), read_tiles(folder, LMAX, LEVEL))


def test_several_at_once_make_it_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected, decoded, original = read_tiles(folder, LMAX, LEVEL), [], data.cache.read_pixels
    together = threading.Barrier(3)

    def slowly(index: TileIndex, put: Callable[[np.ndarray, np.ndarray], None]) -> tuple[np.ndarray, Moments]:
        decoded.append(threading.get_ident())
        time.sleep(0.3)
        return original(index, put)

    def start(_: int) -> Tiles:
        together.wait()
        return through_cache(folder)

    monkeypatch.setattr(data.cache, "read_pixels", slowly)
    with ThreadPoolExecutor(3) as pool:
        for tiles in pool.map(start, range(3)):
            assert_same(tiles, expected)
    assert len(decoded) == 1
