"""Build a mock suite: cosmologies, skies, noise, tiles, shards."""

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from common.artifacts import tiles_folder
from common.interrupt import result_of
from common.lock import exclusive
from common.machine import usable_cores
from common.progress import Progress
from data.mock.config import MockConfig
from data.mock.cosmology import FIDUCIAL_COSMO, design, params_of
from data.mock.fields import band_of
from data.mock.simulation import Simulation, simulate
from data.mock.theory import theory_cl
from data.schema import SIMS_PER_SHARD, TILES_PER_SIM, nside_of, tile_keys
from data.shard_metadata import METADATA_KEY
from data.suite_folder import describe, finish_suite, finished_shards
from data.workers import in_order, worker_pool
from data.write_shards import open_shard

FRESH_SEED_OFFSET = 1_000_000_007  # far from any seed that a user would give
DESCRIBED = ("lmax", "nside", "noise_level", "n_sims", "field", "vary", "seed", "fresh", "fiducial_sim_id")


def build_suite(config: MockConfig, on_checkpoint: Callable[[], None] = lambda: None) -> dict[str, Any]:
    """Write the shards of a suite that are not finished.

    on_checkpoint is called after every shard (Modal commits its Volume).

    Returns:
        folder, n_sims, n_tiles, nside, elapsed_s.

    Raises:
        UserError: the folder holds other shards, or cannot be written.
    """
    start = time.monotonic()
    folder = tiles_folder(config.tiles_dir, config.results_dir, config.lmax, config.noise_level, fresh=config.fresh)
    nside = nside_of(config.lmax, config.nside)
    seed = config.seed + FRESH_SEED_OFFSET * config.fresh
    sim_ids, cosmologies = design(config.n_sims, seed, None if config.fresh else config.fiducial_sim_id, config.vary)
    theory_cl(cosmologies[:1], band_of(config.lmax, config.field))  # refuses an lmax beyond the table
    jobs = [
        Simulation(int(sim_id), cosmo, config.field, config.noise_level, config.lmax, nside, config.geometry, seed)
        for sim_id, cosmo in zip(sim_ids, cosmologies, strict=True)
    ]
    # So that shards of an earlier version, whose shift was one for all cosmologies, are not mixed with these.
    shift = {"lognormal_shift": "of each cosmology"} if config.field == "lognormal" else {}
    description = describe(config.geometry, {name: getattr(config, name) for name in DESCRIBED} | shift)
    with exclusive(folder):
        finished = finished_shards(folder, description, config.restart)
        batches = [jobs[first : first + SIMS_PER_SHARD] for first in range(0, len(jobs), SIMS_PER_SHARD)]
        shards = {folder / f"shard_{k:04d}.parquet": batch for k, batch in enumerate(batches)}
        if missing := {path: batch for path, batch in shards.items() if path not in finished}:
            _simulate_shards(missing, description, config.workers or usable_cores(), on_checkpoint)
        finish_suite(folder, params_of(cosmologies), params_of(FIDUCIAL_COSMO[None])[0])
        on_checkpoint()
    return {
        "folder": str(folder),
        "n_sims": config.n_sims,
        "n_tiles": config.n_sims * TILES_PER_SIM,
        "nside": nside,
        "elapsed_s": round(time.monotonic() - start, 1),
    }


def _simulate_shards(
    shards: dict[Path, list[Simulation]], description: str, n_workers: int, on_checkpoint: Callable[[], None]
) -> None:
    """Write one shard after another; a thread syncs and closes files while the workers simulate."""
    jobs = [job for batch in shards.values() for job in batch]
    n_workers = min(n_workers, len(jobs))
    with (
        ThreadPoolExecutor(1) as disk,
        worker_pool(n_workers) as pool,
        Progress("simulating", len(jobs), "simulations") as progress,
    ):
        simulated = in_order(pool, simulate, jobs, ahead=2 * n_workers)
        syncing = closing = disk.submit(lambda: None)
        for path, batch in shards.items():
            with ExitStack() as opened:
                shard = opened.enter_context(open_shard(path, {METADATA_KEY: description}))
                for job in batch:
                    params = np.tile(params_of(job.cosmo[None]), (TILES_PER_SIM, 1))  # (12, 8)
                    shard.write(next(simulated), tile_keys(job.sim_id), params, job.noise_level)
                    progress.advance()
                    if syncing.done():
                        syncing = disk.submit(shard.sync)
                result_of(closing)  # of the shard before
                on_checkpoint()
                closing = disk.submit(opened.pop_all().close)
        result_of(closing)
        on_checkpoint()
