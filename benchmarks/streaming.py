"""Tiles that stay on the disk against tiles in memory: `python benchmarks/streaming.py`.

One epoch of stage 1 (tiny, 512 x 512 pixels, as at lmax 1000) by its command, with --tiles-on device and with
--tiles-on disk, for two suites, one twice as large as the other. It measures the time of an epoch, and the peak of the
memory that the system cannot take back (RssAnon; Linux). The tiles are white noise.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np
import torch

from benchmarks.measure import ROUNDS, Row, in_turns, report
from common.artifacts import COMPRESSOR_RUNS
from common.progress import METRICS_NAME, read_metrics
from common.results import read_result
from compress.result import RESULT_NAME, CompressorResult
from data.config import FIDUCIAL_SIM_ID, TilesOn
from data.mock.nz import N_BINS
from data.schema import PARAM_NAMES, TILES_PER_SIM, nside_of, s8_of, tile_keys
from data.write_shards import open_shard

LMAX, LEVEL, BATCH_SIZE = 1000, "des_y3", 8
CHILD = """
import json, sys, threading, time
from pathlib import Path
peak, done = 0, False
def watch():
    global peak
    while not done:
        lines = Path("/proc/self/status").read_text().splitlines()
        peak = max(peak, next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")))
        time.sleep(0.02)
thread = threading.Thread(target=watch)
thread.start()
import run_compressor
sys.argv = ["run_compressor.py", *sys.argv[1:]]
try:
    run_compressor.main()
finally:
    done = True
    thread.join()
print(json.dumps(peak / 1e6))
"""


def write_suite(folder: Path, n_sims: int) -> None:
    """Shards of white noise with made-up cosmologies, one simulation a shard."""
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True)
    nside = nside_of(LMAX)
    others = (k for k in range(1, n_sims + 1) if k != FIDUCIAL_SIM_ID)
    for sim_id in [FIDUCIAL_SIM_ID, *others][:n_sims]:
        kappa = rng.standard_normal((TILES_PER_SIM, N_BINS, nside, nside), dtype=np.float32)
        params = dict(zip(PARAM_NAMES, rng.uniform(0.3, 0.9, len(PARAM_NAMES)), strict=True))
        params["S8"] = s8_of(params["sigma_8"], params["Omega_m"])
        with open_shard(folder / f"shard_{sim_id:04d}.parquet", {}) as shard:
            shard.write(kappa, tile_keys(sim_id), np.tile([*params.values()], (TILES_PER_SIM, 1)), LEVEL)


def epoch(scratch: Path, tiles_on: TilesOn, n_sims: int) -> tuple[float, float]:
    """Milliseconds per training tile of an epoch, and the peak of the memory in GB."""
    results = scratch / "results"
    options = f"--lmax {LMAX} --noise-level {LEVEL} --tag {tiles_on} --restart --tiles-on {tiles_on} --device cpu"
    options += f" --backbone tiny --max-epochs 1 --batch-size {BATCH_SIZE} --norm-tiles 0"
    command = [sys.executable, "-c", CHILD, *options.split()]
    command += ["--tiles-dir", str(scratch / str(n_sims)), "--results-dir", str(results)]
    done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    run = Path(results, COMPRESSOR_RUNS, tiles_on)
    n_tiles = read_result(run / RESULT_NAME, CompressorResult, "stage 1").n_tiles["train"]
    seconds = float(read_metrics(run / METRICS_NAME)["seconds"][-1])
    return 1e3 * seconds / n_tiles, float(json.loads(done.stdout.splitlines()[-1]))


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n-sims", type=int, default=20, help="of the larger suite")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--results-dir", type=Path, default=Path("build/bench"))
    options = parser.parse_args()
    scratch = (options.results_dir / "streaming").resolve()
    shutil.rmtree(scratch, ignore_errors=True)
    half, full = options.n_sims // 2, options.n_sims
    for n_sims in (half, full):
        write_suite(scratch / str(n_sims), n_sims)
    cases: list[tuple[TilesOn, int]] = [("device", half), ("device", full), ("disk", half), ("disk", full)]
    memory: dict[tuple[TilesOn, int], list[float]] = {case: [] for case in cases}

    def run(case: tuple[TilesOn, int]) -> float:
        per_tile, peak = epoch(scratch, *case)
        memory[case].append(peak)
        return per_tile

    ways = {f"{tiles_on} {n_sims}": lambda case=(tiles_on, n_sims): run(case) for tiles_on, n_sims in cases}
    found = in_turns(ways, "streaming", options.rounds)  # type: ignore[arg-type]
    on_disk, half_on_disk, on_device = (memory[case][1:] for case in (("disk", full), ("disk", half), ("device", full)))
    nside = nside_of(LMAX)
    size = full * TILES_PER_SIM * N_BINS * nside**2 * 4 / 1e9
    what = f"{full * TILES_PER_SIM} tiles of {nside} x {nside}, {size:.1f} GB"
    rows = [
        Row(
            f"epoch with tiles on disk against tiles in memory, {what}",
            "ms/tile",
            found[f"disk {full}"],
            found[f"device {full}"],
            target="<= 1.05",
        ),
        Row("... memory, against half as many tiles", "GB", on_disk, half_on_disk, on_device, "1"),
    ]
    report(rows, torch.device("cpu"), options.results_dir / "streaming.json")
    shutil.rmtree(scratch)


if __name__ == "__main__":
    main()
