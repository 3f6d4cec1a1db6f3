"""One simulation, from its lightcone or its convergence maps to a shard of tiles for every lmax and noise level."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import healpy
import numpy as np
import pyarrow.parquet as pq

from common.errors import UserError
from data.config import FIDUCIAL_SIM_ID
from data.ingest.config import IngestConfig
from data.ingest.download import download
from data.ingest.lightcone import BadSimulationError, project_lightcone
from data.ingest.maps import read_kappa_maps
from data.nuisance import Nuisance, Prior, draw, nuisance_of, priors_of
from data.schema import N_ORIENTATIONS, TILES_PER_SIM, noise_cl, nside_of, tile_keys
from data.shard_metadata import INGEST_KEY
from data.sphere.harmonics import white_alm
from data.sphere.pixel_window import pixel_window
from data.sphere.tiles import tiles_of_alm
from data.write_shards import open_shard

# Of map2alm: alms up to lmax <= 2 nside are then accurate to 1e-4 (without any: 6e-4; with three: 1e-6).
ITERATIONS = 1
# A least-squares alm depends slightly on the largest multipole of the fit. Every map is fitted up to this one (or to
# 2 nside if that is less), so that the tiles of one --lmax are the same whichever others are made with them.
ANALYSED_LMAX = 1024


@dataclass(frozen=True)
class Output:
    """A folder of tiles: their lmax, noise level and nuisance, and the JSON text that is stored in every shard."""

    lmax: int
    noise_level: str
    nuisance: str
    folder: str
    description: str

    def shard(self, sim_id: int) -> Path:
        """Path of a simulation's shard; each has its own, so that it can be made, or replaced, alone."""
        return Path(self.folder, f"shard_{sim_id:05d}.parquet")


@dataclass(frozen=True)
class Job:
    """What a worker, here or in a container, needs to make the tiles of one simulation; only the first three differ."""

    sim_id: int
    params: np.ndarray  # (8,) in the order of PARAM_NAMES
    source: str  # folder, file or URL
    z: np.ndarray  # with nz as from read_nz; empty for maps
    nz: np.ndarray
    outputs: tuple[Output, ...]
    priors: dict[str, Prior]
    downloads: str  # folder on a disk with room for an archive
    config: IngestConfig

    def draws(self, n_bins: int, outputs: Sequence[Output]) -> dict[str, dict[str, np.ndarray]]:
        """Its nuisances for every --nuisance of some outputs: by name, (3,) each."""
        fiducial = self.sim_id == FIDUCIAL_SIM_ID
        return {
            one: draw(priors_of(one, self.priors, n_bins), self.config.seed, self.sim_id, fiducial=fiducial)
            for one in dict.fromkeys(output.nuisance for output in outputs)
        }


@dataclass(frozen=True)
class Outcome:
    """What happened to a simulation: the problem for which it is left out, and the shells left out as incomplete."""

    sim_id: int
    problem: str = ""
    incomplete: Sequence[int] = ()


def ingest(job: Job) -> Outcome:
    """Write the shards of one simulation that do not exist yet; a problem with the simulation comes back as text."""
    missing = [output for output in job.outputs if not output.shard(job.sim_id).exists()]
    incomplete: list[int] = []
    try:
        with _on_disk(job) as source:
            if job.config.lightcones:
                kernels = _kernels(job, missing)
                kappa, incomplete = project_lightcone(source, job.params, job.z, job.nz, kernels)
            else:
                kernels, kappa = [], read_kappa_maps(source, job.config.ordering)
        nside, n_bins = healpy.npix2nside(kappa.shape[1]), len(kappa) // (1 + len(kernels))
        _check(job, n_bins, nside)
        # The same for all outputs, also on resuming with fewer: the same analysis gives the same bits.
        lmax = min(2 * nside, max(ANALYSED_LMAX, *(output.lmax for output in job.outputs)))
        alm = alm_of_kappa(kappa, lmax, divide_window=job.config.divides_window)
        del kappa  # frees memory for the tiles
        _write_shards(job, missing, alm.reshape(1 + len(kernels), n_bins, -1), lmax, kernels)
    except BadSimulationError as error:
        return Outcome(job.sim_id, str(error))
    return Outcome(job.sim_id, incomplete=incomplete)


def _kernels(job: Job, outputs: Sequence[Output]) -> list[Nuisance]:
    """What the maps beside that of lensing are projected with: every redshift error and alignment once."""
    n_bins, found = len(job.nz), dict[bytes, Nuisance]()
    for values in job.draws(n_bins, outputs).values():
        for nuisance in (nuisance_of(values, o, n_bins) for o in range(N_ORIENTATIONS)):
            if nuisance.changes_kernels:
                found.setdefault(nuisance.kernel, nuisance)
    return list(found.values())


