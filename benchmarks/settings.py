"""Which memory format, precision, optimiser and compiler for which network: `python benchmarks/settings.py`.

Forward pass, backward pass and optimiser step on one random batch in memory at 128 x 128. Milliseconds per tile, and
the ratio to channels_last float32 with fused AdamW, not compiled. compress.model.pick_precision is based on it. With
--compile the first compiled step, nothing of which was kept from an earlier run, has a row of its own, in seconds.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch

from benchmarks.measure import Row, in_turns, report, seconds
from common.device import pick_device
from compress.config import Backbone
from compress.model import FieldLevelCompressor
from data.mock.nz import N_BINS
from data.schema import FOM_PARAMS

NSIDE = 128
BATCHES: dict[Backbone, int] = {"tiny": 64, "efficientnet_b0": 32, "efficientnet_v2_s": 8}


def stepper(
    backbone: Backbone,
    device: torch.device,
    memory_format: torch.memory_format,
    dtype: torch.dtype,
    fused: bool = True,
    compiled: bool = False,
) -> tuple[Callable[[], float], float]:
    """A function that does a step and returns how long it took, in milliseconds per tile; seconds of the first step."""
    torch.manual_seed(0)
    batch = BATCHES[backbone]
    model = FieldLevelCompressor(backbone, N_BINS, len(FOM_PARAMS), dtype).to(device).to(memory_format=memory_format)
    kappa = torch.randn(batch, N_BINS, NSIDE, NSIDE, device=device).to(memory_format=memory_format)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=fused)
    network = torch.compile(model) if compiled else model

    def step() -> None:
        loss = network(kappa).square().mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()

    first = seconds(step, device)  # compiles
    return lambda: 1e3 * seconds(step, device) / batch, first


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--backbone", default="", help="only this one")
    parser.add_argument("--compile", action="store_true", help="also torch.compile, which needs a C++ compiler")
    parser.add_argument("--results-dir", type=Path, default=Path("build/bench"))
    options = parser.parse_args()
    device = pick_device(options.device)
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = tempfile.mkdtemp()  # where torch.compile keeps what it has built
    last, first = torch.channels_last, torch.contiguous_format
    rows = []
    for backbone in BATCHES:
        if options.backbone not in ("", backbone):
            continue
        ways = {
            "channels_last, float32": stepper(backbone, device, last, torch.float32),
            "channels_first, float32": stepper(backbone, device, first, torch.float32),
            "channels_last, bf16": stepper(backbone, device, last, torch.bfloat16),
            "channels_first, bf16": stepper(backbone, device, first, torch.bfloat16),
            "channels_last, float32, AdamW not fused": stepper(backbone, device, last, torch.float32, fused=False),
        }
        if options.compile:
            ways["channels_last, float32, compiled"] = stepper(backbone, device, last, torch.float32, compiled=True)
            ways["channels_last, bf16, compiled"] = stepper(backbone, device, last, torch.bfloat16, compiled=True)
        found = in_turns({way: step for way, (step, _) in ways.items()}, backbone)
        base = found["channels_last, float32"]
        rows += [Row(f"{backbone}, {way}", "ms/tile", times, base) for way, times in found.items()]
        rows += [Row(f"{backbone}, {way}: first step", "s", [ways[way][1]]) for way in ways if "compiled" in way]
    report(rows, device, options.results_dir / "settings.json")


if __name__ == "__main__":
    main()
