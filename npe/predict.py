"""Single tiles answered: posterior, samples, and the out-of-distribution check."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from data.dataset import whole_dataset

from common.artifacts import COMPRESSOR_RUNS, atomic_path, make_empty_folder, write_json
from common.device import describe_device, pick_device, precision_of
from common.errors import UserError, warn
from common.results import key
from common.versions import versions
from compress.model import TrainedCompressor, load_compressor
from data.norm_stats import NormStats, read_norm_stats
from data.schema import LABELS, nside_of
from data.single_tiles import SingleTiles, read_single_tiles
from npe.compressed import CompressedTileDataset
from npe.config import PredictConfig
from npe.model import CHECKPOINT_NAME, Posterior, load_npe, predict_posterior
from npe.ood import REFERENCE_NAME, WARN_BELOW, OutOfDistributionCheck, load_reference, look_at
from npe.pictures import draw_predictions
from npe.result import FomResult, read_fom_result

BATCH_SIZE = 128


@dataclass(frozen=True)
class Prediction:
    """The answer for one tile."""

    tile: str = key("number in the file, or sim/orientation/tile of a shard")
    mu: list[float] = key("posterior mean of the parameters, in the order of `theta`")
    cov: list[list[float]] = key("posterior covariance")
    sigma: list[float] = key("marginal standard deviations")
    fom: float = key("its Figure of Merit")
    tail_probability: dict[str, float] = key("by test, and `all`, see [data](data.md)")
    verdict: str = key("`ordinary`, or `out of distribution` and why")

    @property
    def is_ordinary(self) -> bool:
        """Whether its posterior can be trusted."""
        return self.tail_probability["all"] >= WARN_BELOW


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


def predict_tiles(config: PredictConfig, on_checkpoint: Callable[[], None] = lambda: None) -> PredictResult:
    """Posteriors of the tiles of a file, from a finished stage-2 run.

    Args:
        config: all options.
        on_checkpoint: called at the end (Modal commits its Volume).

    Returns:
        the content of predict.json.

    Raises:
        UserError: an unfinished or changed run, or a tile that is not whole.
    """
    run = Path(config.run)
    stage_2 = read_fom_result(run)
    device = pick_device(config.device)
    compressor, home = _compressor_of(stage_2, run, device)
    norm_stats = read_norm_stats(home)
    if norm_stats.sha256 != compressor.norm_stats_sha256:
        raise UserError(f"{home / 'norm_stats.json'} is not what {home} was trained with; restore it")
    lmax = compressor.config.lmax
    nside = nside_of(lmax, compressor.config.nside)
    tiles = read_single_tiles(Path(config.tiles), lmax, nside, compressor.model.n_bins)
    posterior, tail = _answer(tiles, run, stage_2, compressor, norm_stats, device)

    folder = _folder_of(config, run)
    make_empty_folder(folder)
    predictions = [_of_tile(name, i, posterior, tail) for i, name in enumerate(tiles.names)]
    result = PredictResult(
        run=str(run),
        tiles=config.tiles,
        lmax=lmax,
        noise_level=compressor.config.noise_level,
        theta=list(posterior.params),
        predictions=predictions,
        n_out_of_distribution=sum(not prediction.is_ordinary for prediction in predictions),
        folder=str(folder),
        device=describe_device(device),
        versions=versions(),
        config=asdict(config),
    )
    if config.n_samples:
        write_samples(folder, posterior, config.n_samples, config.seed)
    theta = load_reference(run / REFERENCE_NAME, stage_2.reference_sha256).theta
    draw_predictions(posterior, tail["all"] >= WARN_BELOW, theta, folder / "predictions.png")
    write_json(folder / "predict.json", asdict(result))
    for prediction in predictions:
        if not prediction.is_ordinary:
            warn(f"tile {prediction.tile} is {prediction.verdict}; do not trust its posterior before you know why")
    on_checkpoint()
    return result


def _compressor_of(stage_2: FomResult, run: Path, device: torch.device) -> tuple[TrainedCompressor, Path]:
    """The compressor of a stage-2 run, and the folder of its run: where it was, or beside this run."""
    named = stage_2.compressor_checkpoint
    places = [Path(stage_2.config["ckpt"]), run.resolve().parent.parent / COMPRESSOR_RUNS / named]
    for path in places:
        if path.exists():
            # Not as the option says: `auto` may mean another one here.
            compressor = load_compressor(path, device, precision_of(stage_2.precision))
            if compressor.sha256 == stage_2.compressor.sha256:
                return compressor, path.parent
    raise UserError(f"the compressor of {run} ({named}) is neither {places[0]} nor {places[1]}; put it back")


def _answer(
    tiles: SingleTiles,
    run: Path,
    stage_2: FomResult,
    compressor: TrainedCompressor,
    norm_stats: NormStats,
    device: torch.device,
) -> tuple[Posterior, dict[str, np.ndarray]]:
    """Posteriors of n tiles, and their tail probabilities (n,) by test."""
    reference = load_reference(run / REFERENCE_NAME, stage_2.reference_sha256)
    if len(reference.summary) + 1 < 1 / WARN_BELOW:
        warn(f"{run} learnt from {len(reference.summary)} tiles, too few to tell whether a tile is out of distribution")
    params = stage_2.params
    source = whole_dataset(tiles, params, norm_stats, device, compressor.model.dtype)
    summary, spectra = look_at(CompressedTileDataset(source, compressor.model), compressor.config.lmax, BATCH_SIZE)
    npe = load_npe(run / CHECKPOINT_NAME, len(params), device)[0]
    posterior = predict_posterior(npe, torch.from_numpy(summary).float().to(device), params, norm_stats)
    check = OutOfDistributionCheck(reference, tiles.n_bins)
    return posterior, check.tail_probabilities(summary, spectra)


def _of_tile(name: str, i: int, posterior: Posterior, tails: dict[str, np.ndarray]) -> Prediction:
    tail = {test: float(probability[i]) for test, probability in tails.items()}
    odd = [f"{test} {p:.2g}" for test, p in tail.items() if test != "all" and p < WARN_BELOW]
    why = f"out of distribution (probability {tail['all']:.2g}; {', '.join(odd) or 'several tests together'})"
    return Prediction(
        tile=name,
        mu=posterior.mu[i].tolist(),
        cov=posterior.cov[i].tolist(),
        sigma=posterior.sigma[i].tolist(),
        fom=float(posterior.fom[i]),
        tail_probability=tail,
        verdict="ordinary" if tail["all"] >= WARN_BELOW else why,
    )


def write_samples(folder: Path, posterior: Posterior, n_samples: int, seed: int) -> None:
    """Samples of every posterior as a chain that GetDist opens: getdist.loadMCSamples("folder/tile_0000").

    Columns of tile_0000.txt: weight, -ln q, then the parameters.
    """
    rng = np.random.default_rng(seed)
    names = "".join(f"{name}\t{LABELS[name]}\n" for name in posterior.params)
    for i, (mu, cov) in enumerate(zip(posterior.mu, posterior.cov, strict=True)):
        white = rng.standard_normal((n_samples, len(mu)))
        theta = mu + white @ np.linalg.cholesky(cov).T  # (n_samples, d)
        minus_ln_q = 0.5 * np.square(white).sum(axis=1) + 0.5 * np.linalg.slogdet(2 * np.pi * cov)[1]
        with atomic_path(folder / f"tile_{i:04d}.txt") as temporary:
            np.savetxt(temporary, np.column_stack([np.ones(n_samples), minus_ln_q, theta]), fmt="%.7g")
        with atomic_path(folder / f"tile_{i:04d}.paramnames") as temporary:
            temporary.write_text(names, encoding="utf-8")


def _folder_of(config: PredictConfig, run: Path) -> Path:
    name = Path(config.tiles).stem
    return Path(config.results_dir, "predictions", run.name, name) if config.results_dir else run / "predictions" / name
