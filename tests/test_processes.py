"""Several processes that train one network, as torchrun starts them, against one."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from conftest import GUARD_S, ROOT
from torch import nn

from common.options import parse_args
from common.processes import LOST, Processes
from common.progress import read_metrics
from compress.config import CompressorConfig
from compress.model import load_compressor
from compress.stage import run_compressor
from data.dataset import Batch, TileDataset, batches
from data.mock.config import MockConfig
from data.mock.suite import build_suite

TRAINING = ["--lmax", "64", "--noise-level", "des_y3", "--batch-size", "20", "--device", "cpu", "--warmup-steps", "5"]
TRAINING += ["--norm-tiles", "1000"]  # without it BatchNorm's running statistics would depend on the order of halves
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
RUNS = "field_compressor_runs"


class InHalves(nn.Module):
    """A model that is given the shares of two processes one after the other."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, kappa: torch.Tensor) -> torch.Tensor:
        return torch.cat([self.model(kappa[Processes(rank, 2).share(len(kappa))]) for rank in (0, 1)])


@pytest.fixture(scope="module")
def tiles_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiles of 32 x 32 pixels, the fewest that the power backbone takes."""
    results = tmp_path_factory.mktemp("results")
    suite = build_suite(MockConfig(results_dir=str(results), lmax=64, n_sims=40, noise_level="des_y3"))
    return Path(suite["folder"])


def start_two(options: list[str]) -> subprocess.Popen[str]:
    command = [*TORCHRUN, str(ROOT / "run_compressor.py"), *options]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def train_in_halves(options: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """What two processes do, in this one."""
    with monkeypatch.context() as patch:
        patch.setattr(Processes, "learner", lambda self, model, *_: InHalves(model))
        run_compressor(parse_args(CompressorConfig, options))


def assert_same(results: Path, tag: str, other: str, rtol: float) -> None:
    """Two trainings had the same losses, but for rounding, and ended with the same weights and summaries.

    A shift that the next BatchNorm takes away has no gradient, and Adam takes steps along its rounding errors; so
    shifts are compared through the summaries.
    """
    losses = [read_metrics(results / RUNS / name / "metrics.jsonl") for name in (tag, other)]
    for name in losses[0].keys() - {"seconds"}:
        np.testing.assert_allclose(losses[1][name], losses[0][name], rtol=10 * rtol, err_msg=name)
    one, two = (
        load_compressor(results / RUNS / name / "best.ckpt", torch.device("cpu"), "float32").model
        for name in (tag, other)
    )
    weights = two.state_dict()
    for name, weight in one.state_dict().items():
        if name.endswith("weight"):
            assert float((weights[name] - weight).norm() / weight.norm()) < rtol, name
    kappa = torch.randn(64, 4, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(two.eval()(kappa), one.eval()(kappa), rtol=rtol, atol=3 * rtol)


@pytest.mark.parametrize("size", [2, 3, 5])
def test_the_shares_of_a_batch_are_the_batch_of_one_process(size: int) -> None:
    """With symmetries, other tiles' noise and noise on theta, where batches do not divide, or have too few tiles."""
    generator = torch.Generator().manual_seed(1)
    source, signal = (torch.randn(11, 8, 8, 2, generator=generator).permute(0, 3, 1, 2) for _ in range(2))
    tiles = TileDataset(source, torch.randn(11, 2), np.arange(11), torch.device("cpu"), signal)

    def views(processes: Processes) -> list[Batch]:
        augment, noise = (torch.Generator().manual_seed(seed) for seed in (2, 3))
        return list(batches(tiles.augmented(augment, (0.1, noise)).shared(processes), 4, augment))

    shares = [views(Processes(rank, size)) for rank in range(size)]
    for whole, *parts in zip(views(Processes()), *shares, strict=True):
        for mine, theirs in zip(whole, zip(*parts, strict=True), strict=True):
            torch.testing.assert_close(torch.cat(theirs), mine, rtol=0, atol=0)


# Training amplifies rounding: exchange the halves, and the weights of tiny differ by 2e-6, those of power by 2e-4.
@pytest.mark.parametrize(
    ("options", "rtol"),
    [(["--backbone", "tiny"], 1e-5), (["--backbone", "power", "--loss", "nll", "--ema-decay", "0.9"], 2e-3)],
)
def test_two_processes_train_as_one_that_normalises_their_halves_apart(
    options: list[str], rtol: float, tiles_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = [*TRAINING, *options, "--tiles-dir", str(tiles_dir), "--results-dir", str(tmp_path)]
    options += ["--max-epochs", "3"]
    two = start_two([*options, "--tag", "two"])
    _, said = two.communicate(timeout=GUARD_S)
    assert two.returncode == 0, said
    train_in_halves([*options, "--tag", "one"], monkeypatch)
    assert_same(tmp_path, "one", "two", rtol)


def test_two_processes_that_were_killed_and_stopped_go_on_as_one(
    tiles_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = [*TRAINING, "--backbone", "tiny", "--max-epochs", "6", "--checkpoint-seconds", "0"]
    options += ["--tiles-dir", str(tiles_dir), "--results-dir", str(tmp_path)]

    def after_epoch(epoch: int) -> subprocess.Popen[str]:
        """Two processes that have trained so far."""
        metrics, two = tmp_path / RUNS / "two/metrics.jsonl", start_two([*options, "--tag", "two"])
        end = time.monotonic() + GUARD_S
        while not metrics.exists() or len(metrics.read_text().splitlines()) < epoch:
            assert two.poll() is None, two.communicate()[1]
            assert time.monotonic() < end
            time.sleep(0.02)
        return two

    two = after_epoch(1)
    ranks = {p.environ().get("RANK"): p for p in psutil.Process(two.pid).children()}
    ranks["1"].kill()
    _, said = two.communicate(timeout=GUARD_S)
    assert two.returncode != 0
    assert said.count(f"error: {LOST}") == 1

    two = after_epoch(3)
    two.send_signal(signal.SIGINT)
    _, said = two.communicate(timeout=GUARD_S)
    assert two.returncode != 0
    assert said.count("the same command goes on from there") == 1

    assert not (tmp_path / RUNS / "two/result.json").exists()
    train_in_halves([*options, "--tag", "two"], monkeypatch)
    train_in_halves([*options, "--tag", "one"], monkeypatch)
    assert_same(tmp_path, "one", "two", rtol=1e-4)
