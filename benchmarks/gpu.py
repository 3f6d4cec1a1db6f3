"""What only a real GPU can show, in one table: `make gpu`, under ten minutes on one card.

- Both stages, a few epochs: interrupted twice in the middle of an epoch and resumed, against an uninterrupted training.
  The largest difference of a weight; 0 if the card's kernels are deterministic.
- The training step and the NPE epoch against their limits, as in train_step.py and npe_epoch.py.
- Peak memory of a training step of efficientnet_v2_s with 128 tiles, against the estimate that decides whether the
  tiles are held on the device.

tests/test_cuda.py tests without a GPU that no operation mixes devices and no step waits for a copy. `--device cpu`
tries the script out, without peak memory and only with the smallest network.
"""

from __future__ import annotations

import argparse
import signal
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch
from torch.nn import functional

from benchmarks import npe_epoch, train_step
from benchmarks.measure import Row, report
from common.device import free_memory_of, pick_device
from common.errors import exit_on_user_error, say
from common.interrupt import Interrupted
from common.machine import Device
from compress.config import Backbone, CompressorConfig
from compress.memory import bytes_of_a_step
from compress.model import CHECKPOINT_NAME, FieldLevelCompressor, pick_precision
from compress.stage import run_compressor
from data.mock.config import MockConfig
from data.mock.nz import N_BINS
from data.mock.suite import build_suite
from data.schema import FOM_PARAMS
from npe.config import NPEConfig
from npe.model import CHECKPOINT_NAME as NPE_CHECKPOINT_NAME
from npe.stage import run_npe

LMAX, N_SIMS = 100, 60
BATCH = 128
NSIDES = (128, 256, 512)
BACKBONES: tuple[Backbone, ...] = ("tiny", "efficientnet_b0", "efficientnet_v2_s")
STEP_CASES = [train_step.Case(backbone, 128, BATCH, 8, 2) for backbone in BACKBONES]


def stopped_after(n_batches: int, train: Callable[[], object]) -> None:
    """Run a training that receives a signal after n_batches batches."""
    left = iter(range(n_batches, -1, -1))

    def check() -> None:
        if next(left) == 0:
            raise Interrupted(signal.SIGTERM)

    with patch("data.dataset.check", check):
        try:
            train()
        except Interrupted as stop:
            say(str(stop))
            return
    raise AssertionError("the training ended before it could be stopped")


def difference(*files: Path) -> float:
    """Largest difference of a weight between two checkpoints."""
    one, other = (
        content.get("members", [content.get("model")])
        for content in (torch.load(file, map_location="cpu", weights_only=True) for file in files)
    )
    pairs = [(a[name], b[name]) for a, b in zip(one, other, strict=True) for name in a]
    return max(float((a.double() - b.double()).abs().max()) for a, b in pairs)


def resumed_against_uninterrupted(device: Device, results: Path) -> list[Row]:
    """Both stages: interrupted twice in the middle of an epoch and resumed, against an uninterrupted training."""
    build_suite(MockConfig(results_dir=str(results), lmax=LMAX, n_sims=N_SIMS))
    ckpt = {tag: results / "field_compressor_runs" / tag / CHECKPOINT_NAME for tag in ("uninterrupted", "stopped")}

    def stage_1(tag: str) -> object:
        config = CompressorConfig(
            results_dir=str(results),
            lmax=LMAX,
            backbone="efficientnet_b0" if device == "cuda" else "tiny",
            device=device,
            max_epochs=4,
            batch_size=64,
            warmup_steps=10,
            ema_decay=0.9,
            norm_tiles=128,
            tag=tag,
        )
        return run_compressor(config)

    def stage_2(tag: str) -> object:
        config = NPEConfig(ckpt=str(ckpt["uninterrupted"]), max_epochs=6, batch_size=32, device=device, tag=tag)
        return run_npe(config)

    npe_ckpt = {tag: results / "field_npe_runs" / tag / NPE_CHECKPOINT_NAME for tag in ckpt}
    rows = []
    for stage, name, files in ((stage_1, "stage 1", ckpt), (stage_2, "stage 2", npe_ckpt)):
        stage("uninterrupted")
        for n_batches in (4, 15):  # in the first epoch, and in a later one
            stopped_after(n_batches, lambda stage=stage: stage("stopped"))  # type: ignore[misc]
        stage("stopped")
        what = f"{name}, interrupted twice and resumed against uninterrupted: largest difference of a weight"
        rows.append(Row(what, "", [difference(*files.values())], target="0"))
    return rows


def peak_memory(nside: int, device: torch.device) -> Row | None:
    """Memory that two training steps at the defaults add to what was in use; None if the card is too small."""
    dtype = pick_precision("auto", device, "efficientnet_v2_s")
    estimate = bytes_of_a_step("efficientnet_v2_s", dtype, BATCH, nside, N_BINS, training=True)
    if estimate > free_memory_of(device):
        return None
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    model = FieldLevelCompressor("efficientnet_v2_s", N_BINS, len(FOM_PARAMS), dtype).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    kappa = torch.randn(BATCH, N_BINS, nside, nside, device=device).to(memory_format=torch.channels_last)
    for _ in range(2):  # the optimiser has its moments from the second on
        loss = functional.mse_loss(model(kappa), torch.zeros(BATCH, len(FOM_PARAMS), device=device))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
    peak = torch.cuda.max_memory_allocated(device) - before
    what = f"peak memory of a step, efficientnet_v2_s, batch {BATCH}, {nside} x {nside}; limit: the estimate"
    return Row(what, "GB", [peak / 1e9], [estimate / 1e9], target="0.9 ... 1.05")


@exit_on_user_error
def main() -> None:
    """Run all, print one table, write gpu.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--results-dir", type=Path, default=Path("build/bench"))
    options = parser.parse_args()
    device = pick_device(options.device)
    on_gpu = device.type == "cuda"
    with tempfile.TemporaryDirectory() as folder:
        rows = resumed_against_uninterrupted(options.device, Path(folder))
    cases = STEP_CASES if on_gpu else [train_step.Case("tiny", 64, 32, 2, 1)]
    rows += [train_step.measure(case, device, "auto") for case in cases]
    sizes: dict[Backbone, tuple[int, int]] = npe_epoch.CASES if on_gpu else {"tiny": (64, 16)}
    rows += [npe_epoch.measure(backbone, *size, device) for backbone, size in sizes.items()]
    if on_gpu:
        rows += [row for nside in NSIDES if (row := peak_memory(nside, device))]
    report(rows, device, options.results_dir / "gpu.json")


if __name__ == "__main__":
    main()
