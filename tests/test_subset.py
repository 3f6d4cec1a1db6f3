"""--n-sims: a subset of a suite is worth what a suite of these simulations is, in both stages."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import SMALL_LMAX, SMALL_SUITE, write_tiles

from common.artifacts import tiles_folder
from data.dataset import TileDataset
from data.mock.config import MockConfig
from data.mock.suite import build_suite
from data.read_shards import read_tiles
from data.schema import tile_keys
from data.split import read_manifest, subset_of
from data.tiles import Tiles

LEVEL, N_SIMS = "des_y3", 20
STAGE_1 = ["--lmax", SMALL_LMAX, "--noise-level", LEVEL, "--backbone", "tiny", "--max-epochs", 2, "--batch-size", 64]
STAGE_1 += ["--warmup-steps", 5, "--device", "cpu", "--tag", "run"]
STAGE_2 = ["--max-epochs", 3, "--n-members", 2, "--device", "cpu"]


@pytest.fixture(scope="module")
def suites(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Results folders: `whole` has a suite with and without noise, `part` only the subset's simulations of both."""
    folders = {name: tmp_path_factory.mktemp(name) for name in ("whole", "part")}
    for level in (LEVEL, "noiseless"):
        folder = build_suite(MockConfig(results_dir=str(folders["whole"]), **{**SMALL_SUITE, "noise_level": level}))
        tiles = read_tiles(Path(folder["folder"]), SMALL_LMAX, level)
        rows = np.isin(tiles.keys[:, 0], subset_of(tiles.keys[:, 0], N_SIMS, 42, 109))
        part = Tiles(tiles.kappa[rows], tiles.keys[rows], tiles.params[rows], SMALL_LMAX, level)
        write_tiles(tiles_folder("", folders["part"], SMALL_LMAX, level), part, 600)
    return folders


def result_of(results: Path, stage: str, name: str, tag: str = "run") -> dict[str, Any]:
    return json.loads((results / f"field_{stage}_runs" / tag / name).read_text())


def test_both_stages_are_to_the_bit_those_of_a_suite_of_the_subset(
    suites: dict[str, Path], run_command: Callable
) -> None:
    found = []
    for results, subset in ((suites["whole"], ["--n-sims", N_SIMS]), (suites["part"], [])):
        noiseless = ["--noiseless-tiles", tiles_folder("", results, SMALL_LMAX, "noiseless")]
        code, _, err = run_command("run_compressor.py", "--results-dir", results, *STAGE_1, *noiseless, *subset)
        assert code == 0, err
        run = results / "field_compressor_runs" / "run"
        code, _, err = run_command("run_npe.py", "--ckpt", run / "best.ckpt", *STAGE_2)
        assert code == 0, err
        stage_1, stage_2 = result_of(results, "compressor", "result.json"), result_of(results, "npe", "fom_result.json")
        names = ("train_mse", "val_mse", "test_mse", "n_tiles")
        figures = [stage_1[name] for name in names]
        figures += [stage_1["audit"]["ranges"], stage_1["audit"]["fiducial"]["outside"]]
        figures += [stage_2[name] for name in ("fom_fiducial_all", "ensemble", "npe", "augmentation_shift_in_sigma")]
        assert stage_1["audit"]["leakage"].keys() == stage_2["audit"]["leakage"].keys()
        with np.load(results / "field_npe_runs" / "run" / "reference.npz") as reference:
            found.append([*figures, json.loads((run / "norm_stats.json").read_text()), reference["spectra"].tolist()])
    assert found[0] == found[1]
    assert found[0][3] == {"train": 159, "val": 57, "test": 12, "fiducial": 12}


def test_stage_2_alone_learns_from_its_subset_and_more_than_all_is_refused(
    suites: dict[str, Path], run_command: Callable
) -> None:
    results = suites["whole"]
    assert run_command("run_compressor.py", "--results-dir", results, *STAGE_1, "--tag", "all")[0] == 0
    run = results / "field_compressor_runs" / "all"

    def stage_2(tag: str, *options: object) -> tuple[int, str]:
        code, _, err = run_command("run_npe.py", "--ckpt", run / "best.ckpt", *STAGE_2, *options, "--tag", tag)
        return code, err

    assert stage_2("all")[0] == stage_2("sixty", "--n-sims", 60)[0] == stage_2("some", "--n-sims", N_SIMS)[0] == 0
    everything, sixty, some = (result_of(results, "npe", "fom_result.json", tag) for tag in ("all", "sixty", "some"))
    for name in ("fom_fiducial_all", "npe", "ensemble", "calibration"):
        assert everything[name] == sixty[name]
    assert some["fom_fiducial_all"] != everything["fom_fiducial_all"]
    manifest = read_manifest(run)
    chosen = subset_of(manifest.sim_ids, N_SIMS, manifest.seed, manifest.fiducial_sim_id).tolist()
    n_tiles = {name: sum(key[0] in chosen for key in keys) for name, keys in manifest.splits.items()}
    assert (some["npe"]["n_train_tiles"], some["npe"]["n_test_tiles"]) == (n_tiles["npe_train"], n_tiles["test"])
    assert some["manifest_sha256"] == everything["manifest_sha256"] == manifest.sha256
    with np.load(results / "field_npe_runs" / "some" / "reference.npz") as reference:
        assert set(reference["sim_id"].tolist()) <= set(chosen)
    tile = results / "tile.npy"
    tiles = read_tiles(tiles_folder("", results, SMALL_LMAX, LEVEL), SMALL_LMAX, LEVEL)
    np.save(tile, tiles.kappa[0])
    assert run_command("run_predict.py", "--run", results / "field_npe_runs" / "some", "--tiles", tile)[0] == 0

    for n_sims, message in ((61, "--n-sims 61: there are 60 simulations"), (1, "--n-sims 1 leaves 0 tiles of the NPE")):
        code, err = stage_2("none", "--n-sims", n_sims)
        assert code == 2
        assert message in err
    assert not (results / "field_npe_runs" / "none").exists()


def test_stage_1_and_the_check_say_what_they_took(suites: dict[str, Path], run_command: Callable) -> None:
    tiles = ["--results-dir", suites["whole"], "--lmax", SMALL_LMAX, "--noise-level", LEVEL]
    code, out, _ = run_command("run_check.py", *tiles, "--n-sims", N_SIMS)
    assert code == 0
    assert "npe_train   of 57 tiles" in out
    for script in ("run_check.py", "run_compressor.py"):
        code, _, err = run_command(script, *tiles, "--n-sims", 61)
        assert code == 2
        assert err.splitlines()[-1].startswith("error: --n-sims 61: there are 60 simulations")


def test_a_split_of_one_tile_knows_its_simulation() -> None:
    one = TileDataset(
        torch.zeros(12, 1, 4, 4), torch.zeros(12, 2), np.array([5]), torch.device("cpu"), None, tile_keys(7)
    )
    assert one.sim_ids.tolist() == [7]
    assert (len(one.of_sims(np.array([7]))), len(one.of_sims(np.array([8])))) == (1, 0)
