"""Tiles of another lmax with as many pixels are refused by what they state, or betrayed by their power."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import SMALL_LMAX, make_tiles, simulated, write_tiles

from common.errors import UserError
from data.audit import audit_tiles
from data.band_limit import band_limit_problem
from data.cache import read_tiles_through_cache
from data.config import NoiseLevel
from data.mock.config import MockConfig
from data.mock.suite import build_suite
from data.moments import moments_of
from data.read_shards import read_tiles
from data.schema import PARAM_NAMES, nside_of, tile_keys
from data.single_tiles import read_single_tiles
from data.tiles import Tiles

OTHER_LMAX = 24  # 16 x 16 pixels as well


def test_every_folder_that_a_training_reads_is_compared_with_lmax(
    small_suite: Path, tmp_path: Path, run_command: Callable
) -> None:
    shutil.copytree(small_suite / "tiles", tmp_path / "tiles")
    tiles = tmp_path / "tiles" / f"lmax_{SMALL_LMAX}_noiseless"
    stage_1 = ["--results-dir", tmp_path, "--noise-level", "noiseless", "--backbone", "tiny", "--max-epochs", 1]
    stage_1 += ["--batch-size", 200, "--tag", "t"]
    code, _, err = run_command("run_compressor.py", *stage_1, "--lmax", OTHER_LMAX, "--tiles-dir", tiles)
    assert code == 2
    assert f"shard_0000.parquet holds tiles of lmax {SMALL_LMAX}, not {OTHER_LMAX}" in err

    others = {"lmax": OTHER_LMAX, "results_dir": str(tmp_path), "n_sims": 60, "noise_level": "noiseless"}
    other = build_suite(MockConfig(**others))["folder"]
    code, _, err = run_command("run_compressor.py", *stage_1, "--lmax", SMALL_LMAX, "--noiseless-tiles", other)
    assert code == 2
    assert f"holds tiles of lmax {OTHER_LMAX}" in err
    assert run_command("run_compressor.py", *stage_1, "--lmax", SMALL_LMAX)[0] == 0
    fresh = build_suite(MockConfig(**others, fresh=True))["folder"]
    ckpt = tmp_path / "field_compressor_runs" / "t" / "best.ckpt"
    code, _, err = run_command("run_npe.py", "--ckpt", ckpt, "--max-epochs", 1, "--calibration-tiles", fresh)
    assert code == 2
    assert f"holds tiles of lmax {OTHER_LMAX}" in err
    with pytest.raises(UserError, match=f"holds tiles of lmax {OTHER_LMAX}"):
        read_single_tiles(Path(fresh, "shard_0000.parquet"), SMALL_LMAX, nside_of(SMALL_LMAX), 4)


def test_published_shards_are_compared_by_the_name_of_their_folder(tmp_path: Path) -> None:
    tiles = make_tiles(10, 16, OTHER_LMAX)
    folder = tmp_path / f"lmax_{OTHER_LMAX}_des_y3"
    write_tiles(folder, tiles, rows_per_shard=60)
    with pytest.raises(UserError, match=f"des_y3 holds tiles of lmax {OTHER_LMAX}, not 32"):
        read_tiles(folder, 32, "des_y3")
    assert len(read_tiles(folder, OTHER_LMAX, "des_y3").keys) == 120
    linked = tmp_path / "lmax_20_des_y3"
    linked.mkdir()  # as the hub's own cache lays files out
    for shard in folder.glob("*.parquet"):
        (linked / shard.name).symlink_to(shard)
    with pytest.raises(UserError, match="des_y3 holds tiles of lmax 20, not 32"):
        read_tiles(linked, 32, "des_y3")
    read_tiles_through_cache(folder, OTHER_LMAX, "des_y3")
    folder.rename(tmp_path / "lmax_32_des_y3")
    with pytest.raises(UserError, match="holds tiles of lmax 32"):
        read_tiles_through_cache(tmp_path / "lmax_32_des_y3", OTHER_LMAX, "des_y3")
    (tmp_path / "lmax_32_des_y3").rename(tmp_path / "mine")
    assert len(read_tiles(tmp_path / "mine", OTHER_LMAX, "des_y3").keys) == 120


@pytest.mark.parametrize("lmax", [64, 100, 200, 400])
@pytest.mark.parametrize("noise_level", ["noiseless", "des_y3"])
@pytest.mark.parametrize("geometry", ["disjoint", "published"])
def test_power_betrays_an_lmax_that_is_off_by_a_quarter(lmax: int, noise_level: NoiseLevel, geometry: str) -> None:
    """800 and 1000, which share N, differ by that much; 400 and 600 by more."""
    kappa = simulated(lmax, noise_level, geometry)
    assert band_limit_problem(kappa, lmax) == ""
    kappa[5, 2] = 1.0  # one odd tile does not blind it
    if lmax > 64:  # at 64 the bands of smaller ones are too narrow
        assert "beyond lmax" in band_limit_problem(kappa, round(0.8 * lmax))
    assert "just below lmax" in band_limit_problem(kappa, round(1.25 * lmax))


def test_the_audit_warns_of_it_and_of_nothing_where_it_fits() -> None:
    kappa = simulated(100, "des_y3")
    keys = np.concatenate([tile_keys(1), tile_keys(109)])
    params = np.repeat([[0.3, 0.8, 0.8, -1, 0.7, 0.96, 0.05, 0.06]], len(keys), axis=0)
    assert params.shape[1] == len(PARAM_NAMES)
    splits = {"compressor_train": np.arange(12), "npe_train": np.arange(12, 24)}
    for lmax, warned in ((100, False), (128, True)):
        tiles = Tiles(kappa, keys, params, lmax, "des_y3")
        warnings = audit_tiles(tiles, moments_of(kappa), splits, 109, None).warnings()
        assert any("not what --lmax says" in line for line in warnings) == warned
