"""Several processes that train one network, as torchrun starts them, against one."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import GUARD_S, ROOT
from torch import nn

from common.options import parse_args
from common.processes import Processes
from compress.config import CompressorConfig
from compress.stage import run_compressor

TRAINING = ["--lmax", "32", "--noise-level", "noiseless", "--max-epochs", "3", "--batch-size", "20", "--device", "cpu"]
TRAINING += ["--warmup-steps", "5", "--norm-tiles", "1000"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]


class InHalves(nn.Module):
    """A model that is given the shares of two processes one after the other."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, kappa: torch.Tensor) -> torch.Tensor:
        return torch.cat([self.model(kappa[Processes(rank, 2).share(len(kappa))]) for rank in (0, 1)])


@pytest.mark.parametrize(
    "options", [["--backbone", "tiny"], ["--backbone", "tiny", "--loss", "nll", "--ema-decay", "0.9"]]
)
def test_two_processes_train_as_one_that_normalises_their_halves_apart(
    options: list[str], small_tiles_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = [*TRAINING, *options, "--tiles-dir", str(small_tiles_dir), "--results-dir", str(tmp_path)]
    command = [*TORCHRUN, "2", str(ROOT / "run_compressor.py"), *options, "--tag", "two"]
    subprocess.run(command, check=True, timeout=GUARD_S, capture_output=True)
    monkeypatch.setattr(Processes, "learner", lambda self, model, device: InHalves(model))
    run_compressor(parse_args(CompressorConfig, [*options, "--tag", "one"]))
    one, two = (
        torch.load(tmp_path / f"field_compressor_runs/{tag}/best.ckpt", weights_only=True)["model"]
        for tag in ("one", "two")
    )
    for name in one:
        if "num_batches" not in name:
            torch.testing.assert_close(two[name], one[name], rtol=1e-5, atol=1e-5 * float(one[name].abs().max()))
