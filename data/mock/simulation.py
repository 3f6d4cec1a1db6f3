"""One simulation of the mock suite. Every worker process imports this file, so it imports little."""

from dataclasses import dataclass

import numpy as np

from data.mock.fields import signal_alm
from data.mock.flat import flat_tiles
from data.schema import TILES_PER_SIM
from data.sphere.harmonics import noise_alm
from data.sphere.tiles import tiles_of_alm


@dataclass(frozen=True)
class Simulation:
    """What determines the tiles of one simulation: its number and cosmology (7,), and options as in MockConfig."""

    sim_id: int
    cosmo: np.ndarray
    field: str
    noise_level: str
    lmax: int
    nside: int
    geometry: str
    seed: int


def simulate(sim: Simulation) -> np.ndarray:
    """The twelve tiles of one simulation, float32 (12, 4, N, N)."""
    seeds = np.random.SeedSequence([sim.seed, sim.sim_id]).spawn(2)
    signal_rng, noise_rng = map(np.random.default_rng, seeds)
    if sim.geometry == "flat":
        return flat_tiles(sim.cosmo, sim.noise_level, sim.lmax, sim.nside, TILES_PER_SIM, signal_rng, noise_rng)
    signal = signal_alm(sim.cosmo, sim.field, sim.lmax, signal_rng)  # (4, n_alm)
    noise = noise_alm(sim.noise_level, len(signal), sim.lmax, noise_rng)
    return tiles_of_alm(signal + noise, sim.lmax, sim.nside, sim.geometry)
