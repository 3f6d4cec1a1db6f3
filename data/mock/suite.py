"""Build a mock suite: cosmologies, skies, noise, tiles, shards."""

from __future__ import annotations

import json
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
from common.workers import in_order, worker_pool
from data.mock.config import MockConfig
from data.mock.cosmology import FIDUCIAL, design, params_of
from data.mock.fields import band_of
from data.mock.simulation import Simulation, simulate
from data.mock.theory import theory_cl
from data.pictures import draw_suite
from data.schema import FOM_PARAMS, SIMS_PER_SHARD, TILES_PER_SIM, columns_of, nside_of, tile_keys
from data.shard_metadata import METADATA_KEY, ORIENTATIONS_KEY
from data.sky import ORIENTATIONS
from data.suite_folder import end_restart, finished_shards
from data.write_shards import open_shard

FRESH_SEED_OFFSET = 1_000_000_007  # far from any seed that one would type


def build_suite(config: MockConfig, on_checkpoint: Callable[[], None] = lambda: None) -> dict[str, Any]:
    """Write the shards of a suite; shards that are complete already are kept.

    Args:
        config: all options.
        on_checkpoint: called after every shard (Modal commits its Volume).

    Returns:
        folder, n_sims, n_tiles, nside, elapsed_s.

    Raises:
        UserError: the folder holds other shards, or cannot be written.
    """
    start = time.monotonic()
    folder = tiles_folder(config.tiles_dir, config.results_dir, config.lmax, config.noise_level, fresh=config.fresh)
    seed = config.seed + FRESH_SEED_OFFSET * config.fresh
    sim_ids, cosmologies = design(config.n_sims, seed, None if config.fresh else config.fiducial_sim_id, config.vary)
    theory_cl(cosmologies[:1], band_of(config.lmax, config.field))  # refuses an lmax beyond the table
    with exclusive(folder):
        _write_shards(config, folder, seed, sim_ids, cosmologies, on_checkpoint)
    return {
        "folder": str(folder),
        "n_sims": config.n_sims,
        "n_tiles": config.n_sims * TILES_PER_SIM,
        "nside": nside_of(config.lmax, config.nside),
        "elapsed_s": round(time.monotonic() - start, 1),
    }


def _write_shards(
    config: MockConfig,
    folder: Path,
    seed: int,
    sim_ids: np.ndarray,
    cosmologies: np.ndarray,
    on_checkpoint: Callable[[], None],
) -> None:
    """The shards that are missing, and the picture."""
    nside = nside_of(config.lmax, config.nside)
    description = _description(config)
    finished = finished_shards(folder, description, config.restart)
    jobs = [
        Simulation(int(sim_id), cosmo, config.field, config.noise_level, config.lmax, nside, config.geometry, seed)
        for sim_id, cosmo in zip(sim_ids, cosmologies, strict=True)
    ]
    missing = {
        path: jobs[start : start + SIMS_PER_SHARD]
        for k, start in enumerate(range(0, len(jobs), SIMS_PER_SHARD))
        if (path := _shard_path(folder, k)) not in finished
    }
    if missing:
        _simulate_shards(missing, description, config.workers or usable_cores(), on_checkpoint)
    fiducial = np.array([FIDUCIAL[name] for name in FOM_PARAMS])
    theta = columns_of(params_of(cosmologies), FOM_PARAMS)  # (n_sims, 2)
    draw_suite(_shard_path(folder, 0), theta, fiducial, folder / "suite.png")
    end_restart(folder)
    on_checkpoint()


def _simulate_shards(
    shards: dict[Path, list[Simulation]], description: str, n_workers: int, on_checkpoint: Callable[[], None]
) -> None:
    """Simulate and write shards, one after the other: the disk takes one while it, and the next, is simulated."""
    jobs = [job for of_shard in shards.values() for job in of_shard]
    n_workers = min(n_workers, len(jobs))
    with (
        ThreadPoolExecutor(1, "disk") as disk,
        worker_pool(n_workers) as pool,
        Progress("simulating", len(jobs), "simulations") as progress,
    ):
        simulated = in_order(pool, simulate, jobs, ahead=2 * n_workers)
        syncing, closing = disk.submit(lambda: None), None
        for path, of_shard in shards.items():
            with ExitStack() as opened:
                shard = opened.enter_context(open_shard(path, {METADATA_KEY: description}))
                for job in of_shard:
                    params = np.tile(params_of(job.cosmo[None]), (TILES_PER_SIM, 1))  # (12, 8)
                    shard.write(next(simulated), tile_keys(job.sim_id), params, job.noise_level)
                    progress.advance()
                    if syncing.done():
                        syncing = disk.submit(shard.sync)
                if closing is not None:
                    result_of(closing)
                    on_checkpoint()
                closing = disk.submit(opened.pop_all().close)
        if closing is not None:
            result_of(closing)
            on_checkpoint()


def _shard_path(folder: Path, number: int) -> Path:
    return folder / f"shard_{number:04d}.parquet"


def _description(config: MockConfig) -> str:
    """What determines the tiles, stored in every shard."""
    content: dict[str, Any] = {
        name: getattr(config, name)
        for name in (
            "lmax",
            "nside",
            "noise_level",
            "n_sims",
            "geometry",
            "field",
            "vary",
            "seed",
            "fresh",
            "fiducial_sim_id",
        )
    }
    return json.dumps({**content, ORIENTATIONS_KEY: ORIENTATIONS.get(config.geometry)}, sort_keys=True)
