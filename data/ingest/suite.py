"""Many simulations to the shards of a suite, by worker processes here or by containers."""

import glob
import hashlib
import re
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from common.artifacts import NONE, tiles_folder, write_json
from common.errors import UserError, warn
from common.lock import exclusive
from common.machine import free_memory, usable_cores
from common.progress import Progress
from common.versions import COMMIT
from data.config import FIDUCIAL_SIM_ID
from data.ingest.config import IngestConfig
from data.ingest.nz import read_nz
from data.ingest.parameters import read_parameters
from data.ingest.simulation import Job, Outcome, Output, ingest
from data.nuisance import check_shifts, described, priors_of, read_priors
from data.schema import N_ORIENTATIONS, TILES_PER_SIM, noise_cl
from data.suite_folder import describe, finish_suite, finished_shards
from data.workers import in_order, worker_pool

SIM_NAME = re.compile(r"sim_?0*(\d+)", re.IGNORECASE)  # sim00042, sim00042.tar.gz, kappa_sim42.fits
ARCHIVE_NAME = "sim{:05d}.tar.gz"  # as the Gower Street site serves them
DOWNLOADS = "downloads"  # below --results-dir; an archive stays there until it has been read
LOCAL_DISK = "/tmp/downloads"  # likewise in a container: not on the Volume
MAP_BYTES = 4 * 12 * 2048**2  # a float32 map of the Gower Street simulations
# What a worker holds besides a map per bin, in such maps: a shell, and the transform of a map in double precision.
MAPS_PER_WORKER = 12


def plan(config: IngestConfig) -> list[Job]:
    """Read the tables and find the simulations; for a container, `config.results_dir` is where its Volume is mounted.

    Raises:
        UserError: an option or a file is unusable.
    """
    parameters = read_parameters(Path(config.params))
    z, nz = read_nz(Path(config.nz)) if config.nz else (np.empty(0), np.empty((0, 0)))
    options = {
        "made_from": "lightcones" if config.lightcones else "kappa maps",
        "pixel_window": config.pixel_window,
        "seed": config.seed,
        "nz_sha256": hashlib.sha256(np.ascontiguousarray(nz, dtype="<f8").tobytes()).hexdigest(),
    }
    outputs, priors = [], read_priors(config.nuisance_priors)
    for lmax, level, nuisance in config.configurations:
        if config.nz:
            noise_cl(level, len(nz))  # refuses a survey with other bins
        folder = tiles_folder("", config.results_dir, lmax, level, nuisance)
        # Maps do not say yet how many bins they have; of their nuisances there is only m.
        of_maps = {name: prior for name, prior in priors.items() if nuisance != NONE and name.startswith("m_")}
        varied = described(nuisance, priors_of(nuisance, priors, len(nz)) if config.nz else of_maps)
        description = describe(config.geometry, {**options, "lmax": lmax, "noise_level": level} | varied)
        outputs.append(Output(lmax, level, nuisance, str(folder), description))
    shared = (z, nz, tuple(outputs), priors, f"{config.results_dir}/{DOWNLOADS}", config)
    jobs = [Job(sim, parameters[sim], source, *shared) for sim, source in find_sources(config, parameters).items()]
    if config.nz:
        check_shifts(z, nz, [values for job in jobs for values in job.draws(len(nz), outputs).values()])
    return jobs


def find_sources(config: IngestConfig, parameters: dict[int, np.ndarray]) -> dict[int, str]:
    """Path or URL of every simulation to be used, by sim_id.

    Raises:
        UserError: there are none, two have the same number, or one is not in the table.
    """
    wanted = config.sim_list
    if "://" in config.lightcones:
        url = f"{config.lightcones.rstrip('/')}/{ARCHIVE_NAME}"
        found = {sim_id: url.format(sim_id) for sim_id in wanted or sorted(parameters)}
    else:
        pattern = config.kappa_maps or f"{glob.escape(config.lightcones)}/*"
        found = {}
        for path in sorted(glob.glob(pattern)):  # noqa: PTH207  (Path.glob takes no absolute patterns)
            match = SIM_NAME.search(Path(path).name)
            if match is None or (wanted and int(match[1]) not in wanted):
                continue
            if (other := found.setdefault(int(match[1]), path)) != path:
                raise UserError(f"{path} and {other} are both simulation {match[1]}; remove one of them")
        if not found:
            kind = "--kappa-maps" if config.kappa_maps else "--lightcones"
            raise UserError(
                f"{kind}: no sim00001, sim00002.tar.gz, kappa_sim3.fits or the like is {pattern}; correct it"
            )
        for sim_id in sorted(set(wanted) - set(found)):
            warn(f"simulation {sim_id} is not in {pattern}")
    if unknown := [sim_id for sim_id in found if sim_id not in parameters]:
        raise UserError(f"--params {config.params} has no simulation {unknown[0]}; give the table of this suite")
    return found


