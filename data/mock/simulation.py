"""One simulation of the mock suite. Every worker process imports this file, so it imports little."""

import dataclasses
from dataclasses import dataclass

import numpy as np

from common.machine import keep_freed_memory
from data.mock.fields import signal_alm, with_nuisances
from data.mock.flat import flat_tiles
from data.mock.nz import N_BINS
from data.nuisance import nuisance_of
from data.schema import N_ORIENTATIONS, TILES_PER_SIM
from data.sphere.harmonics import noise_alm
from data.sphere.tiles import tiles_of_alm


@dataclass(frozen=True)
class Simulation:
    """What determines the tiles of one simulation: its number and cosmology (7,), and options as in MockConfig.

    The nuisances are those that vary, by name, (3,) each: of every orientation.
    """

    sim_id: int
    cosmo: np.ndarray
    field: str
    noise_level: str
    lmax: int
    nside: int
    geometry: str
    seed: int
    nuisances: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)


def simulate(sim: Simulation) -> np.ndarray:
    """The twelve tiles of one simulation, float32 (12, 4, N, N)."""
    keep_freed_memory()
    seeds = np.random.SeedSequence([sim.seed, sim.sim_id]).spawn(2)
    signal_rng, noise_rng = map(np.random.default_rng, seeds)
    nuisances = [nuisance_of(sim.nuisances, orientation, N_BINS) for orientation in range(N_ORIENTATIONS)]
    if sim.geometry == "flat":
        size = sim.noise_level, sim.lmax, sim.nside, TILES_PER_SIM
        return flat_tiles(sim.cosmo, *size, signal_rng, noise_rng, nuisances if sim.nuisances else ())
    signal = signal_alm(sim.cosmo, sim.field, sim.lmax, signal_rng)  # (4, n_alm)
    noise = noise_alm(sim.noise_level, len(signal), sim.lmax, noise_rng)
    if sim.nuisances:
        signal = with_nuisances(signal, sim.cosmo, nuisances, sim.lmax)  # (3, 4, n_alm)
    return tiles_of_alm(signal + noise, sim.lmax, sim.nside, sim.geometry)
