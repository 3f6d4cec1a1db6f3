"""Single tiles answered: the same posterior as stage 2's, samples, and the verdict's false alarms and power."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import getdist
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from conftest import SMALL_LMAX

from common.errors import UserError
from common.machine import Precision
from compress.config import CompressorConfig
from compress.model import pick_precision
from compress.stage import run_compressor
from data.config import NoiseLevel
from data.mock.config import MockConfig
from data.mock.suite import build_suite
from data.read_shards import read_tiles
from data.schema import columns_of
from data.spectra import spectra_of
from npe.config import NPEConfig, PredictConfig
from npe.ood import N_BANDS, OutOfDistributionCheck, Reference, columns_of_tests
from npe.predict import predict_tiles
from npe.stage import run_npe

NSIDE = SMALL_LMAX // 2


@pytest.fixture(scope="module")
def run(small_suite: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished stage-2 run, with its stage-1 run and tiles beside it."""
    home = tmp_path_factory.mktemp("predict")
    shutil.copytree(small_suite / "tiles", home / "tiles")
    options = {"lmax": SMALL_LMAX, "noise_level": "noiseless", "backbone": "tiny", "max_epochs": 3, "warmup_steps": 2}
    result = run_compressor(CompressorConfig(results_dir=str(home), tag="t", **options))
    run_npe(NPEConfig(ckpt=f"{result.folder}/best.ckpt", max_epochs=5))
    return home / "field_npe_runs" / "t"


@pytest.fixture
def fiducial(run: Path) -> np.ndarray:
    """The twelve fiducial tiles (12, 4, N, N)."""
    tiles = read_tiles(run.parent.parent / f"tiles/lmax_{SMALL_LMAX}_noiseless", SMALL_LMAX, "noiseless")
    return np.ascontiguousarray(tiles.kappa[tiles.keys[:, 0] == 109])


def predict(run: Path, tiles: Path, **options: Any) -> dict[str, Any]:
    return asdict(predict_tiles(PredictConfig(run=str(run), tiles=str(tiles), **options)))


def test_a_tile_gets_the_posterior_that_stage_2_gave_it(run: Path, fiducial: np.ndarray, tmp_path: Path) -> None:
    """As an array, and as the shard that it came from."""
    stage_2 = json.loads((run / "fom_result.json").read_text())
    np.save(tmp_path / "mine.npy", fiducial.astype(np.float64))
    shard = next(
        path
        for path in (run.parent.parent / f"tiles/lmax_{SMALL_LMAX}_noiseless").glob("shard_*.parquet")
        if 109 in pq.read_table(path, columns=["sim_id"])["sim_id"].to_pylist()
    )
    of_array = predict(run, tmp_path / "mine.npy")["predictions"]
    of_shard = [tile for tile in predict(run, shard)["predictions"] if tile["tile"].startswith("109/")]
    for found in (of_array, of_shard):
        assert np.allclose([tile["mu"] for tile in found], stage_2["fiducial"]["mu"], rtol=1e-5)
        assert np.allclose([tile["fom"] for tile in found], stage_2["fom_fiducial_all"], rtol=1e-5)
    assert [tile["tile"] for tile in of_shard] == [f"109/{o}/{t}" for o in range(3) for t in range(4)]
    np.save(tmp_path / "one.npy", fiducial[5])
    (alone,) = predict(run, tmp_path / "one.npy")["predictions"]
    assert np.allclose(alone["mu"], of_array[5]["mu"], rtol=1e-5)


def test_getdist_opens_the_samples_and_finds_the_posterior(run: Path, fiducial: np.ndarray, tmp_path: Path) -> None:
    np.save(tmp_path / "mine.npy", fiducial[:2])
    result = predict(run, tmp_path / "mine.npy", results_dir=str(tmp_path))
    assert Path(result["folder"]) == tmp_path / "predictions" / "t" / "mine"
    for i, tile in enumerate(result["predictions"]):
        chain = getdist.loadMCSamples(f"{result['folder']}/tile_{i:04d}", settings={"ignore_rows": 0})
        assert [name.name for name in chain.getParamNames().names] == ["Omega_m", "S8"]
        sigma, cov = np.array(tile["sigma"]), np.array(tile["cov"])
        assert np.abs((chain.getMeans() - tile["mu"]) / sigma).max() < 4.5 / np.sqrt(10_000)
        scatter = np.sqrt(np.outer(sigma, sigma) ** 2 + cov**2)
        assert np.abs((chain.getCovMat().matrix - cov) / scatter).max() < 4.5 / np.sqrt(10_000)
        assert 1 / np.sqrt(np.linalg.det(cov)) == pytest.approx(tile["fom"], rel=1e-4)
        density = np.exp(-chain.loglikes).mean()  # <q> = 1 / (4 pi sqrt(det Cov)) for a Gaussian
        assert density == pytest.approx(tile["fom"] / (4 * np.pi), rel=0.05)


