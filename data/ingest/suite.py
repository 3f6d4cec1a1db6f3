"""Many simulations to the shards of a suite: what is to be done, by worker processes, and what was left out."""

from __future__ import annotations

import glob
import hashlib
import json
import re
import time
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from common.artifacts import claimed, tiles_folder, write_json
from common.errors import UserError, warn
from common.interrupt import result_of
from common.machine import free_memory, usable_cores
from common.progress import Progress
from common.versions import COMMIT
from data.workers import worker_pool
from data.config import FIDUCIAL_SIM_ID
from data.ingest.config import IngestConfig
from data.ingest.nz import read_nz
from data.ingest.parameters import read_parameters
from data.ingest.simulation import Job, Outcome, ingest, shard_path
from data.pictures import draw_suite
from data.schema import N_BINS, THETA_COLUMNS, TILES_PER_SIM, nside_of
from data.shards import ORIENTATIONS_KEY
from data.sky import ORIENTATIONS
from data.suite_folder import end_restart, finished_shards

SIM_NAME = re.compile(r"sim_?0*(\d+)", re.IGNORECASE)  # sim00042, sim00042.tar.gz, kappa_sim42.fits
ARCHIVE_NAME = "sim{:05d}.tar.gz"  # as the Gower Street site serves them
SUMMARY_NAME = "ingest.json"
DOWNLOADS = "downloads"  # below --results-dir; an archive lies there until it was read
# What a worker takes at nside 2048: four maps and a shell in float32, and the transform of one in double precision.
WORKER_MEMORY = 3 * 1024**3


def plan(config: IngestConfig) -> list[Job]:
    """A job for every simulation that is wanted and there.

    Raises:
        UserError: an option or a file that cannot be meant so.
    """
    parameters = read_parameters(Path(config.params))
    z, nz = read_nz(Path(config.nz)) if config.nz else (np.empty(0), np.empty((N_BINS, 0)))
    shards = {
        (lmax, level): (str(tiles_folder("", config.results_dir, lmax, level)), _description(config, lmax, level, nz))
        for lmax, level in config.configurations
    }
    return [
        Job(
            sim_id=sim_id,
            params=parameters[sim_id],
            source=source,
            kind=config.kind,
            z=z,
            nz=nz,
            shards=shards,
            geometry=config.geometry,
            ordering=config.ordering,
            pixel_window=config.pixel_window,
            seed=config.seed,
            downloads=str(Path(config.results_dir, DOWNLOADS)),
        )
        for sim_id, source in find_sources(config, parameters).items()
    ]


def find_sources(config: IngestConfig, parameters: dict[int, np.ndarray]) -> dict[int, str]:
    """Where every wanted simulation lies, by sim_id.

    Raises:
        UserError: there is none, two have the same number, or one is not in the table.
    """
    wanted = config.sim_list
    if "://" in config.lightcones:
        ids = wanted if wanted is not None else sorted(parameters)
        found = {sim_id: f"{config.lightcones.rstrip('/')}/{ARCHIVE_NAME.format(sim_id)}" for sim_id in ids}
    else:
        pattern = config.kappa_maps or f"{glob.escape(config.lightcones)}/*"
        found = {}
        for path in sorted(glob.glob(pattern)):  # noqa: PTH207  (the pattern is absolute or not, as the user likes)
            match = SIM_NAME.search(Path(path).name)
            if match is None or (wanted is not None and int(match[1]) not in wanted):
                continue
            if (other := found.setdefault(int(match[1]), path)) != path:
                raise UserError(f"{path} and {other} are both simulation {match[1]}; take one of them away")
        if not found:
            raise UserError(f"no sim00001, sim00002.tar.gz or the like in {pattern}; give where the simulations lie")
        for sim_id in sorted(set(wanted or ()) - set(found)):
            warn(f"simulation {sim_id} is not in {pattern}")
    if unknown := [sim_id for sim_id in found if sim_id not in parameters]:
        raise UserError(f"--params {config.params} has no simulation {unknown[0]}; give the table that belongs to them")
    return found


def _description(config: IngestConfig, lmax: int, noise_level: str, nz: np.ndarray) -> str:
    """The JSON text that every shard carries: what determines the tiles, and where they lie."""
    content = {
        "made_from": config.kind,
        "lmax": lmax,
        "noise_level": noise_level,
        "geometry": config.geometry,
        "pixel_window": config.pixel_window,
        "seed": config.seed,
        "nz_sha256": hashlib.sha256(np.ascontiguousarray(nz, dtype="<f8").tobytes()).hexdigest(),
        ORIENTATIONS_KEY: ORIENTATIONS[config.geometry],
    }
    return json.dumps(content, sort_keys=True)