def _check(job: Job, n_bins: int, nside: int) -> None:
    """Raise BadSimulationError if maps with this number of bins and nside cannot become the tiles asked for."""
    largest = max(output.lmax for output in job.outputs)
    if largest > 2 * nside:
        raise BadSimulationError(f"{job.source} has nside {nside}: --lmax can be at most {2 * nside}, not {largest}")
    for output in job.outputs:
        try:
            noise_cl(output.noise_level, n_bins)
        except UserError as error:
            raise BadSimulationError(f"{job.source}: {error}") from None
        priors_of(output.nuisance, job.priors, n_bins)  # refuses them for all simulations
        for shard in list(Path(output.folder).glob("shard_*.parquet"))[:1]:
            if (others := pq.read_schema(shard).field("kappa").type.list_size) != n_bins:
                raise BadSimulationError(f"{job.source} has {n_bins} bins, but the tiles in {shard} have {others}")


def alm_of_kappa(kappa: np.ndarray, lmax: int, *, divide_window: bool) -> np.ndarray:
    """Coefficients (n_bins, n_alm) of full-sky maps (n_bins, n_pixels) in RING order; lmax is at most 2 nside.

    divide_window corrects for pixels that hold the mean over their area, as counts per pixel do.
    """
    alm = np.stack([healpy.map2alm(one, lmax=lmax, iter=ITERATIONS, pol=False) for one in kappa])  # (n_bins, n_alm)
    if divide_window:
        window = pixel_window(healpy.npix2nside(kappa.shape[1]), lmax)  # (lmax + 1,)
        alm = np.stack([healpy.almxfl(one, 1 / window) for one in alm])
    return alm


def _write_shards(job: Job, outputs: list[Output], alm: np.ndarray, alm_lmax: int, kernels: Sequence[Nuisance]) -> None:
    """Rotate, cut and write the signal, and one realisation of noise, scaled for every level.

    The signal alm is (1 + n_kernels, n_bins, n_alm): that of lensing, and those with the kernels.
    """
    n_bins = alm.shape[1]
    white = white_alm(n_bins, alm_lmax, np.random.default_rng([job.config.seed, job.sim_id]))
    keys, params = tile_keys(job.sim_id), np.tile(job.params, (TILES_PER_SIM, 1))  # (12, 3), (12, 8)
    draws = job.draws(n_bins, outputs)
    for lmax in sorted({output.lmax for output in outputs}):
        place = lmax, nside_of(lmax), job.config.geometry
        band, noise = _band(alm, alm_lmax, lmax), tiles_of_alm(_band(white, alm_lmax, lmax), *place)
        for nuisance in dict.fromkeys(output.nuisance for output in outputs if output.lmax == lmax):
            signal = tiles_of_alm(_skies(band, draws[nuisance], kernels), *place)
            labels = {name: np.repeat(of, TILES_PER_SIM // len(of)) for name, of in draws[nuisance].items()}
            for output in (output for output in outputs if (output.lmax, output.nuisance) == (lmax, nuisance)):
                sigma = np.sqrt(noise_cl(output.noise_level, n_bins)).astype(np.float32)[:, None, None]
                with open_shard(output.shard(job.sim_id), {INGEST_KEY: output.description}) as shard:
                    shard.write(signal + sigma * noise, keys, params, output.noise_level, labels)


def _skies(alm: np.ndarray, values: dict[str, np.ndarray], kernels: Sequence[Nuisance]) -> np.ndarray:
    """The sky of every orientation with its nuisances (3, n_bins, n_alm), or one for all without (n_bins, n_alm)."""
    if not values:
        return alm[0]
    nuisances = [nuisance_of(values, orientation, alm.shape[1]) for orientation in range(N_ORIENTATIONS)]
    place = {nuisance.kernel: 1 + k for k, nuisance in enumerate(kernels)}
    return np.stack([(1 + n.m[:, None]) * alm[place.get(n.kernel, 0)] for n in nuisances])


def _band(alm: np.ndarray, alm_lmax: int, lmax: int) -> np.ndarray:
    """The multipoles up to lmax of alm (..., n_alm)."""
    flat = [healpy.resize_alm(one, alm_lmax, alm_lmax, lmax, lmax) for one in alm.reshape(-1, alm.shape[-1])]
    return np.stack(flat).reshape(*alm.shape[:-1], -1)  # (..., n_alm of lmax)


@contextmanager
def _on_disk(job: Job) -> Iterator[Path]:
    """The source as a file or folder. A download is deleted once it has been read, or has proved damaged."""
    if "://" not in job.source:
        yield Path(job.source)
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
