"""One tile answered: posterior, samples, and whether it looks like what the posterior was learnt from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from common.artifacts import COMPRESSOR_RUNS, atomic_path, make_empty_folder, read_sealed, write_json
from common.device import describe_device, pick_device, precision_of
from common.errors import UserError, warn
from common.versions import versions
from compress.model import TrainedCompressor, load_compressor
from data.module import whole_dataset
from data.norm_stats import read_norm_stats
from data.schema import THETA_NAMES, nside_of
from data.single_tiles import read_single_tiles
from npe.compressed import CompressedTileDataset
from npe.config import PredictConfig
from npe.likeness import REFERENCE_NAME, WARN_BELOW, Likeness, load_reference, look_at
from npe.model import CHECKPOINT_NAME, Posterior, load_npe, predict_posterior
from npe.pictures import draw_predictions
from npe.train import RESULT_NAME

BATCH_SIZE = 128
LABELS = {"Omega_m": r"\Omega_{\rm m}", "S8": r"S_8"}


def predict_tiles(config: PredictConfig, on_checkpoint: Callable[[], None] = lambda: None) -> dict[str, Any]:
    """Posteriors of the tiles of a file, from a finished stage-2 run.

    Args:
        config: all options.
        on_checkpoint: called at the end (Modal commits its Volume).

    Returns:
        the content of predict.json: for every tile mu, cov, sigma, fom, tail probabilities and verdict.

    Raises:
        UserError: an unfinished or changed run, or a tile that is not whole.
    """
    run = Path(config.run)
    stage_2 = read_sealed(run / RESULT_NAME, "stage 2")
    if "reference_sha256" not in stage_2:
        raise UserError(f"{run} was made before run_predict.py; run stage 2 again, with --restart")
    device = pick_device(config.device)
    trained, home = _compressor_of(stage_2, run, device)
    norm_stats = read_norm_stats(home)
    if norm_stats.sha256 != trained.norm_stats_sha256:
        raise UserError(f"{home / 'norm_stats.json'} is not what {home} was trained with; restore it")
    lmax = trained.config.lmax
    tiles = read_single_tiles(Path(config.tiles), lmax, nside_of(lmax, trained.config.nside))
    reference = load_reference(run / REFERENCE_NAME, stage_2["reference_sha256"])
    if len(reference.summary) + 1 < 1 / WARN_BELOW:
        warn(f"{run} learnt from {len(reference.summary)} tiles, too few to tell whether a tile is unlike them")

    source = whole_dataset(tiles, norm_stats, device, trained.model.dtype)
    dataset = CompressedTileDataset(source, trained.model, stage_2["config"]["n_views"])
    summary, spectra = look_at(dataset, lmax, BATCH_SIZE)
    npe = load_npe(run / CHECKPOINT_NAME, device)[0]
    posterior = predict_posterior(npe, torch.from_numpy(summary).float().to(device), norm_stats)
    likeness = Likeness(reference).judge(summary, spectra)

    folder = _folder_of(config, run)
    make_empty_folder(folder)
    names = tiles.names
    result: dict[str, Any] = {
        "run": str(run),
        "tiles": config.tiles,
        "lmax": lmax,
        "noise_level": trained.config.noise_level,
        "theta": list(THETA_NAMES),
        "predictions": [_of_tile(names[i], i, posterior, likeness) for i in range(len(names))],
        "n_unlike": int((likeness["all"] < WARN_BELOW).sum()),
        "folder": str(folder),
        "device": describe_device(device),
        "versions": versions(),
        "config": asdict(config),
    }
    if config.n_samples:
        write_samples(folder, posterior, config.n_samples, config.seed)
    draw_predictions(posterior, likeness["all"] >= WARN_BELOW, reference.theta, folder / "predictions.png")
    write_json(folder / "predict.json", result)
    for tile in result["predictions"]:
        if tile["verdict"] != "ordinary":
            warn(f"tile {tile['tile']} is {tile['verdict']}; do not trust its posterior before you know why")
    on_checkpoint()
    return result


def _of_tile(name: str, i: int, posterior: Posterior, likeness: dict[str, np.ndarray]) -> dict[str, Any]:
    tail = {test: float(probability[i]) for test, probability in likeness.items()}
    odd = [f"{test} {p:.2g}" for test, p in tail.items() if test != "all" and p < WARN_BELOW]
    unlike = f"unlike the training tiles (probability {tail['all']:.2g}; {', '.join(odd) or 'several tests together'})"
    return {
        "tile": name,
        "mu": posterior.mu[i].tolist(),
        "cov": posterior.cov[i].tolist(),
        "sigma": np.sqrt(np.diag(posterior.cov[i])).tolist(),
        "fom": float(posterior.fom[i]),
        "tail_probability": tail,
        "verdict": "ordinary" if tail["all"] >= WARN_BELOW else unlike,
    }


def write_samples(folder: Path, posterior: Posterior, n_samples: int, seed: int) -> None:
    """Samples of every posterior as a chain that GetDist opens: getdist.loadMCSamples("folder/tile_0000").

    Columns of tile_0000.txt: weight, -ln q, Omega_m, S8.
    """
    rng = np.random.default_rng(seed)
    names = "".join(f"{name}\t{LABELS[name]}\n" for name in THETA_NAMES)
    for i, (mu, cov) in enumerate(zip(posterior.mu, posterior.cov, strict=True)):
        white = rng.standard_normal((n_samples, len(mu)))
        theta = mu + white @ np.linalg.cholesky(cov).T  # (n_samples, 2)
        minus_ln_q = 0.5 * np.square(white).sum(axis=1) + 0.5 * np.linalg.slogdet(2 * np.pi * cov)[1]
        with atomic_path(folder / f"tile_{i:04d}.txt") as temporary:
            np.savetxt(temporary, np.column_stack([np.ones(n_samples), minus_ln_q, theta]), fmt="%.7g")
        with atomic_path(folder / f"tile_{i:04d}.paramnames") as temporary:
            temporary.write_text(names, encoding="utf-8")


def _folder_of(config: PredictConfig, run: Path) -> Path:
    name = Path(config.tiles).stem
    return Path(config.results_dir, "predictions", run.name, name) if config.results_dir else run / "predictions" / name


def _compressor_of(stage_2: dict[str, Any], run: Path, device: torch.device) -> tuple[TrainedCompressor, Path]:
    """The compressor of a stage-2 run, and the folder of its run: where it was, or beside this run."""
    named = stage_2["compressor_checkpoint"]
    places = [Path(stage_2["config"]["ckpt"]), run.resolve().parent.parent / COMPRESSOR_RUNS / named]
    for path in places:
        if path.exists():
            # Not as the option says: `auto` may mean another one here.
            trained = load_compressor(path, device, precision_of(stage_2["precision"]))
            if trained.sha256 == stage_2["compressor"]["sha256"]:
                return trained, path.parent
    raise UserError(f"the compressor of {run} ({named}) is neither {places[0]} nor {places[1]}; put it back")
