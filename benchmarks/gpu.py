"""What only a real GPU can show, in one table: `make gpu`, under ten minutes on one card.

- Both stages, a few epochs: interrupted in mid-epoch and resumed, against the same training whole. Largest difference
  of a weight; 0 if the card's kernels are deterministic.
- The training step and the NPE epoch against their limits, as in train_step.py and npe_epoch.py.
- Peak memory of a training step of efficientnet_v2_s with 128 tiles, against the estimate by which tiles are held.

What a GPU need not show, that no operation mixes devices and no step waits for a copy, is in tests/test_cuda.py.
`--device cpu` tries the script out, without peak memory and with the smallest network alone.
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
from common.device import free_memory_of, pick_device, pick_precision
from common.errors import exit_on_user_error, say
from common.interrupt import Interrupted
from common.machine import Device
from compress.config import CompressorConfig
from compress.memory import bytes_of_a_step
from compress.model import CHECKPOINT_NAME, FieldLevelCompressor
from compress.train import train_compressor
from data.mock.config import MockConfig
from data.mock.nz import N_BINS
from data.mock.suite import build_suite
from npe.config import NPEConfig
from npe.model import CHECKPOINT_NAME as NPE_CHECKPOINT_NAME
from npe.train import train_npe

LMAX, N_SIMS = 100, 60
BATCH = 128
NSIDES = (128, 256, 512)
STEP_CASES = [("tiny", 128, 128, 8, 2), ("efficientnet_b0", 128, 128, 8, 2), ("efficientnet_v2_s", 128, 128, 8, 2)]


def stopped_after(n_batches: int, train: Callable[[], object]) -> None:
    """Run a training that hears a signal after so many batches."""
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


def resumed_against_whole(device: Device, results: Path) -> list[Row]:
    """Both stages, interrupted twice in mid-epoch."""
    build_suite(MockConfig(results_dir=str(results), lmax=LMAX, n_sims=N_SIMS))
    ckpt = {tag: results / "field_compressor_runs" / tag / CHECKPOINT_NAME for tag in ("whole", "stopped")}

    def stage_1(tag: str) -> object:
        config = CompressorConfig(
            results_dir=str(results), lmax=LMAX, backbone="efficientnet_b0" if device == "cuda" else "tiny",
            device=device, max_epochs=4, batch_size=64, warmup_steps=10, ema_decay=0.9, norm_tiles=128, tag=tag,
        )  # fmt: skip
        return train_compressor(config)

    def stage_2(tag: str) -> object:
        return train_npe(NPEConfig(ckpt=str(ckpt["whole"]), max_epochs=6, batch_size=32, device=device, tag=tag))

    rows = []
    for stage, name in ((stage_1, "stage 1"), (stage_2, "stage 2")):
        stage("whole")
        for n_batches in (4, 15):  # of the first epoch, and of a later one
            stopped_after(n_batches, lambda stage=stage: stage("stopped"))  # type: ignore[misc]
        stage("stopped")
        files = ckpt if stage is stage_1 else {
            tag: results / "field_npe_runs" / tag / NPE_CHECKPOINT_NAME for tag in ckpt
        }  # fmt: skip
        what = f"{name}, interrupted twice and resumed against whole: largest difference of a weight"
        rows.append(Row(what, "", [difference(*files.values())], target="0"))
    return rows


def peak_memory(nside: int, device: torch.device) -> Row | None:
    """Of two training steps at the defaults, beside what was there before; None where the card is too small."""
    dtype = pick_precision("auto", device, "efficientnet_v2_s")
    estimate = bytes_of_a_step("efficientnet_v2_s", dtype, BATCH, nside, training=True)
    if estimate > free_memory_of(device):
        return None
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    model = FieldLevelCompressor("efficientnet_v2_s", dtype).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    kappa = torch.randn(BATCH, N_BINS, nside, nside, device=device).to(memory_format=torch.channels_last)
    for _ in range(2):  # the optimiser's moments are there from the second on
        loss = functional.mse_loss(model(kappa), torch.zeros(BATCH, 2, device=device))
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
        rows = resumed_against_whole(options.device, Path(folder))
    cases = STEP_CASES if on_gpu else [("tiny", 64, 32, 2, 1)]
    rows += [train_step.measure(*case, device, "auto") for case in cases]  # type: ignore[arg-type]
    sizes = npe_epoch.CASES if on_gpu else {"tiny": (64, 16)}
    rows += [npe_epoch.measure(backbone, *size, device) for backbone, size in sizes.items()]  # type: ignore[arg-type]
    if on_gpu:
        rows += [row for nside in NSIDES if (row := peak_memory(nside, device))]
    report(rows, device, options.results_dir / "gpu.json")


if __name__ == "__main__":
    main()
