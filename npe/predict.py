"""Single tiles answered: posterior, samples, and the out-of-distribution check."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from common.artifacts import COMPRESSOR_RUNS, atomic_path, make_empty_folder, sha256_of_file, write_json
from common.device import describe_device, pick_device, precision_of
from common.errors import UserError, warn
from common.results import key
from common.versions import versions
from compress.model import TrainedCompressor, load_compressor
from data.dataset import whole_dataset
from data.norm_stats import NORM_STATS_NAME, NormStats, read_norm_stats
from data.schema import label_of, nside_of
from data.single_tiles import SingleTiles, read_single_tiles
from npe.compressed import CompressedTileDataset
from npe.config import PredictConfig
from npe.model import CHECKPOINT_NAME, GaussianNPE, Posterior, load_npe, predict_posterior
from npe.ood import REFERENCE_NAME, WARN_BELOW, OutOfDistributionCheck, Reference, load_reference, look_at
from npe.pictures import draw_predictions
from npe.result import FomResult, Recalibrated, read_fom_result

BATCH_SIZE = 128
LARGEST_CONDITION = 1e6  # of a Cholesky factor: its square is that of the covariance, and float64 has 16 digits
ORDINARY = "ordinary"


@dataclass(frozen=True)
class Prediction:
    """The answer for one tile."""

    tile: str = key("number in the file, or sim/orientation/tile of a shard")
    mu: list[float] = key("posterior mean of the parameters, in the order of `theta`")
    cov: list[list[float]] = key("posterior covariance")
    sigma: list[float] = key("marginal standard deviations")
    fom: float = key("its Figure of Merit")
    recalibrated_sigma: list[float] | None = key(
        "sigma of Omega_m and S8 as wide as the run's --calibration-tiles ask; null without"
    )
    recalibrated_fom: float | None = key("its Figure of Merit then")
    tail_probability: dict[str, float] = key("by test, and `all`, see [data](data.md)")
    verdict: str = key("`ordinary`, or `out of distribution` and why")


@dataclass(frozen=True)
class PredictResult:
    """The content of predict.json."""

    run: str = key("folder of the stage-2 run")
    tiles: str = key("file of the tiles")
    lmax: int = key("largest multipole of the tiles")
    noise_level: str = key("shape noise that the run was trained for")
    theta: list[str] = key("names of the parameters")
    predictions: list[Prediction] = key("one entry per tile")
    n_out_of_distribution: int = key("tiles that are out of distribution")
    folder: str = key("folder of the predictions")
    device: str = key("hardware")
    versions: dict[str, str] = key("commit of this code, Python and the packages")
    config: dict[str, Any] = key("every option")


@dataclass(frozen=True)
class _FinishedRun:
    """A stage-2 run and what it was made with."""

    folder: Path
    result: FomResult
    compressor: TrainedCompressor
    norm_stats: NormStats
    reference: Reference
    device: torch.device


def predict_tiles(config: PredictConfig, on_checkpoint: Callable[[], None] = lambda: None) -> PredictResult:
    """Posteriors of the tiles of a file, from a finished stage-2 run; `on_checkpoint` is called at the end.

    Raises:
        UserError: an unfinished or changed run, or a tile that is not whole.
    """
    run = _read_run(Path(config.run), pick_device(config.device))
    stage_1 = run.compressor.config
    nside = nside_of(stage_1.lmax, stage_1.nside)
    tiles = read_single_tiles(Path(config.tiles), stage_1.lmax, nside, run.compressor.model.n_bins)
    posterior, tail = _answer(run, tiles)

    home = (
        Path(config.results_dir, "predictions", run.folder.name) if config.results_dir else run.folder / "predictions"
    )
    folder = home / Path(config.tiles).stem
    make_empty_folder(folder)
    predictions = [_of_tile(name, i, posterior, tail, run.result.recalibrated) for i, name in enumerate(tiles.names)]
    odd = [prediction for prediction in predictions if prediction.verdict != ORDINARY]
    result = PredictResult(
        run=str(run.folder),
        tiles=config.tiles,
        lmax=stage_1.lmax,
        noise_level=stage_1.noise_level,
        theta=list(posterior.params),
        predictions=predictions,
        n_out_of_distribution=len(odd),
        folder=str(folder),
        device=describe_device(run.device),
        versions=versions(),
        config=asdict(config),
    )
    if config.n_samples:
        write_samples(folder, posterior, config.n_samples, config.seed)
    draw_predictions(posterior, tail["all"] >= WARN_BELOW, run.reference.theta, folder / "predictions.png")
    write_json(folder / "predict.json", asdict(result))
    for prediction in odd:
        warn(f"tile {prediction.tile} is {prediction.verdict}; do not trust its posterior before you know why")
    on_checkpoint()
    return result


def _read_run(folder: Path, device: torch.device) -> _FinishedRun:
    """A finished run, whose compressor is where it was, or beside the run if both were moved.

    Raises:
        UserError: one of its files is missing or was changed.
    """
    if not folder.is_dir():
        raise UserError(f"--run {folder} is no folder; give that of a finished stage-2 run")
    result = read_fom_result(folder)
    reference = load_reference(folder / REFERENCE_NAME, result.reference_sha256)
    moved = folder.resolve().parent.parent / COMPRESSOR_RUNS / result.compressor_checkpoint
    for path in (Path(result.config["ckpt"]), moved):
        if path.exists() and sha256_of_file(path) == result.compressor.sha256:
            break
    else:
        raise UserError(f"neither {result.config['ckpt']} nor {moved} is the compressor of {folder}; put it back")
    # Not the precision of the option: `auto` may mean another one here.
    compressor = load_compressor(path, device, precision_of(result.precision))
    norm_stats = read_norm_stats(path.parent)
    if norm_stats.sha256 != compressor.norm_stats_sha256:
        raise UserError(f"{path.with_name(NORM_STATS_NAME)} is not what the compressor was trained with; restore it")
    return _FinishedRun(folder, result, compressor, norm_stats, reference, device)


def _answer(run: _FinishedRun, tiles: SingleTiles) -> tuple[Posterior, dict[str, np.ndarray]]:
    """Posteriors of n tiles, and their tail probabilities (n,) by test."""
    params, model, n = run.result.params, run.compressor.model, len(run.reference.summary)
    if n + 1 < 1 / WARN_BELOW:
        warn(f"{run.folder} learnt from {n} tiles, too few to tell whether a tile is out of distribution")
    dataset = CompressedTileDataset(whole_dataset(tiles, params, run.norm_stats, run.device, model.dtype), model)
    summary, spectra = look_at(dataset, run.compressor.config.lmax, BATCH_SIZE)
    npe = load_npe(run.folder / CHECKPOINT_NAME, len(params), run.device)[0]
    given = torch.from_numpy(summary).float().to(run.device)  # (n, d)
    _refuse_without_posterior(npe, given, tiles.names)
    posterior = predict_posterior(npe, given, params, run.norm_stats)
    return posterior, OutOfDistributionCheck(run.reference, tiles.n_bins).tail_probabilities(summary, spectra)


@torch.no_grad()
def _refuse_without_posterior(npe: GaussianNPE, summary: torch.Tensor, names: tuple[str, ...]) -> None:
    """Raise UserError for a summary (n, d) so far from all others that the network gives no Gaussian for it.

    Its exponentials leave float32, or the covariance is no longer positive definite in the arithmetic of float64.
    """
    mu, factor = (t.cpu().double() for t in npe(summary))  # (n, d), (n, d, d)
    good = mu.isfinite().all(dim=1) & factor.isfinite().all(dim=(1, 2))
    good &= (factor.diagonal(dim1=1, dim2=2) > 0).all(dim=1)  # (n,)
    sound = torch.where(good[:, None, None], factor, torch.eye(factor.shape[-1], dtype=factor.dtype))  # (n, d, d)
    good &= torch.linalg.cond(sound) < LARGEST_CONDITION
    if not good.all():
        far = (
            f"tile {names[int(good.int().argmin())]} is so unlike what the network learnt from that it has no posterior"
        )
        raise UserError(f"{far}; check its units and its noise level")


def _of_tile(
    name: str, i: int, posterior: Posterior, tails: dict[str, np.ndarray], recalibrated: Recalibrated | None
) -> Prediction:
    sigma, fom = posterior.sigma[i, posterior.of_fom], posterior.fom[i]  # (2,)
    tail = {test: float(probability[i]) for test, probability in tails.items()}
    odd = [f"{test} {p:.2g}" for test, p in tail.items() if test != "all" and p < WARN_BELOW]
    why = f"out of distribution (probability {tail['all']:.2g}; {', '.join(odd) or 'several tests together'})"
    return Prediction(
        tile=name,
        mu=posterior.mu[i].tolist(),
        cov=posterior.cov[i].tolist(),
        sigma=posterior.sigma[i].tolist(),
        fom=float(fom),
        recalibrated_sigma=None if recalibrated is None else (sigma * recalibrated.scale**0.5).tolist(),
        recalibrated_fom=None if recalibrated is None else float(fom / recalibrated.scale),
        tail_probability=tail,
        verdict=ORDINARY if tail["all"] >= WARN_BELOW else why,
    )


def write_samples(folder: Path, posterior: Posterior, n_samples: int, seed: int) -> None:
    """Samples of every posterior as a chain that GetDist opens: getdist.loadMCSamples("folder/tile_0000").

    Columns of tile_0000.txt: weight, -ln q, then the parameters.
    """
    rng = np.random.default_rng(seed)
    names = "".join(f"{name}\t{label_of(name).strip('$')}\n" for name in posterior.params)
    for i, (mu, cov) in enumerate(zip(posterior.mu, posterior.cov, strict=True)):
        white = rng.standard_normal((n_samples, len(mu)))
        theta = mu + white @ np.linalg.cholesky(cov).T  # (n_samples, d)
        minus_ln_q = 0.5 * np.square(white).sum(axis=1) + 0.5 * np.linalg.slogdet(2 * np.pi * cov)[1]
        with atomic_path(folder / f"tile_{i:04d}.txt") as temporary:
            np.savetxt(temporary, np.column_stack([np.ones(n_samples), minus_ln_q, theta]), fmt="%.7g")
        with atomic_path(folder / f"tile_{i:04d}.paramnames") as temporary:
            temporary.write_text(names, encoding="utf-8")
