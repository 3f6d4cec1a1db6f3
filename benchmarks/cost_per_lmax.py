"""Disk, memory and time for each lmax: `python benchmarks/cost_per_lmax.py` (some minutes on two cores).

Prints the table of docs/hardware.md, headed by processor, cores and versions. Costs are proportional to the numbers of
simulations and tiles, so it measures a few and scales: the mock suite on all cores, and a training step (forward and
backward, random tiles in memory, float32, channels_last) per tile.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch

from benchmarks.measure import processor
from common.device import pick_device
from common.versions import versions
from compress.model import FieldLevelCompressor
from data.mock.nz import N_BINS
from data.schema import FOM_PARAMS, LMAX_TO_NSIDE, TILES_PER_SIM

N_SUITE = 791
BATCH = {128: 64, 256: 16, 512: 4}


def mock_cost(lmax: int) -> tuple[float, float]:
    """Seconds per simulation on all cores, without the start, and bytes per tile."""
    n_more = max(4, 100 * 200**2 // lmax**2)
    seconds = []
    with tempfile.TemporaryDirectory() as results:
        for n in (2, 2 + n_more):
            options = ["--results-dir", results, "--lmax", str(lmax), "--n-sims", str(n), "--restart"]
            start = time.perf_counter()
            subprocess.run([sys.executable, ROOT / "run_mock.py", *options], check=True, capture_output=True)
            seconds.append(time.perf_counter() - start)
        size = sum(path.stat().st_size for path in Path(results).rglob("*.parquet")) / ((2 + n_more) * TILES_PER_SIM)
    return (seconds[1] - seconds[0]) / n_more, size


def step_cost(backbone: str, nside: int) -> float:
    """Milliseconds per tile, forward and backward, the best of five batches."""
    torch.manual_seed(0)
    model = FieldLevelCompressor(backbone, N_BINS, len(FOM_PARAMS))  # type: ignore[arg-type]
    kappa = torch.randn(BATCH[nside], N_BINS, nside, nside).to(memory_format=torch.channels_last)
    times = []
    for _ in range(6):
        start = time.perf_counter()
        model(kappa).square().mean().backward()
        times.append(time.perf_counter() - start)
    return 1e3 * min(times[1:]) / BATCH[nside]


def main() -> None:
    """Measure and print."""
    pick_device("cpu")  # sets up the allocator as the commands do
    print(f"{processor()}, {os.cpu_count()} cores, " + ", ".join(f"{k} {v}" for k, v in versions().items()))
    columns = ["lmax", "N", "disk", "tiles in memory", "mock suite", "tiny, ms/tile", "b0, ms/tile"]
    print("| " + " | ".join(columns) + " |")
    print("|---|---|---|---|---|---|---|")
    for lmax, nside in LMAX_TO_NSIDE.items():
        per_sim, per_tile = mock_cost(lmax)
        n_tiles = N_SUITE * TILES_PER_SIM
        array = n_tiles * N_BINS * nside**2 * 4
        tiny, b0 = (step_cost(name, nside) for name in ("tiny", "efficientnet_b0"))
        print(
            f"| {lmax} | {nside} | {per_tile * n_tiles / 1e9:.2f} GB | {array / 1e9:.2f} GB "
            f"| {per_sim * N_SUITE:.0f} s "
            f"| {tiny:.1f} | {b0:.1f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
