"""Both stages through their commands on a small suite: files, repeatability, refusals, and what they learn."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import get_args

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from conftest import SMALL_LMAX, SMALL_SUITE, make_tiles, write_tiles
from torch import nn

from compress.config import Backbone, CompressorConfig
from compress.evaluate import predict, renew_batch_norm
from compress.model import FieldLevelCompressor, load_compressor
from compress.power import HIDDEN
from data.dataset import whole_dataset
from data.mock.config import MockConfig
from data.mock.suite import build_suite
from data.module import TileDataModule
from data.norm_stats import NormStats, read_norm_stats
from data.read_shards import read_tiles
from data.schema import columns_of
from data.split import make_manifest, read_manifest, write_manifest
from npe.model import load_npe, predict_posterior
from npe.result import read_fom_result

CPU = torch.device("cpu")
TAG = f"field_mse_lmax{SMALL_LMAX}_noiseless_tiny"
STAGE_1 = ["--lmax", SMALL_LMAX, "--noise-level", "noiseless", "--backbone", "tiny", "--max-epochs", 12]
STAGE_1 += ["--warmup-steps", 10, "--decay-epochs", 2, "--device", "cpu", "--batch-size", 64]


def copy_tiles(source: Path, target: Path) -> Path:
    shutil.copytree(source / "tiles", target / "tiles")
    return target


@pytest.fixture(scope="module")
def finished(small_suite: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Results folder in which both commands have run."""
    import sys

    import run_compressor
    import run_npe

    results, saved = copy_tiles(small_suite, tmp_path_factory.mktemp("finished")), sys.argv
    try:
        sys.argv = ["run_compressor.py", "--results-dir", str(results), *map(str, STAGE_1)]
        run_compressor.main()
        ckpt = results / "field_compressor_runs" / TAG / "best.ckpt"
        sys.argv = ["run_npe.py", "--ckpt", str(ckpt), "--max-epochs", "60", "--device", "cpu"]
        run_npe.main()
    finally:
        sys.argv = saved
    return results


def compressor_run(results: Path) -> Path:
    return results / "field_compressor_runs" / TAG


def npe_run(results: Path) -> Path:
    return results / "field_npe_runs" / TAG


def test_every_promised_file_and_key_is_there(finished: Path) -> None:
    assert {p.name for p in compressor_run(finished).iterdir()} == {
        "best.ckpt", "norm_stats.json", "split_manifest.json", "result.json", "metrics.jsonl",
        "loss_curves.png", "predicted_vs_true.png",
    }  # fmt: skip
    assert {p.name for p in npe_run(finished).iterdir()} == {
        "npe_best.ckpt", "fom_result.json", "metrics.jsonl", "loss_curves.png", "fom.png", "calibration.png",
        "tiles.png", "report.html", "reference.npz",
    }  # fmt: skip
    fom = json.loads((npe_run(finished) / "fom_result.json").read_text())
    assert list(fom)[:9] == [
        "lmax", "noise_level", "fom_fiducial_median", "fom_fiducial_std", "fom_fiducial_all", "fom_test_median",
        "fom_test_lo_16", "fom_test_hi_84", "compressor_checkpoint",
    ]  # fmt: skip
    assert fom["compressor_checkpoint"] == f"{TAG}/best.ckpt"


