"""A shard of the mock suite: the process that simulates it writes it."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data.mock.cosmology import params_of
from data.mock.simulation import Simulation, simulate
from data.schema import TILES_PER_SIM, tile_keys
from data.shard_metadata import METADATA_KEY
from data.write_shards import open_shard


@dataclass(frozen=True)
class Shard:
    """A file, what lies in it, and the description of the suite that it belongs to."""

    path: Path
    simulations: list[Simulation]
    description: str


def write_shard(shard: Shard) -> Iterator[bool]:
    """Simulate and write; yields False after each simulation, and True when the file is there."""
    with ThreadPoolExecutor(1) as disk, open_shard(shard.path, {METADATA_KEY: shard.description}) as file:
        syncing = disk.submit(lambda: None)
        for sim in shard.simulations:
            params = np.tile(params_of(sim.cosmo[None]), (TILES_PER_SIM, 1))  # (12, 8)
            nuisances = {name: np.repeat(of, TILES_PER_SIM // len(of)) for name, of in sim.nuisances.items()}
            file.write(simulate(sim), tile_keys(sim.sim_id), params, sim.noise_level, nuisances)
            if syncing.done():  # the disk takes what is there while the next simulation is made
                syncing = disk.submit(file.sync)
            yield False
    yield True
