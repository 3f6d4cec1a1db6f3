"""The mock suite against its transforms and rotations alone: `python benchmarks/mock_suite.py`.

ours    data.mock.suite.build_suite: theory, random numbers, transforms, rotations and shards, on all cores
limit   the same spherical-harmonic transforms and rotations of made-up coefficients, in the same worker processes

Seconds for --n-sims simulations at lmax 200. Both include the start of the workers.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch

from benchmarks.measure import ROUNDS, Row, in_turns, report, seconds
from benchmarks.transforms import transforms
from common.machine import usable_cores
from data.mock.config import MockConfig
from data.mock.suite import build_suite
from data.workers import in_order, worker_pool

LMAX = 200


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n-sims", type=int, default=50)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--results-dir", type=Path, default=Path("build/bench"))
    options = parser.parse_args()

    def ours() -> None:
        with tempfile.TemporaryDirectory() as folder:
            build_suite(MockConfig(results_dir=folder, lmax=LMAX, n_sims=options.n_sims))

    def limit() -> None:
        with worker_pool(usable_cores()) as pool:
            for _ in in_order(pool, transforms, [LMAX] * options.n_sims, 2 * usable_cores()):
                pass

    found = in_turns({"ours": lambda: seconds(ours), "limit": lambda: seconds(limit)}, "mock suite", options.rounds)
    row = Row(f"mock suite, {options.n_sims} simulations, lmax {LMAX}", "s", **found, target="<= 1.2")
    report([row], torch.device("cpu"), options.results_dir / "mock_suite.json")


if __name__ == "__main__":
    main()