# ---------------------------------------------------------------- verdict

LMAX = 128  # 64 x 64 pixels
LEVELS: tuple[NoiseLevel, ...] = ("des_y3", "noiseless")


@pytest.fixture(scope="module")
def mock(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Noisy tiles, their noise alone and their cosmologies, two suites of 60 simulations, the second fresh."""
    results = tmp_path_factory.mktemp("mock")
    found = {}
    for fresh in (False, True):
        suite = {"results_dir": str(results), "lmax": LMAX, "n_sims": 60, "fresh": fresh}
        folders = {level: build_suite(MockConfig(noise_level=level, **suite))["folder"] for level in LEVELS}
        noisy, clean = (read_tiles(Path(folder), LMAX, level) for level, folder in folders.items())
        theta = columns_of(noisy.params, ("Omega_m", "S8"))
        found["fresh" if fresh else "suite"] = (
            noisy.kappa,
            noisy.kappa - clean.kappa,
            theta,
            noisy.keys[:, 0],
        )
    return found


def looks(kappa: np.ndarray, scale: np.ndarray) -> np.ndarray:
    return (
        spectra_of(torch.from_numpy(np.ascontiguousarray(kappa / scale)), LMAX, N_BANDS, tapered=True).double().numpy()
    )


def stripes(kappa: np.ndarray, scale: np.ndarray) -> np.ndarray:
    wave = np.sqrt(2) * np.sin(2 * np.pi * np.arange(kappa.shape[-1]) / 8).astype(np.float32)
    return kappa + 0.5 * scale * wave  # of half a standard deviation, along one direction


def test_ordinary_tiles_pass_and_odd_ones_are_caught(mock: dict[str, Any]) -> None:
    """The truth with the scatter of a posterior stands for the summary, so that this is about the verdict alone."""
    rng = np.random.default_rng(0)

    def estimate(theta: np.ndarray) -> np.ndarray:
        return (theta - [0.3, 0.75]) / [0.07, 0.12] + 0.4 * rng.standard_normal(theta.shape)

    kappa, _, theta, sim_id = mock["suite"]
    scale = kappa.std(axis=(0, 2, 3), keepdims=True)
    check = OutOfDistributionCheck(Reference(estimate(theta), looks(kappa, scale), theta, sim_id), n_bins=4)
    kappa, noise, theta, _ = mock["fresh"]
    summary = estimate(theta)

    def share_warned(tiles: np.ndarray, where: np.ndarray = summary) -> float:
        return float(np.mean(check.tail_probabilities(where, looks(tiles, scale))["all"] < 0.01))

    assert share_warned(kappa) < 0.03  # 1 % of 720, and what 60 cosmologies scatter
    assert share_warned(kappa + 0.2 * noise) > 0.5
    assert share_warned(stripes(kappa, scale)) > 0.5
    assert share_warned(kappa, summary + 5) > 0.9  # a summary that none of them has
    for test in ("summary", *columns_of_tests(4)):
        tail = check.tail_probabilities(summary, looks(kappa, scale))[test]
        assert 0.35 < tail.mean() < 0.65, test  # 0.5 if they are drawn from the same distribution


def test_few_training_tiles_make_no_false_alarms() -> None:
    """A covariance fitted to 300 tiles finds those very tiles nearer than any others: they must be held out."""
    rng = np.random.default_rng(0)
    summary, spectra = rng.standard_normal((1300, 2)), rng.standard_normal((1300, 54))
    some, others = slice(0, 300), slice(300, None)
    check = OutOfDistributionCheck(Reference(summary[some], spectra[some], summary[some], np.arange(300)), n_bins=4)
    tail = check.tail_probabilities(summary[others], spectra[others])
    for test in ("all", *columns_of_tests(4)):
        assert 0.4 < tail[test].mean() < 0.6, test
    assert np.mean(tail["all"] < 0.01) < 0.025


def test_spectra_of_white_noise_are_its_variance_and_blind_to_symmetries() -> None:
    generator = torch.Generator().manual_seed(0)
    tiles = torch.randn(400, 4, 32, 32, generator=generator) * torch.tensor([1.0, 2.0, 0.5, 1.0])[:, None, None]
    tiles[:, 3] = (tiles[:, 3] + tiles[:, 0]) / np.sqrt(2)
    found = spectra_of(tiles, 64, N_BANDS, tapered=True)
    power = found[:, : 4 * (N_BANDS + 1)].exp().mean(dim=0).reshape(4, N_BANDS + 1)
    assert torch.allclose(power, torch.tensor([1.0, 4.0, 0.25, 1.0])[:, None].expand(4, N_BANDS + 1), rtol=0.08)
    correlation = found[:, 4 * (N_BANDS + 1) :].tanh().mean(dim=0).reshape(6, N_BANDS)
    expected = torch.tensor([0, 0, np.sqrt(0.5), 0, 0, 0]).float()  # pairs 01, 02, 03, 12, 13, 23
    assert (correlation - expected[:, None]).abs().max() < 0.06
    for turned in (tiles.rot90(1, (2, 3)).roll(1, 2), tiles.flip(3).roll(1, 3)):  # Hann begins at its zero
        assert torch.allclose(spectra_of(turned, 64, N_BANDS, tapered=True), found, atol=1e-3)


# ---------------------------------------------------------------- refusals


def save(path: Path, content: np.ndarray) -> Path:
    np.save(path, content)
    return path


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda k: np.where(np.arange(NSIDE) < 3, np.nan, k), "tile 0: .* pixels are masked or not finite"),
        (lambda k: np.where(np.arange(NSIDE) < 3, -1.6375e30, k), "are masked or not finite"),
        (lambda k: np.where(np.arange(NSIDE) < 3, 0, k), "18.8 % of its pixels are exactly zero"),
        (lambda k: k[:, :3], r"give floats \(4, 16, 16\) or \(n, 4, 16, 16\)"),
        (lambda k: k[..., :8], "so give floats"),
        (lambda k: k.astype(complex), "so give floats"),
        (lambda k: k[:0], "holds no tile"),
        (lambda k: k.astype(float) * 1e300, "are masked or not finite"),
        (lambda k: k * 1e5, "tile 0 is so unlike what the network learnt from that it has no posterior"),
        (lambda k: np.array([None]), "neither a shard"),
    ],
)
def test_tiles_that_are_not_whole_are_refused(
    change: Callable[[np.ndarray], np.ndarray], message: str, run: Path, fiducial: np.ndarray, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message):
        predict(run, save(tmp_path / "x.npy", change(fiducial)), results_dir=str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["gone.npy", "gone.parquet"])
def test_a_file_that_is_not_there_is_called_so(name: str, run: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=rf"{name} is not there"):
        predict(run, tmp_path / name)


def test_a_run_that_was_touched_is_refused_and_one_that_was_moved_is_not(
    run: Path, fiducial: np.ndarray, tmp_path: Path
) -> None:
    tile = save(tmp_path / "x.npy", fiducial[0])
    shutil.copytree(run.parent.parent, tmp_path / "home")
    moved = tmp_path / "home" / "field_npe_runs" / "t"
    before = predict(run, tile)["predictions"]
    assert predict(moved, tile)["predictions"] == before
    shutil.move(tmp_path / "home/field_compressor_runs/t/best.ckpt", tmp_path / "elsewhere")
    assert predict(moved, tile)["predictions"] == before  # where stage 2 found it
    reference = moved / "reference.npz"
    content = bytearray(reference.read_bytes())
    content[len(content) // 2] ^= 1
    reference.write_bytes(content)
    with pytest.raises(UserError, match=r"reference.npz is missing or not what stage 2 wrote"):
        predict(moved, tile)
    (moved / "fom_result.json").unlink()
    with pytest.raises(UserError, match=r"fom_result.json is missing"):
        predict(moved, tile)


def test_the_answer_is_in_the_precision_of_the_run(
    run: Path, fiducial: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which `auto` stood for there; here it may mean another one."""
    tile = save(tmp_path / "x.npy", fiducial[0])
    before = predict(run, tile)["predictions"]
    original = pick_precision

    def other(name: Precision, *rest: Any) -> torch.dtype:
        return torch.bfloat16 if name == "auto" else original(name, *rest)

    monkeypatch.setattr("compress.model.pick_precision", other)
    assert predict(run, tile)["predictions"] == before


@pytest.mark.parametrize("damage", ["gone", "damaged"])
def test_posterior_weights_that_are_no_good_are_answered_with_their_own_cure(
    damage: str, run: Path, fiducial: np.ndarray, tmp_path: Path
) -> None:
    moved = tmp_path / "field_npe_runs" / "t"
    shutil.copytree(run, moved)
    path = moved / "npe_best.ckpt"
    path.unlink() if damage == "gone" else path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"npe_best.ckpt .* run stage 2 again, with --restart") as refused:
        predict(moved, save(tmp_path / "x.npy", fiducial[0]))
    assert "stage-1" not in str(refused.value)


def test_the_command_warns_of_an_odd_tile(
    run: Path, fiducial: np.ndarray, tmp_path: Path, run_command: Callable
) -> None:
    odd = fiducial[:2].copy()
    odd[1] *= 3
    tile = save(tmp_path / "x.npy", odd)
    code, out, err = run_command("run_predict.py", "--run", run, "--tiles", tile, "--n-samples", 100)
    assert code == 0
    assert "warning: tile 1 is out of distribution" in err
    assert "tile 0: Omega_m" in out
    assert "warning: tile 0" not in err
    assert (run / "predictions/x/predictions.png").stat().st_size > 5000
