"""The mock suite against its transforms and rotations alone: `python benchmarks/mock_suite.py`.

ours    data.mock.simulation.simulate and everything around it: theory, random numbers, shards; all cores
limit   the same spherical-harmonic transforms and rotations on made-up coefficients, the same worker processes

Seconds for --n-sims simulations at lmax 200, the workers' start included in both.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import ducc0
import numpy as np
import torch

from benchmarks.measure import ROUNDS, Row, in_turns, report, seconds
from common.machine import usable_cores
from data.mock.config import MockConfig
from data.mock.fields import band_of
from data.mock.nz import N_BINS
from data.mock.suite import build_suite
from data.schema import nside_of
from data.sphere.tiles import tiles_of_alm
from data.workers import in_order, worker_pool

LMAX = 200


def transforms(lmax: int) -> int:
    """The transforms and rotations of one simulation."""
    band = band_of(lmax, "lognormal")
    n_alm = (band + 1) * (band + 2) // 2
    alm = np.ones((1, n_alm), dtype=np.complex128)
    n_phi = ducc0.fft.good_size(2 * band + 1, True)
    kappa = []
    for _ in range(N_BINS):
        sky = ducc0.sht.synthesis_2d(alm=alm, spin=0, lmax=band, geometry="GL", ntheta=band + 1, nphi=n_phi, nthreads=1)
        kappa.append(ducc0.sht.analysis_2d(map=sky, spin=0, lmax=lmax, geometry="GL", nthreads=1)[0])
    return len(tiles_of_alm(np.stack(kappa), lmax, nside_of(lmax), "disjoint"))


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
