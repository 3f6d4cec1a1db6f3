"""The mock suite against its transforms and rotations alone: `python benchmarks/mock_suite.py`.

ours    data.mock.suite.build_suite: theory, random numbers, transforms, rotations and shards, on all cores
limit   the same spherical-harmonic transforms and rotations of made-up coefficients, in the same worker processes

Seconds for --n-sims simulations at lmax 200. Both include the start of the workers. What ours takes beyond the limit is
shown by taking it away: first the picture of the suite, then all writing, too. Random numbers and the hashes of the
pixels are measured alone.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np
import torch

from benchmarks.measure import ROUNDS, Row, in_turns, report, seconds
from benchmarks.transforms import random_numbers, transforms
from common.machine import usable_cores
from data.mock.config import MockConfig
from data.mock.nz import N_BINS
from data.mock.suite import build_suite
from data.schema import TILES_PER_SIM, nside_of
from data.tiles import digests_of
from data.workers import in_order, worker_pool

LMAX = 200


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n-sims", type=int, default=50)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--results-dir", type=Path, default=Path("build/bench"))
    options = parser.parse_args()

    def suite(*without: str) -> None:
        with tempfile.TemporaryDirectory() as folder, ExitStack() as patched:
            for name in without:
                patched.enter_context(patch(f"data.mock.suite.{name}"))
            build_suite(MockConfig(results_dir=folder, lmax=LMAX, n_sims=options.n_sims))

    def in_workers(part: Callable[[int], int]) -> None:
        with worker_pool(usable_cores()) as pool:
            for _ in in_order(pool, part, [LMAX] * options.n_sims, 2 * usable_cores()):
                pass

    def hashes() -> None:
        for _ in range(options.n_sims):
            digests_of(tiles)

    tiles = np.zeros((TILES_PER_SIM, N_BINS, nside_of(LMAX), nside_of(LMAX)), np.float32)
    ways = {
        f"mock suite, {options.n_sims} simulations, lmax {LMAX}": suite,
        "... without the picture": lambda: suite("finish_suite"),
        "... nor anything else that is written": lambda: suite("finish_suite", "open_shard"),
        "... random numbers alone": lambda: in_workers(random_numbers),
        "... hashes of the pixels alone": hashes,
        "limit": lambda: in_workers(transforms),
    }
    timed = {what: lambda way=way: seconds(way) for what, way in ways.items()}
    found = in_turns(timed, "mock suite", options.rounds)  # type: ignore[arg-type]
    limit = found.pop("limit")
    rows = [Row(what, "s", values, limit) for what, values in found.items()]
    rows[0] = replace(rows[0], target="<= 1.2")
    report(rows, torch.device("cpu"), options.results_dir / "mock_suite.json")


if __name__ == "__main__":
    main()