def run_ingest(jobs: list[Job], on_checkpoint: Callable[[], None] = lambda: None) -> dict[str, Any]:
    """Make the missing tiles of every simulation, on this machine; returns what `_finish` does.

    Raises:
        UserError: a folder holds other tiles or cannot be written; with --strict, a simulation cannot be used.
    """
    start = time.monotonic()
    with ExitStack() as held:
        for output in jobs[0].outputs:
            held.enter_context(exclusive(Path(output.folder)))
        missing = _unfinished(jobs)
        n_bins = len(jobs[0].nz) or 4  # not known yet for --kappa-maps
        n_maps = n_bins * (1 + N_ORIENTATIONS * len({output.nuisance for output in jobs[0].outputs} - {NONE, "m"}))
        memory = (MAPS_PER_WORKER + n_maps) * MAP_BYTES
        n_workers = min(jobs[0].config.workers or max(1, min(usable_cores(), free_memory() // memory)), len(missing))
        outcomes: Iterator[Outcome] = map(ingest, missing)
        if n_workers > 1:
            outcomes = in_order(held.enter_context(worker_pool(n_workers)), ingest, missing, ahead=len(missing))
        result = _finish(jobs, outcomes, len(missing), start)
    on_checkpoint()
    return result


def ingest_side_by_side(
    jobs: list[Job], on_checkpoint: Callable[[], None], run_all: Callable[[str, list[Job]], Iterator[Any]]
) -> dict[str, Any]:
    """As run_ingest, but led by one container, with another for every simulation, which must be served under a URL.

    No lock is held: its open file would keep the Volume from being reloaded. `run_all` calls a function for every job
    in a container of its own, and yields results or exceptions in any order; it commits the Volume at its start and
    reloads it at its end.
    """
    start = time.monotonic()
    if "://" not in jobs[0].config.lightcones:
        raise UserError("on Modal, give the URL that serves the simulations as --lightcones")
    missing = _unfinished(jobs)
    outcomes = run_all("data.ingest.suite.ingest_in_container", missing)
    result = _finish(jobs, outcomes, len(missing), start)
    on_checkpoint()
    return result


def ingest_in_container(job: Job, on_checkpoint: Callable[[], None]) -> Outcome:
    """One simulation: downloaded to the container's own disk, its tiles written to the Volume."""
    outcome = ingest(replace(job, downloads=LOCAL_DISK))
    on_checkpoint()
    return outcome


def _unfinished(jobs: list[Job]) -> list[Job]:
    """The jobs with a shard to write; creates the folders, and empties them with --restart.

    Raises:
        UserError: a folder holds other tiles, or cannot be written.
    """
    restart = jobs[0].config.restart
    finished = set().union(*(finished_shards(Path(o.folder), o.description, restart) for o in jobs[0].outputs))
    return [job for job in jobs if any(output.shard(job.sim_id) not in finished for output in job.outputs)]


def _finish(jobs: list[Job], outcomes: Iterable[Outcome | Exception], n_missing: int, start: float) -> dict[str, Any]:
    """Wait for all outcomes, print every problem when it arrives, and write ingest.json and suite.png.

    Returns:
        folders, n_sims (that have all their shards), n_tiles (per folder), left_out (reason by sim_id), incomplete
        (steps by sim_id), elapsed_s, commit.

    Raises:
        UserError: with --strict, at the first simulation that cannot be used.
        Exception: the one in an outcome's place.
    """
    left_out, incomplete = {}, {}
    with Progress("ingesting", n_missing, "simulations") as progress:
        for outcome in outcomes:
            if isinstance(outcome, Exception):
                raise outcome
            if outcome.problem:
                if jobs[0].config.strict:
                    raise UserError(f"{outcome.problem} (simulation {outcome.sim_id}; without --strict it is left out)")
                warn(f"simulation {outcome.sim_id} is left out: {outcome.problem}")
                left_out[str(outcome.sim_id)] = outcome.problem
            if outcome.incomplete:
                incomplete[str(outcome.sim_id)] = list(outcome.incomplete)
            progress.advance()
    folders = [Path(output.folder) for output in jobs[0].outputs]
    n_sims = len(set.intersection(*({path.name for path in folder.glob("shard_*.parquet")} for folder in folders)))
    result = {
        "folders": [str(folder) for folder in folders],
        "n_sims": n_sims,
        "n_tiles": n_sims * TILES_PER_SIM,
        "left_out": left_out,
        "incomplete": incomplete,
        "elapsed_s": round(time.monotonic() - start, 1),
        "commit": COMMIT,
    }
    fiducial = next((job.params for job in jobs if job.sim_id == FIDUCIAL_SIM_ID), None)
    for output, folder in zip(jobs[0].outputs, folders, strict=True):
        write_json(folder / "ingest.json", result)
        if params := [job.params for job in jobs if output.shard(job.sim_id).exists()]:
            finish_suite(folder, np.stack(params), fiducial)
    return result