def test_the_results_can_be_had_again_from_the_files(finished: Path) -> None:
    """Second route to every headline number: reload the checkpoints and go by the files alone."""
    run = compressor_run(finished)
    result = json.loads((run / "result.json").read_text())
    fom = json.loads((npe_run(finished) / "fom_result.json").read_text())
    compressor = load_compressor(run / "best.ckpt", CPU, "float32").model
    stats, manifest = read_norm_stats(run), read_manifest(run)

    rows = []
    for path in sorted((finished / "tiles" / f"lmax_{SMALL_LMAX}_noiseless").glob("*.parquet")):
        rows += pq.read_table(path).to_pylist()
    tile = {(r["sim_id"], r["orientation_id"], r["tile_id"]): r for r in rows}

    def by_hand(keys: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
        picked = [tile[tuple(key)] for key in keys]
        kappa = np.array([r["kappa"] for r in picked], dtype=np.float32)
        kappa = (kappa - np.array(stats.tile_mean)[:, None, None]) / np.array(stats.tile_std)[:, None, None]
        theta = stats.normalise_theta(np.array([[r["Omega_m"], r["S8"]] for r in picked]))
        with torch.no_grad():
            summary = compressor(torch.from_numpy(kappa.astype(np.float32)))
        return summary, torch.from_numpy(theta.astype(np.float32))

    for name, split in (("train_mse", "compressor_train"), ("val_mse", "npe_train"), ("test_mse", "test")):
        summary, theta = by_hand(manifest.splits[split])
        assert (summary - theta).square().mean().item() == pytest.approx(result[name], rel=1e-4)
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert min(m["val_mse"] for m in metrics) == pytest.approx(result["val_mse"], rel=1e-4)
    assert metrics[result["best_epoch"]]["val_mse"] == min(m["val_mse"] for m in metrics)  # best, not last, is kept

    summary, _ = by_hand(manifest.splits["fiducial"])
    npe = load_npe(npe_run(finished) / "npe_best.ckpt", 2, CPU)[0]
    posterior = predict_posterior(npe, summary, ("Omega_m", "S8"), stats)
    np.testing.assert_allclose(posterior.fom, fom["fom_fiducial_all"], rtol=1e-3)
    assert fom["fom_fiducial_median"] == np.median(fom["fom_fiducial_all"])
    assert fom["fom_fiducial_std"] == pytest.approx(np.std(fom["fom_fiducial_all"], ddof=1))
    npe_metrics = [json.loads(line) for line in (npe_run(finished) / "metrics.jsonl").read_text().splitlines()]
    test_summary, test_theta = by_hand(manifest.splits["test"])
    with torch.no_grad():
        assert npe.nll(test_summary, test_theta).mean().item() == pytest.approx(
            min(m["test_nll"] for m in npe_metrics), rel=1e-3
        )


def test_it_learns_something_and_says_how_much(finished: Path) -> None:
    result = json.loads((compressor_run(finished) / "result.json").read_text())
    fom = json.loads((npe_run(finished) / "fom_result.json").read_text())
    assert result["val_mse"] < 0.7  # 1 is to know nothing; noise-free tiles of few modes
    theta_std = read_norm_stats(compressor_run(finished)).theta_std
    prior_fom = 1 / np.prod(theta_std)
    assert fom["fom_fiducial_median"] > 1.3 * prior_fom


def test_the_fiducial_simulation_is_in_no_training_split(finished: Path) -> None:
    splits = read_manifest(compressor_run(finished)).splits
    assert len(splits["fiducial"]) == 12
    assert {sim_id for sim_id, _, _ in splits["fiducial"]} == {109}
    for name in ("compressor_train", "npe_train", "test"):
        assert 109 not in {sim_id for sim_id, _, _ in splits[name]}


def test_same_seed_same_result_and_another_seed_another(
    finished: Path, small_suite: Path, tmp_path: Path, run_command: Callable
) -> None:
    copy_tiles(small_suite, tmp_path)
    weights, foms = {}, {}
    for seed in (42, 43):
        code, _, err = run_command(
            "run_compressor.py", "--results-dir", tmp_path, *STAGE_1, "--seed", seed, "--restart"
        )
        assert code == 0, err
        weights[seed] = torch.load(compressor_run(tmp_path) / "best.ckpt", weights_only=True)["model"]
        ckpt = compressor_run(tmp_path) / "best.ckpt"
        assert run_command("run_npe.py", "--ckpt", ckpt, "--max-epochs", 60, "--device", "cpu", "--restart")[0] == 0
        foms[seed] = json.loads((npe_run(tmp_path) / "fom_result.json").read_text())["fom_fiducial_all"]
    again = torch.load(compressor_run(finished) / "best.ckpt", weights_only=True)["model"]
    assert all(torch.equal(again[name], weights[42][name]) for name in again)
    assert not torch.equal(again["head.weight"], weights[43]["head.weight"])
    finished_foms = json.loads((npe_run(finished) / "fom_result.json").read_text())["fom_fiducial_all"]
    assert foms[42] == finished_foms != foms[43]


def test_a_finished_tag_is_kept_without_restart(finished: Path, run_command: Callable) -> None:
    before = (compressor_run(finished) / "best.ckpt").read_bytes()
    code, _, err = run_command("run_compressor.py", "--results-dir", finished, *STAGE_1)
    assert code == 2
    assert "--restart" in err
    code, _, err = run_command("run_npe.py", "--ckpt", compressor_run(finished) / "best.ckpt")
    assert code == 2
    assert "--restart" in err
    assert (compressor_run(finished) / "best.ckpt").read_bytes() == before


def test_stage_2_refuses_tiles_that_stage_1_did_not_see(finished: Path, tmp_path: Path, run_command: Callable) -> None:
    results = tmp_path / "moved"  # a copied run folder works as well as the original
    shutil.copytree(finished, results)
    ckpt = compressor_run(results) / "best.ckpt"
    shutil.rmtree(results / "tiles")
    build_suite(MockConfig(**SMALL_SUITE | {"seed": 43}, results_dir=str(results)))
    code, _, err = run_command("run_npe.py", "--ckpt", ckpt, "--tag", "x")
    assert code == 2
    assert "not those that stage 1 was trained on" in err
    for option, value in (("--lmax", 64), ("--noise-level", "des_y3")):
        code, _, err = run_command("run_npe.py", "--ckpt", ckpt, "--tag", "x", option, value)
        assert code == 2
        assert option in err

    shutil.copytree(finished / "tiles", results / "tiles", dirs_exist_ok=True)
    tiles = read_tiles(results / "tiles" / f"lmax_{SMALL_LMAX}_noiseless", SMALL_LMAX, "noiseless")
    write_manifest(compressor_run(results), make_manifest(tiles, 43, "tile", 109))  # sound, but of another run
    code, _, err = run_command("run_npe.py", "--ckpt", ckpt, "--tag", "x")
    assert code == 2
    assert "is not what" in err

    manifest = compressor_run(results) / "split_manifest.json"
    manifest.unlink()
    (compressor_run(results) / "result.json").unlink()  # as if stage 1 had been interrupted
    code, _, err = run_command("run_npe.py", "--ckpt", ckpt, "--tag", "x")
    assert code == 2
    assert "has not finished" in err
    assert "split_manifest.json is missing" in err
    assert not (results / "field_npe_runs" / "x").exists()


def test_calibration_on_fresh_simulations_and_never_on_those_of_the_training(
    finished: Path, tmp_path: Path, run_command: Callable
) -> None:
    on_test = json.loads((npe_run(finished) / "fom_result.json").read_text())["calibration"]
    assert on_test["optimistic"]
    ckpt = compressor_run(finished) / "best.ckpt"
    folder = finished / "tiles" / f"lmax_{SMALL_LMAX}_noiseless"
    code, _, err = run_command("run_npe.py", "--ckpt", ckpt, "--tag", "c", "--calibration-tiles", folder)
    assert code == 2
    assert "shares cosmologies with the training tiles" in err
    assert not (finished / "field_npe_runs" / "c").exists()

    options = ["--lmax", SMALL_LMAX, "--noise-level", "noiseless", "--fresh"]
    for n_sims in (4, 20):
        results = ["--results-dir", tmp_path / str(n_sims), "--n-sims", n_sims]
        assert run_command("run_mock.py", *options, *results)[0] == 0
    few, fresh = (tmp_path / n_sims / "fresh_tiles" / f"lmax_{SMALL_LMAX}_noiseless" for n_sims in ("4", "20"))
    code, _, err = run_command("run_npe.py", "--ckpt", ckpt, "--tag", "c", "--calibration-tiles", few)
    assert code == 2
    assert "tiles of 4 simulations, too few" in err
    code, _out, err = run_command(
        "run_npe.py", "--ckpt", ckpt, "--tag", "c", "--calibration-tiles", fresh, "--max-epochs", 60, "--device", "cpu"
    )
    assert code == 0, err
    result = json.loads((finished / "field_npe_runs" / "c" / "fom_result.json").read_text())
    assert (result["calibration"]["n_tiles"], result["calibration"]["n_sims"]) == (240, 20)
    assert not result["calibration"]["optimistic"]
    assert result["calibration"]["chi2_per_dof"] != on_test["chi2_per_dof"]
    # What is checked on does not change what is checked.
    before = json.loads((npe_run(finished) / "fom_result.json").read_text())
    assert result["fom_fiducial_all"] == before["fom_fiducial_all"]


def test_no_fiducial_stage_1_warns_and_stage_2_refuses(
    small_suite: Path, tmp_path: Path, run_command: Callable
) -> None:
    copy_tiles(small_suite, tmp_path)
    options = ["--results-dir", tmp_path, *STAGE_1, "--max-epochs", 1]
    code, _, err = run_command("run_compressor.py", *options, "--fiducial-sim-id", 777)
    assert code == 0
    assert "warning:" in err
    assert "777" in err
    code, _, err = run_command("run_npe.py", "--ckpt", compressor_run(tmp_path) / "best.ckpt")
    assert code == 2
    assert "no simulation 777" in err


def test_a_backbone_that_needs_larger_tiles_says_so(small_suite: Path, tmp_path: Path, run_command: Callable) -> None:
    copy_tiles(small_suite, tmp_path)
    code, _, err = run_command("run_compressor.py", "--results-dir", tmp_path, *STAGE_1, "--backbone", "power")
    assert code == 2
    assert "--backbone power and moments need tiles of 32 pixels" in err.splitlines()[-1]
    assert not list((tmp_path / "field_compressor_runs").glob("*/*"))


def test_a_loss_that_is_not_finite_stops_the_run(small_suite: Path, tmp_path: Path, run_command: Callable) -> None:
    copy_tiles(small_suite, tmp_path)
    code, _, err = run_command(
        "run_compressor.py", "--results-dir", tmp_path, *STAGE_1, "--learning-rate", 1e30, "--warmup-steps", 0
    )
    assert code == 2
    assert "--learning-rate" in err.splitlines()[-1]
    assert not (compressor_run(tmp_path) / "result.json").exists()


# ---------------------------------------------------------------- network


@pytest.mark.parametrize(("n_bins", "n_params"), [(4, 2), (1, 2), (6, 3)])
@pytest.mark.parametrize("backbone", get_args(Backbone))
def test_backbones_take_any_bins_and_every_parameter_gets_a_gradient(
    backbone: Backbone, n_bins: int, n_params: int
) -> None:
    torch.manual_seed(0)
    model = FieldLevelCompressor(backbone, n_bins, n_params)
    for module in model.modules():
        if type(module).__name__ == "StochasticDepth":
            module.p = 0.0  # it would drop whole branches, and their gradients, at random
    summary = model(torch.randn(6, n_bins, 64, 64))
    assert summary.shape == (6, n_params)
    summary.square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


def test_networks_side_by_side_are_each_of_them_where_the_other_is_switched_off() -> None:
    torch.manual_seed(0)
    both, kappa = FieldLevelCompressor("tiny+moments", 4, 2).eval(), torch.randn(3, 4, 64, 64)
    for k, name in enumerate(("tiny", "moments")):
        alone = FieldLevelCompressor(name, 4, 2).eval()
        features = nn.Sequential(alone.features, alone.pool)
        features.load_state_dict(
            dict(zip(features.state_dict(), both.features.networks[k].state_dict().values(), strict=True))
        )
        n_deep = both.head.in_features - HIDDEN
        mine = slice(0, n_deep) if name == "tiny" else slice(n_deep, None)
        with torch.no_grad():
            alone.head.weight.copy_(both.head.weight[:, mine])
            alone.head.bias.copy_(both.head.bias)
            kept = both.head.weight.clone()
            both.head.weight.zero_()
            both.head.weight[:, mine] = kept[:, mine]
            torch.testing.assert_close(both(kappa), alone(kappa), rtol=1e-5, atol=1e-6)
            both.head.weight.copy_(kept)


@pytest.mark.parametrize(("n_bins", "params"), [(1, "Omega_m,S8"), (6, "w,S8,Omega_m")])
def test_both_stages_take_the_bins_of_the_shards_and_the_parameters_of_the_option(
    n_bins: int, params: str, tmp_path: Path, run_command: Callable
) -> None:
    """Tiles whose first bins are the true parameters: the posterior of each is found, in the order of the option."""
    tiles = make_tiles(60, 8, 16, noise_level="noiseless", n_bins=n_bins)
    names = params.split(",")
    theta = columns_of(tiles.params, tuple(names))
    for k in range(len(names)):
        tiles.kappa[:, k % n_bins] = 0.02 * tiles.kappa[:, k % n_bins] + theta[:, k, None, None]
    write_tiles(tmp_path / "tiles", tiles, rows_per_shard=360)
    options = ["--tiles-dir", tmp_path / "tiles", "--results-dir", tmp_path, "--lmax", 16, "--noise-level", "noiseless"]
    options += ["--params", params, "--backbone", "tiny", "--max-epochs", 20, "--warmup-steps", 5, "--batch-size", 64]
    code, out, err = run_command("run_compressor.py", *options, "--device", "cpu")
    assert code == 0, err
    tag = "field_mse_lmax16_noiseless_tiny" + ("" if params == "Omega_m,S8" else "_params_w-S8-Omega_m")
    ckpt = tmp_path / "field_compressor_runs" / tag / "best.ckpt"
    assert str(ckpt) in out
    code, out, err = run_command("run_npe.py", "--ckpt", ckpt, "--max-epochs", 40, "--device", "cpu")
    assert code == 0, err
    assert f"sigma (rms) in {' and '.join(names)}" in out
    result = read_fom_result(tmp_path / "field_npe_runs" / tag)
    cov = np.array(result.fiducial.cov)
    assert result.params == tuple(names)
    assert cov.shape == (12, len(names), len(names))
    two = [names.index("Omega_m"), names.index("S8")]
    np.testing.assert_allclose(result.fom_fiducial_all, 1 / np.sqrt(np.linalg.det(cov[:, two][:, :, two])), rtol=1e-6)
    if n_bins == 6:  # every parameter has a bin of its own, so each is found to a tenth of its prior
        prior = columns_of(tiles.params, tuple(names)).std(axis=0)
        off = np.abs(np.array(result.fiducial.mu).mean(axis=0) - result.fiducial.theta_true)
        assert (off < 0.35 * prior).all(), off / prior
    shard = tmp_path / "tiles" / "shard_0000.parquet"
    run = tmp_path / "field_npe_runs" / tag
    code, out, err = run_command("run_predict.py", "--run", run, "--tiles", shard, "--n-samples", 10)
    assert code == 0, err
    assert all(f"{name} " in out.splitlines()[0] for name in names)
    named = (run / "predictions/shard_0000/tile_0000.paramnames").read_text().splitlines()
    assert [line.split()[0] for line in named] == names


def test_bf16_convolutions_with_a_float32_head_agree_with_float32() -> None:
    torch.manual_seed(0)
    exact, fast = (FieldLevelCompressor("tiny", 4, 2, dtype) for dtype in (torch.float32, torch.bfloat16))
    fast.load_state_dict(exact.state_dict())
    kappa = torch.randn(64, 4, 64, 64)
    a, b = exact(kappa), fast(kappa)
    assert b.dtype is torch.float32
    assert not torch.equal(a, b)  # bf16 was used
    assert (a - b).square().mean() < 2e-3 * a.var()


def test_prediction_does_not_depend_on_the_batch(small_suite: Path) -> None:
    config = CompressorConfig(lmax=SMALL_LMAX, noise_level="noiseless", backbone="tiny")
    folder = small_suite / "tiles" / f"lmax_{SMALL_LMAX}_noiseless"
    data = TileDataModule(folder, config, config.theta_names, device=CPU).setup()
    torch.manual_seed(0)
    model = FieldLevelCompressor("tiny", n_bins=4, n_params=2)
    torch.testing.assert_close(predict(model, data.test_ds, 64), predict(model, data.test_ds, 7), rtol=1e-5, atol=1e-6)


def test_averaged_weights_are_the_stated_recursion_and_leave_the_training_alone(
    small_suite: Path, tmp_path: Path, run_command: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy_tiles(small_suite, tmp_path)
    evaluated: list[dict[str, torch.Tensor]] = []

    def remember(model: FieldLevelCompressor, *_: object) -> float:
        evaluated.append({name: tensor.clone() for name, tensor in model.state_dict().items()})
        return 1 / len(evaluated)  # ever better

    monkeypatch.setattr("compress.train.validate", remember)
    for decay in (0, 0.2):  # one step an epoch
        options = ["--max-epochs", 4, "--batch-size", 10_000, "--ema-decay", decay, "--tag", f"decay_{decay}"]
        code, _, err = run_command("run_compressor.py", "--results-dir", tmp_path, *STAGE_1, *options)
        assert code == 0, err
    plain, averaged = evaluated[:4], evaluated[4:]
    expected = plain[0]
    for step, weights in enumerate(plain):
        for name, tensor in weights.items():
            if tensor.dtype.is_floating_point:
                kept = (0, 2 / 11, 0.2, 0.2)[step]
                expected[name] = kept * expected[name] + (1 - kept) * tensor
                torch.testing.assert_close(averaged[step][name], expected[name], rtol=1e-5, atol=1e-7)
    saved = load_compressor(tmp_path / "field_compressor_runs" / "decay_0.2" / "best.ckpt", CPU, "float32").model
    for name, tensor in saved.state_dict().items():
        assert torch.equal(tensor, averaged[-1][name]), name


def test_renewed_batch_norm_statistics_are_those_of_the_tiles_as_they_are(tmp_path: Path) -> None:
    """Two routes for the first layer: its own bookkeeping, and moments of the convolution's output."""
    tiles = make_tiles(8, 16, 32)
    dataset = whole_dataset(tiles, ("Omega_m", "S8"), NormStats((0.0,) * 4, (1.0,) * 4, (0.3, 0.8), (0.1, 0.1)), CPU)
    torch.manual_seed(0)
    model = FieldLevelCompressor("tiny", n_bins=4, n_params=2)
    config = CompressorConfig(backbone="tiny", norm_tiles=len(tiles.keys), batch_size=32)
    weights = {name: tensor.clone() for name, tensor in model.named_parameters()}
    before = torch.get_rng_state()
    renew_batch_norm(model, dataset, config)
    assert torch.equal(torch.get_rng_state(), before)
    stem, norm = model.features[0][0], model.features[0][1]
    with torch.no_grad():
        response = stem(torch.from_numpy(tiles.kappa))  # (n, C, N / 2, N / 2)
    assert torch.allclose(norm.running_mean, response.mean(dim=(0, 2, 3)), atol=1e-5)
    # The mean over batches of their variances leaves out how the batches' means differ.
    assert torch.allclose(norm.running_var, response.var(dim=(0, 2, 3)), rtol=0.02)
    assert norm.momentum == type(norm)(1).momentum
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.named_parameters())


def test_one_tile_a_simulation_is_enough_and_has_no_scatter(
    small_tiles_dir: Path, tmp_path: Path, run_command: Callable
) -> None:
    tiles = read_tiles(small_tiles_dir, SMALL_LMAX, "noiseless")
    first = np.flatnonzero((tiles.keys[:, 1:] == 0).all(axis=1))
    some = replace(tiles, kappa=tiles.kappa[first], keys=tiles.keys[first], params=tiles.params[first])
    write_tiles(tmp_path / "tiles", some, rows_per_shard=60)
    options = ["--tiles-dir", tmp_path / "tiles", "--results-dir", tmp_path, "--tag", "t", *STAGE_1, "--max-epochs", 1]
    assert run_command("run_compressor.py", *options)[0] == 0
    ckpt = tmp_path / "field_compressor_runs" / "t" / "best.ckpt"
    code, out, err = run_command("run_npe.py", "--ckpt", ckpt, "--max-epochs", 2)
    assert code == 0, err
    assert "nan" not in out
    assert "median of 1 tiles of the fiducial" in out
    result = json.loads((tmp_path / "field_npe_runs" / "t" / "fom_result.json").read_text())
    assert len(result["fom_fiducial_all"]) == 1
    assert result["fom_fiducial_std"] is None
    assert "one tile has no scatter" in (tmp_path / "field_npe_runs" / "t" / "report.html").read_text()
