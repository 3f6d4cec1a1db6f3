"""--init-from: what a run takes over from another, and what it refuses."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import SMALL_LMAX, SMALL_SUITE, make_tiles, write_tiles

from common import interrupt
from common.errors import UserError
from compress.config import CompressorConfig
from compress.evaluate import predict
from compress.model import load_compressor
from compress.result import CompressorResult
from compress.stage import read_tiles, run_compressor
from data.mock.config import MockConfig
from data.mock.suite import build_suite
from data.norm_stats import read_norm_stats
from data.split import read_manifest

CPU = torch.device("cpu")
RunCommand = Callable[..., tuple[int, str, str]]


def config_of(results: Path, **more: object) -> CompressorConfig:
    options = {"lmax": SMALL_LMAX, "noise_level": "noiseless", "backbone": "spectra", "max_epochs": 30}
    options |= {
        "batch_size": 100,
        "learning_rate": 1e-3,
        "warmup_steps": 10,
        "device": "cpu",
        "results_dir": str(results),
    }
    return CompressorConfig(**(options | more))


@pytest.fixture(scope="module")
def cheap(tmp_path_factory: pytest.TempPathFactory) -> CompressorResult:
    """A run on Gaussian skies of other cosmologies, whose tiles have less variance in another bin."""
    results = tmp_path_factory.mktemp("cheap")
    build_suite(MockConfig(results_dir=str(results), field="gaussian", seed=7, **SMALL_SUITE))
    return run_compressor(config_of(results, tag="cheap"))


@pytest.fixture
def results(small_suite: Path, tmp_path: Path) -> Path:
    shutil.copytree(small_suite / "tiles", tmp_path / "tiles")
    return tmp_path


@pytest.mark.parametrize("loss", ["mse", "nll"])
def test_a_run_begins_with_the_estimates_of_the_other_in_physical_units(
    cheap: CompressorResult, results: Path, loss: str
) -> None:
    """With a learning rate of nothing only BatchNorm's statistics move; tiles and theta keep the other's units."""
    start = f"{cheap.folder}/best.ckpt"
    config = config_of(results, init_from=start, learning_rate=1e-12, weight_decay=0.0, loss=loss)
    assert config.run_tag == f"field_{loss}_lmax{SMALL_LMAX}_noiseless_spectra_from_cheap"
    found = run_compressor(config)
    assert found.init_from == load_compressor(Path(start), CPU, "float32").sha256
    assert read_norm_stats(Path(found.folder)) == read_norm_stats(Path(cheap.folder))
    estimates = []
    for folder in (Path(found.folder), Path(cheap.folder)):
        norm_stats = read_norm_stats(folder)
        data = read_tiles(replace(config, results_dir=str(results)), CPU, torch.float32, norm_stats=norm_stats)
        summary = predict(load_compressor(folder / "best.ckpt", CPU, "float32").model, data.test_ds, 100)
        estimates.append(norm_stats.physical_theta(summary.double().numpy()))
    np.testing.assert_allclose(*estimates, atol=0.01)
    run_compressor(config_of(results, init_from=f"{found.folder}/best.ckpt", max_epochs=1, tag="from either loss"))
    scratch = run_compressor(config_of(results, learning_rate=1e-12, weight_decay=0.0))
    assert found.val_mse < 0.8 * scratch.val_mse  # what it took over is worth something on these tiles


def test_an_interrupted_run_goes_on_to_the_bit(
    cheap: CompressorResult, results: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of(results, init_from=f"{cheap.folder}/best.ckpt", loss="nll")
    run_compressor(replace(config, tag="whole"))
    with monkeypatch.context() as patch:
        calls = iter(range(100))

        def check() -> None:
            if next(calls) == 3:
                raise interrupt.Interrupted(15)

        patch.setattr("data.dataset.check", check)
        with pytest.raises(interrupt.Interrupted):
            run_compressor(replace(config, tag="stopped"))
    with pytest.raises(UserError, match=r"--init-from .* there, .* here"):  # from another start it does not go on
        run_compressor(replace(config, tag="stopped", init_from=f"{results}/field_compressor_runs/whole/best.ckpt"))
    run_compressor(replace(config, tag="stopped"))
    one, other = (
        load_compressor(results / "field_compressor_runs" / tag / "best.ckpt", CPU, "float32").model.state_dict()
        for tag in ("whole", "stopped")
    )
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_weights_that_saw_the_fiducial_cosmology_are_refused_through_any_number_of_runs(
    cheap: CompressorResult, results: Path, tmp_path: Path
) -> None:
    """Simulation 109 of these tiles is held out; a run that holds out another has seen its cosmology."""
    saw = run_compressor(config_of(results, fiducial_sim_id=5, tag="saw"))
    other = Path(cheap.folder).parent.parent
    second = run_compressor(config_of(other, init_from=f"{saw.folder}/best.ckpt", fiducial_sim_id=5, tag="second"))
    for start in (saw, second):
        before = sorted(results.rglob("*"))
        with pytest.raises(UserError, match=r"was trained on the cosmology of the fiducial simulation 109"):
            run_compressor(config_of(results, init_from=f"{start.folder}/best.ckpt", tag="refused"))
        assert [path for path in sorted(results.rglob("*")) if path not in before and path.suffix == ".ckpt"] == []


def test_weights_that_learnt_from_tiles_of_the_other_splits_are_refused(results: Path) -> None:
    """The same tiles, split otherwise: stage 2 would learn from summaries of tiles that the weights know by heart."""
    one, other = (
        run_compressor(config_of(results, split_seed=seed, max_epochs=1, tag=f"split {seed}")) for seed in (1, 2)
    )
    learnt, here = (read_manifest(Path(run.folder)).splits for run in (one, other))
    n = len(set(map(tuple, learnt["compressor_train"])) & set(map(tuple, here["npe_train"] + here["test"])))
    with pytest.raises(UserError, match=f"has learnt from {n} tiles of this run's NPE and test splits"):
        run_compressor(config_of(results, split_seed=2, init_from=f"{one.folder}/best.ckpt", tag="refused"))
    run_compressor(config_of(results, split_seed=1, init_from=f"{one.folder}/best.ckpt", max_epochs=1, tag="taken"))


def test_a_start_that_does_not_fit_costs_one_line(
    cheap: CompressorResult, results: Path, run_command: RunCommand
) -> None:
    def refused(*options: object) -> str:
        base = ("--lmax", SMALL_LMAX, "--noise-level", "noiseless", "--results-dir", results, "--device", "cpu")
        code, _, err = run_command("run_compressor.py", *base, "--backbone", "spectra", *options)
        assert code == 2
        assert "Traceback" not in err
        return err.splitlines()[-1]

    start = f"{cheap.folder}/best.ckpt"
    assert "--backbone spectra, this run power; give the same" in refused("--init-from", start, "--backbone", "power")
    assert "--params Omega_m,S8, this run S8,Omega_m" in refused("--init-from", start, "--params", "S8,Omega_m")
    assert "does not exist" in refused("--init-from", results / "best.ckpt")
    write_tiles(results / "three", make_tiles(40, 16, SMALL_LMAX, noise_level="noiseless", n_bins=3), 480)
    assert "has 4 bins and 2 parameters, the tiles 3" in refused("--init-from", start, "--tiles-dir", results / "three")
    copied = shutil.copytree(cheap.folder, results / "field_compressor_runs" / "copied")
    own = ("--init-from", copied / "best.ckpt", "--tag", "copied", "--restart")
    assert "is in the folder that this run writes" in refused(*own)
    shutil.rmtree(copied)
    more = run_compressor(config_of(Path(cheap.folder).parent.parent, params="Omega_m,S8,w", max_epochs=1, tag="w"))
    build_suite(MockConfig(results_dir=str(results / "fixed"), vary="Omega_m,S8", **SMALL_SUITE))
    tiles = ("--tiles-dir", results / "fixed" / "tiles" / f"lmax_{SMALL_LMAX}_noiseless")
    of_more = ("--init-from", f"{more.folder}/best.ckpt", "--params", "Omega_m,S8,w")
    assert "parameter 3 of --params is constant" in refused(*tiles, *of_more)
    moved = shutil.copytree(cheap.folder, results / "moved")
    stats = moved / "norm_stats.json"
    stats.write_text(stats.read_text().replace('"theta_mean": [\n    0.', '"theta_mean": [\n    1.'))
    assert "is not what --init-from was trained with" in refused("--init-from", moved / "best.ckpt")
    assert not (results / "field_compressor_runs").exists() or not list(results.rglob("field_compressor_runs/*/*.ckpt"))