def run_ingest(config: IngestConfig) -> dict[str, Any]:
    """Make the tiles of every simulation that has none yet, on this machine.

    Returns:
        as summarise.

    Raises:
        UserError: bad options or files; with --strict, anything that is wrong with a simulation.
    """
    start = time.monotonic()
    jobs = plan(config)
    with ExitStack() as held:
        for folder, _ in jobs[0].shards.values():
            held.enter_context(claimed(Path(folder)))
        outcomes = _worked_off(config, unfinished(jobs, config.restart))
        return summarise(jobs, outcomes, time.monotonic() - start)


def unfinished(jobs: list[Job], restart: bool) -> list[Job]:
    """The jobs with a shard to write; makes their folders, and with --restart empties them.

    Raises:
        UserError: a folder holds other tiles, or cannot be written.
    """
    finished = {
        path
        for folder, description in jobs[0].shards.values()
        for path in finished_shards(Path(folder), description, restart)
    }
    return [
        job for job in jobs if any(shard_path(folder, job.sim_id) not in finished for folder, _ in job.shards.values())
    ]


def _worked_off(config: IngestConfig, jobs: list[Job]) -> list[Outcome]:
    if not jobs:
        return []
    n_workers = config.workers or max(1, min(usable_cores(), free_memory() // WORKER_MEMORY))
    n_workers = min(n_workers, len(jobs))
    if n_workers == 1:
        return collected(map(ingest, jobs), config.strict, len(jobs))
    with worker_pool(n_workers) as pool:
        futures = [pool.submit(ingest, job) for job in jobs]
        return collected(map(result_of, futures), config.strict, len(jobs))


def collected(outcomes: Iterable[Outcome], strict: bool, n_jobs: int) -> list[Outcome]:
    """Outcomes as they come, with what is wrong said at once.

    Raises:
        UserError: with --strict, at the first simulation that cannot be used.
    """
    found = []
    with Progress("ingesting", n_jobs, "simulations") as progress:
        for outcome in outcomes:
            if outcome.problem and strict:
                raise UserError(f"{outcome.problem} (simulation {outcome.sim_id}; without --strict it is left out)")
            if outcome.problem:
                warn(f"simulation {outcome.sim_id} is left out: {outcome.problem}")
            progress.advance()
            found.append(outcome)
    return found


def summarise(jobs: list[Job], outcomes: list[Outcome], elapsed_s: float) -> dict[str, Any]:
    """Write ingest.json and suite.png beside the shards; to be called when all jobs are done.

    Args:
        jobs: all.
        outcomes: of those that were not finished before.
        elapsed_s: since the command began.

    Returns:
        folders, n_sims (that have all their shards), n_tiles (per folder), left_out (reason by sim_id), incomplete
        (steps by sim_id), elapsed_s, commit.
    """
    folders = [Path(folder) for folder, _ in jobs[0].shards.values()]
    complete = set.intersection(*({path.name for path in folder.glob("shard_*.parquet")} for folder in folders))
    result = {
        "folders": [str(folder) for folder in folders],
        "n_sims": len(complete),
        "n_tiles": len(complete) * TILES_PER_SIM,
        "left_out": {str(o.sim_id): o.problem for o in outcomes if o.problem},
        "incomplete": {str(o.sim_id): list(o.incomplete) for o in outcomes if o.incomplete},
        "elapsed_s": round(elapsed_s, 1),
        "commit": COMMIT,
    }
    params = {shard_path("", job.sim_id).name: job.params for job in jobs}
    for (lmax, _), folder in zip(jobs[0].shards, folders, strict=True):
        if shards := sorted(path for path in folder.glob("shard_*.parquet") if path.name in params):
            theta = np.array([params[path.name] for path in shards])[:, THETA_COLUMNS]  # (n_sims, 2)
            fiducial = params.get(shard_path("", FIDUCIAL_SIM_ID).name)
            star = None if fiducial is None else fiducial[THETA_COLUMNS]
            draw_suite(shards[0], nside_of(lmax), theta, star, folder / "suite.png")
        write_json(folder / SUMMARY_NAME, result)
        end_restart(folder)
    return result
