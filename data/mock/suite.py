"""Build a mock suite: cosmologies, skies, noise, tiles, shards."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from common.artifacts import claimed, tiles_folder
from common.config import MockConfig
from common.machine import usable_cores
from common.progress import Progress
from common.workers import in_order, worker_pool
from data.mock.cosmology import FIDUCIAL, design, params_of
from data.mock.fields import band_of, signal_alm
from data.mock.flat import flat_tiles
from data.mock.theory import theory_cl
from data.pictures import draw_suite
from data.schema import SIMS_PER_SHARD, THETA_COLUMNS, THETA_NAMES, TILES_PER_SIM, nside_of, tile_keys
from data.shards import METADATA_KEY, ORIENTATIONS_KEY, open_shard
from data.sky import ORIENTATIONS
from data.sphere.harmonics import noise_alm
from data.sphere.tiles import tiles_of_alm
from data.suite_folder import end_restart, finished_shards

FRESH_SEED_OFFSET = 1_000_000_007  # far from any seed that one would type


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
    with claimed(folder):
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
    params = params_of(cosmologies)  # (n_sims, 8)
    description = _description(config)
    starts = range(0, config.n_sims, SIMS_PER_SHARD)
    finished = finished_shards(folder, description, config.restart)
    missing = [k for k in range(len(starts)) if _shard_path(folder, k) not in finished]

    jobs = [
        Simulation(
            int(sim_ids[i]), cosmologies[i], config.field, config.noise_level, config.lmax, nside, config.geometry, seed
        )
        for k in missing
        for i in range(starts[k], min(starts[k] + SIMS_PER_SHARD, config.n_sims))
    ]
    n_workers = config.workers or usable_cores()
    # A shard is synced to the disk while the next one is simulated.
    with (
        ThreadPoolExecutor(1, "shard closer") as closer,
        worker_pool(n_workers) as pool,
        Progress("simulating", len(jobs), "simulations") as progress,
    ):
        simulated = in_order(pool, simulate, jobs, ahead=2 * n_workers)
        closing: Future[None] | None = None
        for k in missing:
            shard_sims = range(starts[k], min(starts[k] + SIMS_PER_SHARD, config.n_sims))
            with ExitStack() as opened:
                shard = opened.enter_context(open_shard(_shard_path(folder, k), nside, {METADATA_KEY: description}))
                for i in shard_sims:
                    keys = tile_keys(int(sim_ids[i]))
                    shard.write(next(simulated), keys, np.tile(params[i], (TILES_PER_SIM, 1)), config.noise_level)
                    progress.advance()
                if closing is not None:
                    closing.result()
                    on_checkpoint()
                closing = closer.submit(opened.pop_all().close)
        if closing is not None:
            closing.result()
            on_checkpoint()
    fiducial = np.array([FIDUCIAL[name] for name in THETA_NAMES])
    draw_suite(_shard_path(folder, 0), nside, params[:, THETA_COLUMNS], fiducial, folder / "suite.png")
    end_restart(folder)
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
