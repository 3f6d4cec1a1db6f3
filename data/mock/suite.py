"""Build a mock suite: cosmologies, skies, noise, tiles, shards."""

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from common.artifacts import NONE, tiles_folder
from common.interrupt import result_of
from common.lock import exclusive
from common.machine import usable_cores
from common.progress import Progress
from data.config import nuisance_list
from data.mock.config import MockConfig
from data.mock.cosmology import FIDUCIAL_COSMO, design, params_of
from data.mock.fields import band_of
from data.mock.nz import N_BINS, nz_of_bins
from data.mock.shift import N_Z, Z_MAX
from data.mock.simulation import Simulation, simulate
from data.mock.theory import theory_cl
from data.nuisance import Prior, check_shifts, described, draw, priors_of, read_priors
from data.schema import SIMS_PER_SHARD, TILES_PER_SIM, nside_of, tile_keys
from data.shard_metadata import METADATA_KEY
from data.suite_folder import describe, finish_suite, finished_shards
from data.workers import in_order, worker_pool
from data.write_shards import open_shard

FRESH_SEED_OFFSET = 1_000_000_007  # far from any seed that a user would give
DESCRIBED = ("lmax", "nside", "noise_level", "n_sims", "field", "vary", "seed", "fresh", "fiducial_sim_id")


def build_suites(config: MockConfig, on_checkpoint: Callable[[], None] = lambda: None) -> list[dict[str, Any]]:
    """A suite with each --nuisance, one after the other; priors that cannot be used are refused before the first."""
    priors = config.nuisance_priors
    configs = [
        replace(config, nuisance=one, nuisance_priors="" if one == NONE else priors)
        for one in nuisance_list(config.nuisance)
    ]
    for one in configs:
        _jobs(one)
    return [build_suite(one, on_checkpoint) for one in configs]


def build_suite(config: MockConfig, on_checkpoint: Callable[[], None] = lambda: None) -> dict[str, Any]:
    """Write the shards of a suite that are not finished.

    on_checkpoint is called after every shard (Modal commits its Volume).

    Returns:
        folder, n_sims, n_tiles, nside, elapsed_s.

    Raises:
        UserError: the folder holds other shards, or cannot be written.
    """
    start = time.monotonic()
    where = config.tiles_dir, config.results_dir, config.lmax, config.noise_level
    folder = tiles_folder(*where, config.nuisance, fresh=config.fresh)
    jobs, priors = _jobs(config)
    # So that shards of an earlier version, whose shift was one for all cosmologies, are not mixed with these.
    shift = {"lognormal_shift": "of each cosmology"} if config.field == "lognormal" else {}
    varied = described(config.nuisance, priors)
    description = describe(config.geometry, {name: getattr(config, name) for name in DESCRIBED} | shift | varied)
    with exclusive(folder):
        finished = finished_shards(folder, description, config.restart)
        batches = [jobs[first : first + SIMS_PER_SHARD] for first in range(0, len(jobs), SIMS_PER_SHARD)]
        shards = {folder / f"shard_{k:04d}.parquet": batch for k, batch in enumerate(batches)}
        if missing := {path: batch for path, batch in shards.items() if path not in finished}:
            _simulate_shards(missing, description, config.workers or usable_cores(), on_checkpoint)
        finish_suite(folder, params_of(np.stack([job.cosmo for job in jobs])), params_of(FIDUCIAL_COSMO[None])[0])
        on_checkpoint()
    return {
        "folder": str(folder),
        "n_sims": config.n_sims,
        "n_tiles": config.n_sims * TILES_PER_SIM,
        "nside": jobs[0].nside,
        "elapsed_s": round(time.monotonic() - start, 1),
    }


def _jobs(config: MockConfig) -> tuple[list[Simulation], dict[str, Prior]]:
    """Its simulations, and the priors of the nuisances that vary; UserError for an lmax or priors of no use."""
    nside = nside_of(config.lmax, config.nside)
    seed = config.seed + FRESH_SEED_OFFSET * config.fresh
    fiducial = None if config.fresh else config.fiducial_sim_id
    sim_ids, cosmologies = design(config.n_sims, seed, fiducial, config.vary)
    theory_cl(cosmologies[:1], band_of(config.lmax, config.field))  # refuses an lmax beyond the table
    priors = priors_of(config.nuisance, read_priors(config.nuisance_priors), N_BINS)
    draws = [draw(priors, seed, int(sim_id), fiducial=sim_id == fiducial) for sim_id in sim_ids]
    check_shifts(z := np.linspace(0, Z_MAX, N_Z), nz_of_bins(z), draws, Z_MAX)
    options = config.field, config.noise_level, config.lmax, nside, config.geometry, seed
    jobs = [
        Simulation(int(sim_id), cosmo, *options, nuisances)
        for sim_id, cosmo, nuisances in zip(sim_ids, cosmologies, draws, strict=True)
    ]
    return jobs, priors


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
                    nuisances = {name: np.repeat(of, TILES_PER_SIM // len(of)) for name, of in job.nuisances.items()}
                    shard.write(next(simulated), tile_keys(job.sim_id), params, job.noise_level, nuisances)
                    progress.advance()
                    if syncing.done():
                        syncing = disk.submit(shard.sync)
                result_of(closing)  # of the shard before
                on_checkpoint()
                closing = disk.submit(opened.pop_all().close)
        result_of(closing)
        on_checkpoint()
