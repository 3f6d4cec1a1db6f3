"""All timings in one table: `make bench` (50 simulations) or `make bench-full` (791).

Runs the scripts of QUICK one after the other, prints one table, and writes
bench.json with hardware and versions. Nothing else should run at the same time.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.measure import Row, report
from common.device import pick_device

QUICK = {
    "train_step": [],
    "npe_epoch": [],
    "several_processes": [],
    "reading": ["--n-sims", "100"],
    "streaming": ["--n-sims", "20"],
    "mock_suite": ["--n-sims", "50"],
}
FULL = QUICK | {
    "reading": ["--n-sims", "791", "--rounds", "1", "--without-datasets"],
    "streaming": ["--n-sims", "100", "--rounds", "1"],
    "mock_suite": ["--n-sims", "791", "--rounds", "1"],
}


def main() -> None:
    """Run all, print one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true")
    parser.add_argument("--results-dir", type=Path, default=Path("build/bench"))
    options = parser.parse_args()
    rows = []
    for name, arguments in (FULL if options.full else QUICK).items():
        script = ROOT / "benchmarks" / f"{name}.py"
        command = [sys.executable, str(script), "--results-dir", str(options.results_dir), *arguments]
        subprocess.run(command, check=True)
        content = json.loads((options.results_dir / f"{name}.json").read_text())
        rows += [Row(**row) for row in content["rows"]]
    name = "bench_full" if options.full else "bench"
    report(rows, pick_device("auto"), options.results_dir / f"{name}.json")


if __name__ == "__main__":
    main()
