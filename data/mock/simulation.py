"""One simulation of the mock suite; imports little, because every worker process does."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from data.mock.fields import signal_alm
from data.mock.flat import flat_tiles
from data.schema import TILES_PER_SIM
from data.sphere.harmonics import noise_alm
from data.sphere.tiles import tiles_of_alm


@dataclass(frozen=True)
class Simulation:
    """What a worker needs to make the tiles of one simulation."""

    sim_id: int
    cosmo: np.ndarray  # (7,)
    field: str
    noise_level: str
    lmax: int
    nside: int
    geometry: str
    seed: int


def simulate(simulation: Simulation) -> np.ndarray:
    """The twelve tiles of one simulation, float32 (12, 4, N, N); depends on its argument alone."""
    signal_seed, noise_seed = np.random.SeedSequence([simulation.seed, simulation.sim_id]).spawn(2)
    signal_rng, noise_rng = np.random.default_rng(signal_seed), np.random.default_rng(noise_seed)
    cosmo, noise_level, lmax, nside = (getattr(simulation, k) for k in ("cosmo", "noise_level", "lmax", "nside"))
    if simulation.geometry == "flat":
        return flat_tiles(cosmo, noise_level, lmax, nside, TILES_PER_SIM, signal_rng, noise_rng)
    alm = signal_alm(cosmo, simulation.field, lmax, signal_rng) + noise_alm(noise_level, lmax, noise_rng)  # (4, n_alm)
    return tiles_of_alm(alm, lmax, nside, simulation.geometry)
