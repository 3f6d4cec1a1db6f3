"""Tiles that stay on the disk against tiles in memory: `python benchmarks/streaming.py`.

One epoch of stage 1 (tiny, 512 x 512 pixels, the size of lmax 1000) by its command, once with --tiles-on device and
once with --tiles-on disk, from the cache of two suites, one twice as large as the other. Time of an epoch, and the
peak of the memory that cannot be given back to the system (RssAnon; Linux). Tiles are white noise written straight
into the cache's format, so that nothing but feeding differs. Header of the output: processor, cores, versions.
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
from data.config import TilesOn
from data.mock.nz import N_BINS
from data.schema import PARAM_NAMES, TILES_PER_SIM
from data.write_shards import open_shard

LMAX, NSIDE, LEVEL, BATCH = 1000, 512, "des_y3", 8
PLACES: tuple[TilesOn, ...] = ("device", "disk")
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
    for sim_id in [109, *(k for k in range(1, n_sims + 1) if k != 109)][:n_sims]:
        kappa = rng.standard_normal((TILES_PER_SIM, N_BINS, NSIDE, NSIDE), dtype=np.float32)
        params = rng.uniform(0.3, 0.9, len(PARAM_NAMES))
        params[PARAM_NAMES.index("S8")] = params[PARAM_NAMES.index("sigma_8")] * np.sqrt(
            params[PARAM_NAMES.index("Omega_m")] / 0.3
        )
        tile = np.arange(TILES_PER_SIM)
        keys = np.stack([np.full(TILES_PER_SIM, sim_id), tile // 4, tile % 4], axis=1)
        with open_shard(folder / f"shard_{sim_id:04d}.parquet", {}) as shard:
            shard.write(kappa, keys, np.tile(params, (TILES_PER_SIM, 1)), LEVEL)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n-sims", type=int, default=20, help="of the larger suite")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--results-dir", type=Path, default=Path("build/bench"))
    options = parser.parse_args()
    scratch = (options.results_dir / "streaming").resolve()
    shutil.rmtree(scratch, ignore_errors=True)
    sizes = (options.n_sims // 2, options.n_sims)
    for n_sims in sizes:
        write_suite(scratch / str(n_sims), n_sims)
    memory: dict[str, list[float]] = {}

    def run(tiles_on: TilesOn, n_sims: int) -> float:
        command = [sys.executable, "-c", CHILD, "--lmax", LMAX, "--tiles-dir", scratch / str(n_sims)]
        command += ["--results-dir", scratch / "results", "--tag", tiles_on, "--restart", "--backbone", "tiny"]
        command += ["--max-epochs", 1, "--batch-size", BATCH, "--tiles-on", tiles_on]
        done = subprocess.run([str(c) for c in command], cwd=ROOT, check=True, capture_output=True, text=True)
        memory.setdefault(f"{tiles_on} {n_sims}", []).append(json.loads(done.stdout.splitlines()[-1]))
        metrics = (scratch / "results" / "field_compressor_runs" / tiles_on / "metrics.jsonl").read_text()
        return 1e3 * json.loads(metrics.splitlines()[-1])["seconds"] / (int(0.7 * (n_sims - 1)) * TILES_PER_SIM)

    cases = [(place, n_sims) for place in PLACES for n_sims in sizes]
    found = in_turns(
        {f"{place} {n}": lambda place=place, n=n: run(place, n) for place, n in cases},  # type: ignore[misc]
        "streaming",
        options.rounds,
    )
    memory = {name: values[1:] for name, values in memory.items()}
    half, full = (f"disk {n}" for n in sizes)
    held = f"device {options.n_sims}"
    size = options.n_sims * TILES_PER_SIM * N_BINS * NSIDE**2 * 4 / 1e9
    what = f"{options.n_sims * TILES_PER_SIM} tiles of {NSIDE} x {NSIDE}, {size:.1f} GB"
    rows = [
        Row(f"streamed epoch against held, {what}", "ms/tile", found[full], found[held], (), "<= 1.05"),
        Row("... memory, against half as many tiles", "GB", memory[full], memory[half], memory[held], "1"),
    ]
    report(rows, torch.device("cpu"), options.results_dir / "streaming.json")
    shutil.rmtree(scratch)


if __name__ == "__main__":
    main()
