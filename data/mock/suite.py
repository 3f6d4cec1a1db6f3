"""Build a mock suite: cosmologies, skies, noise, tiles, shards."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from common.artifacts import CannotWriteError, claimed, tiles_folder
from common.config import MockConfig, difference
from common.errors import UserError
from common.interrupt import SIGNALS
from common.machine import usable_cores
from common.progress import Progress
from data.cache import FOLDER as CACHE
from data.mock.cosmology import design, params_of
from data.mock.fields import band_of, noise_alm, signal_alm
from data.mock.flat import flat_tiles
from data.mock.geometry import tiles_of_alm
from data.mock.pictures import draw_suite
from data.mock.theory import theory_cl
from data.schema import FACES, SIMS_PER_SHARD, TILES_PER_SIM, nside_of
from data.shards import METADATA_KEY, ORIENTATIONS_KEY, description_of, open_shard
from data.sky import ORIENTATIONS

RESTARTING = "restarting"  # the file says that --restart has deleted what was there
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


def tile_keys(sim_id: int) -> np.ndarray:
    """Keys (12, 3) of a simulation's tiles, in the order of tiles_of_alm."""
    tile = np.arange(TILES_PER_SIM)
    return np.stack([np.full(TILES_PER_SIM, sim_id), tile // len(FACES), tile % len(FACES)], axis=1)


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
    finished = _finished_shards(folder, description, config.restart)
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
        _worker_pool(n_workers) as pool,
        Progress("simulating", len(jobs), "simulations") as progress,
    ):
        simulated = _in_order(pool, simulate, jobs, ahead=2 * n_workers)
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
    draw_suite(_shard_path(folder, 0), nside, cosmologies, folder / "suite.png")
    (folder / RESTARTING).unlink(missing_ok=True)
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


def _finished_shards(folder: Path, description: str, restart: bool) -> set[Path]:
    """Shards of this very suite that are there already; with --restart a suite that is there is deleted first.

    Once, that is: when that command is killed, it goes on like any other.

    Raises:
        UserError: the folder has shards that no mock suite wrote, or those of a suite with other options.
    """
    found = {path: _description_of(path) for path in sorted(folder.glob("shard_*.parquet"))}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if restart and not (folder / RESTARTING).exists():
            for path in (*found, *(folder / CACHE).glob("*")):
                path.unlink()
            (folder / RESTARTING).touch()
            return set()
    except OSError as error:
        raise CannotWriteError(folder, error) from None
    for path, other in found.items():
        if other != description:
            raise UserError(
                f"{path} belongs to a suite with other options "
                f"({difference(json.loads(other), json.loads(description))}); "
                "add --restart to replace it, or give another folder as --tiles-dir"
            )
    return set(found)


def _description_of(path: Path) -> str:
    if (description := description_of(path)) is None:
        raise UserError(f"{path} was not made by this command; give another folder as --tiles-dir")
    return description


@contextmanager
def _worker_pool(n_workers: int) -> Iterator[ProcessPoolExecutor]:
    """Single-threaded worker processes; the environment that they inherit is put back afterwards."""
    saved = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = "1"  # spawned workers read it when they import numpy
    context = multiprocessing.get_context("spawn")
    try:
        with ProcessPoolExecutor(
            n_workers, mp_context=context, initializer=_serve_the_parent_alone, initargs=(os.getpid(),)
        ) as pool:
            try:
                yield pool
            except BrokenProcessPool:
                raise UserError(
                    "a worker process died, most likely for want of memory; give fewer as --workers, what is finished "
                    "is kept"
                ) from None
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
    finally:
        if saved is None:
            del os.environ["OMP_NUM_THREADS"]
        else:
            os.environ["OMP_NUM_THREADS"] = saved


def _serve_the_parent_alone(parent: int) -> None:
    """Signals reach the whole group, and the parent alone answers them; when it dies, so does this process."""
    for signum in SIGNALS:
        signal.signal(signum, signal.SIG_IGN)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


Job = TypeVar("Job")
Result = TypeVar("Result")


def _in_order(
    pool: ProcessPoolExecutor, function: Callable[[Job], Result], jobs: Iterable[Job], ahead: int
) -> Iterator[Result]:
    """Results in the order of the jobs, with at most `ahead` of them waiting in memory."""
    pending: deque[Any] = deque()
    for job in jobs:
        pending.append(pool.submit(function, job))
        if len(pending) > ahead:
            yield pending.popleft().result()
    while pending:
        yield pending.popleft().result()
