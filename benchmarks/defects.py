"""Tiles of fresh lognormal simulations, as they are and with a defect, for benchmarks/predict_power.py.

Worker processes import this file, so it does not import torch.
"""

from __future__ import annotations

import numpy as np
import pyccl

from common.machine import usable_cores
from common.progress import Progress
from data.mock.fields import band_of, lognormal_alm
from data.mock.make_theory_table import ELL, ccl_universe
from data.mock.nz import N_BINS, nz_of_bins
from data.mock.shift import lognormal_shift
from data.mock.theory import BIN_PAIRS, theory_cl
from data.schema import nside_of
from data.sphere.harmonics import noise_alm
from data.sphere.tiles import tiles_of_alm
from data.workers import in_order, worker_pool

SEED, FIRST_ID = 987_654_321, 2_000_000  # sim_ids, and so skies, that no suite has
NOISE_FACTOR, STRIPES, DELTA_Z = 1.2, 0.5, 0.1
PERIODS = (4, 8, 16, 32)  # of the stripes, in pixels


def ratio_of_shifted(cosmo: np.ndarray) -> np.ndarray:
    """C_ell with the sources of bin 1 moved by DELTA_Z over those without: (10, n_ell) at ELL."""
    universe = ccl_universe(cosmo)
    z = np.linspace(1e-4, 4.0, 801)
    usual = nz_of_bins(z)
    moved = np.concatenate([nz_of_bins(z - DELTA_Z)[:1], usual[1:]])

    def spectra(nz: np.ndarray) -> np.ndarray:
        tracers = [pyccl.WeakLensingTracer(universe, dndz=(z, n)) for n in nz]
        return np.stack([pyccl.angular_cl(universe, tracers[i], tracers[j], ELL) for i, j in BIN_PAIRS])

    return spectra(moved) / spectra(usual)


def tiles_of(job: tuple[int, np.ndarray, int, str]) -> dict[str, np.ndarray]:
    """Signal, signal with moved sources, and noise of one simulation: float32 (12, 4, N, N) each."""
    sim_id, cosmo, lmax, noise_level = job
    band = band_of(lmax, "lognormal")
    cl = theory_cl(cosmo[None], band)[0]  # (10, band + 1)
    shift = lognormal_shift(cosmo)  # (4,)
    ell = np.maximum(np.arange(band + 1), ELL[0])
    ratio = np.stack([np.interp(np.log(ell), np.log(ELL), one) for one in ratio_of_shifted(cosmo)])
    alms = {
        "signal": lognormal_alm(cl, shift, lmax, np.random.default_rng([SEED, sim_id, 0])),
        "moved": lognormal_alm(cl * ratio, shift, lmax, np.random.default_rng([SEED, sim_id, 0])),
        "noise": noise_alm(noise_level, N_BINS, lmax, np.random.default_rng([SEED, sim_id, 1])),
    }
    return {name: tiles_of_alm(alm, lmax, nside_of(lmax), "disjoint") for name, alm in alms.items()}


def fresh_tiles(cosmologies: np.ndarray, lmax: int, noise_level: str) -> dict[str, np.ndarray]:
    """Tiles of simulations with cosmologies (n, 7), ordinary and with each defect: float32 (12 n, 4, N, N) each."""
    jobs = [(FIRST_ID + k, cosmo, lmax, noise_level) for k, cosmo in enumerate(cosmologies)]
    made = []
    with worker_pool(usable_cores()) as pool, Progress("fresh skies", len(jobs), "simulations") as progress:
        for one in in_order(pool, tiles_of, jobs, 4):
            made.append(one)
            progress.advance()
    signal, moved, noise = (np.concatenate([one[name] for one in made]) for name in ("signal", "moved", "noise"))
    ordinary = signal + noise
    sigma = ordinary.std(axis=(0, 2, 3), keepdims=True)  # (1, 4, 1, 1)
    kinds = {"ordinary": ordinary, f"noise x {NOISE_FACTOR}": signal + np.float32(NOISE_FACTOR) * noise}
    x = np.arange(signal.shape[-1])
    for period in PERIODS:
        wave = np.float32(STRIPES) * sigma * np.sqrt(2) * np.sin(2 * np.pi * x / period + 0.5)  # (1, 4, 1, N)
        kinds[f"stripes of {STRIPES} sigma, {period} pixels"] = (ordinary + wave).astype(np.float32)
    return kinds | {f"bin 1 moved by {DELTA_Z} in z": moved + noise}
