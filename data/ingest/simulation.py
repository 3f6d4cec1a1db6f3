"""One simulation, from its lightcone or its convergence maps to a shard of tiles for every lmax and noise level."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import healpy
import numpy as np

from data.ingest.config import Ordering, PixelWindow, SkyGeometry
from data.ingest.download import download
from data.ingest.lightcone import BadSimulationError, project_lightcone
from data.ingest.maps import read_kappa_maps
from data.schema import TILES_PER_SIM, noise_cl, nside_of, tile_keys
from data.shard_metadata import INGEST_KEY
from data.sphere.harmonics import white_alm
from data.sphere.pixel_window import pixel_window
from data.sphere.tiles import tiles_of_alm
from data.write_shards import open_shard

# Of the analysis: alms up to lmax <= 2 nside are then good to 1e-4 (none: 6e-4; three: 1e-6).
ITERATIONS = 1
# Multipoles are fitted up to here at least (or 2 nside), so that what else is made does not touch the tiles of an lmax.
ANALYSED_LMAX = 1024


@dataclass(frozen=True)
class Job:
    """What a worker, here or in a container, needs to make the tiles of one simulation.

    Attributes:
        sim_id: of the simulation.
        params: (8,) in the order of PARAM_NAMES.
        source: folder, file or URL.
        kind: "lightcones" or "kappa maps".
        z, nz: as from read_nz; empty for maps.
        shards: for every (lmax, noise level) the folder of its shards, and the JSON text that each carries.
        geometry, ordering, pixel_window, seed: as in IngestConfig.
        downloads: folder on a disk with room for an archive.
    """

    sim_id: int
    params: np.ndarray
    source: str
    kind: str
    z: np.ndarray
    nz: np.ndarray
    shards: dict[tuple[int, str], tuple[str, str]]
    geometry: SkyGeometry
    ordering: Ordering
    pixel_window: PixelWindow
    seed: int
    downloads: str


@dataclass(frozen=True)
class Outcome:
    """What became of a simulation.

    Attributes:
        problem: why it was left out; empty if its tiles are written.
        incomplete: steps of the lightcone that were left out.
    """

    sim_id: int
    problem: str = ""
    incomplete: tuple[int, ...] = ()


def shard_path(folder: str | Path, sim_id: int) -> Path:
    """Every simulation has a shard of its own, so that each can be made and made again by itself."""
    return Path(folder) / f"shard_{sim_id:05d}.parquet"


def ingest(job: Job) -> Outcome:
    """Write the shards of one simulation that are not there yet; what is wrong with it comes back as text."""
    shards = {key: value for key, value in job.shards.items() if not shard_path(value[0], job.sim_id).exists()}
    if not shards:
        return Outcome(job.sim_id)
    try:
        with _at_hand(job) as source:
            if job.kind == "lightcones":
                kappa, incomplete = project_lightcone(source, job.params, job.z, job.nz)
            else:
                kappa, incomplete = read_kappa_maps(source, job.ordering), []
        nside = healpy.npix2nside(kappa.shape[1])
        largest = max(lmax for lmax, _ in job.shards)  # also of those that are there: the same analysis, the same bits
        top = min(2 * nside, max(largest, ANALYSED_LMAX))
        if largest > 2 * nside:
            raise BadSimulationError(
                f"{job.source} has nside {nside}, which holds multipoles up to {2 * nside}; give a smaller --lmax than "
                f"{largest}"
            )
        alm = alm_of_kappa(kappa, top, divide_window=_divides(job))
        del kappa
        _write_shards(replace(job, shards=shards), alm, top)
    except BadSimulationError as error:
        return Outcome(job.sim_id, str(error))
    return Outcome(job.sim_id, "", tuple(incomplete))


def _divides(job: Job) -> bool:
    return job.pixel_window == "divide" or (job.pixel_window == "auto" and job.kind == "lightcones")


def alm_of_kappa(kappa: np.ndarray, lmax: int, *, divide_window: bool) -> np.ndarray:
    """Coefficients (4, n_alm) of full-sky maps (4, n_pixels) in RING order.

    Args:
        kappa: of the four bins.
        lmax: largest multipole, at most 2 nside.
        divide_window: undo that a pixel holds the mean over its area, as counts per pixel do.
    """
    alm = np.stack([healpy.map2alm(one, lmax=lmax, iter=ITERATIONS, pol=False) for one in kappa])  # (4, n_alm)
    if divide_window:
        window = pixel_window(healpy.npix2nside(kappa.shape[1]), lmax)  # (lmax + 1,)
        alm = np.stack([healpy.almxfl(one, 1 / window) for one in alm])
    return alm


def _write_shards(job: Job, alm: np.ndarray, top: int) -> None:
    """Rotate, cut and write: signal and one realisation of white noise, added up for every noise level.

    Args:
        alm: (4, n_alm) of the signal, up to ell = top.
    """
    white = white_alm(top, np.random.default_rng([job.seed, job.sim_id]))
    keys = tile_keys(job.sim_id)
    for lmax in sorted({lmax for lmax, _ in job.shards}):
        nside = nside_of(lmax)
        signal, noise = (
            tiles_of_alm(np.stack(healpy.resize_alm(a, top, top, lmax, lmax)), lmax, nside, job.geometry)
            for a in (alm, white)
        )  # (12, 4, N, N) each
        for level in (level for of, level in job.shards if of == lmax):
            folder, description = job.shards[lmax, level]
            sigma = np.sqrt(noise_cl(level)).astype(np.float32)[:, None, None]  # (4, 1, 1)
            with open_shard(shard_path(folder, job.sim_id), {INGEST_KEY: description}) as shard:
                shard.write(signal + sigma * noise, keys, np.tile(job.params, (TILES_PER_SIM, 1)), level)


@contextmanager
def _at_hand(job: Job) -> Iterator[Path]:
    """The source as a file or folder here. What is downloaded for it is deleted once it was read, or proved damaged."""
    if "://" not in job.source:
        path = Path(job.source)
        if not path.exists():
            raise BadSimulationError(f"{path} is not there")
        yield path
        return
    path = Path(job.downloads, job.source.rsplit("/", 1)[1])
    path.parent.mkdir(parents=True, exist_ok=True)
    download(job.source, path)
    try:
        yield path
    except BadSimulationError as error:
        path.unlink()
        raise BadSimulationError(str(error).replace(str(path), job.source)) from None
    path.unlink()
