"""What overlapping tiles and shared cosmologies do to the figures that a run reports: `python benchmarks/leakage.py`.

{published, disjoint} geometry x {tile, sim} split, several seeds, the same skies in both geometries. Each figure that a
run reports stands beside the same figure on simulations that the run has never seen: 500 drawn from the prior, and 20
at the fiducial cosmology (240 tiles). Writes leakage_{backbone}_{n_sims}.json and prints the table. A finished run is
not repeated.
"""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np
import torch

from common.artifacts import COMPRESSOR_RUNS, NPE_RUNS, tiles_folder, write_json
from common.device import describe_device, pick_device
from common.progress import Progress
from common.results import read_result
from common.versions import versions
from compress.evaluate import predict
from compress.model import CHECKPOINT_NAME, load_compressor
from compress.result import RESULT_NAME, CompressorResult
from data.dataset import TileDataset, whole_dataset
from data.mock.cosmology import FIDUCIAL_COSMO, params_of
from data.mock.nz import N_BINS
from data.mock.simulation import Simulation, simulate
from data.norm_stats import read_norm_stats
from data.read_shards import read_tiles
from data.schema import TILES_PER_SIM, nside_of, tile_keys
from data.tiles import Tiles, empty_kappa
from npe.calibration import calibrate
from npe.fom import N_BOOTSTRAP, bootstrap_median
from npe.model import CHECKPOINT_NAME as NPE_CHECKPOINT_NAME
from npe.model import load_npe, predict_posterior
from npe.result import RESULT_NAME as NPE_RESULT_NAME
from npe.result import read_fom_result

NOISE_LEVEL, N_SIMS, N_FRESH, N_FIDUCIAL_SIMS = "des_y3", 791, 500, 20
BATCH_SIZE = 256
FIRST_FIDUCIAL_ID = 1_000_000  # sim_ids, and so skies, that no suite has
GEOMETRIES, SPLITS = ("published", "disjoint"), ("tile", "sim")
RECIPE = "--max-epochs 25 --warmup-steps 200 --decay-epochs 2 --decay-factor 0.75 --norm-tiles 0"
CONFIGURATIONS = tuple((geometry, split) for geometry in GEOMETRIES for split in SPLITS)


def run(command: str) -> None:
    """Run one of the commands and show its output."""
    print(f"$ python {command}", flush=True)
    script, *options = shlex.split(command)
    subprocess.run([sys.executable, str(ROOT / script), *options], check=True)


def home_of(results: Path, geometry: str, n_sims: int) -> Path:
    """Results folder of a suite and its runs."""
    return results / (geometry if n_sims == N_SIMS else f"{geometry}_{n_sims}")


def fiducial_tiles(lmax: int) -> Tiles:
    """Disjoint tiles of fresh skies at the fiducial cosmology."""
    nside = nside_of(lmax)
    kappa = empty_kappa(N_FIDUCIAL_SIMS * TILES_PER_SIM, N_BINS, nside)
    ids = range(FIRST_FIDUCIAL_ID, FIRST_FIDUCIAL_ID + N_FIDUCIAL_SIMS)
    with Progress("fiducial skies", N_FIDUCIAL_SIMS, "simulations") as progress:
        for i, sim_id in enumerate(ids):
            simulation = Simulation(sim_id, FIDUCIAL_COSMO, "lognormal", NOISE_LEVEL, lmax, nside, "disjoint", 0)
            kappa[i * TILES_PER_SIM : (i + 1) * TILES_PER_SIM] = simulate(simulation)
            progress.advance()
    params = np.repeat(params_of(FIDUCIAL_COSMO[None]), len(kappa), axis=0)
    return Tiles(kappa, np.concatenate([tile_keys(i) for i in ids]), params, lmax, NOISE_LEVEL)


def mean_and_error(values: np.ndarray, sim_id: np.ndarray) -> tuple[float, float]:
    """Mean of values (n,) and its error over simulations, whose tiles share their cosmology."""
    sims, group = np.unique(sim_id, return_inverse=True)
    sums = np.bincount(group, values) / np.bincount(group)
    return float(values.mean()), float(sums.std(ddof=1) / np.sqrt(len(sims)))


def evaluate(run_folder: Path, npe_run: Path, fresh: Tiles, fiducial: Tiles) -> dict[str, Any]:
    """What a finished pair of runs reports, and the same figures on tiles that it has never seen."""
    device = pick_device("auto")
    norm_stats = read_norm_stats(run_folder)
    compressor = load_compressor(run_folder / CHECKPOINT_NAME, device, "float32")
    params = compressor.config.theta_names
    npe = load_npe(npe_run / NPE_CHECKPOINT_NAME, len(params), device)[0]

    def summaries(tiles: Tiles) -> tuple[torch.Tensor, TileDataset]:
        dataset = whole_dataset(tiles, params, norm_stats, device)
        return predict(compressor.model, dataset, BATCH_SIZE), dataset

    summary, dataset = summaries(fresh)
    squared = (summary - dataset.theta).square().mean(dim=1).double().numpy()  # (n,)
    with torch.no_grad():
        nll = npe.nll(summary.to(device), dataset.theta.to(device)).cpu().double().numpy()  # (n,)
    posterior = predict_posterior(npe, summary.to(device), params, norm_stats)
    fom = predict_posterior(npe, summaries(fiducial)[0].to(device), params, norm_stats).fom  # (n_fiducial,)
    rng, sim_id = np.random.default_rng(0), fresh.keys[:, 0]
    median, theta = float(np.median(fom)), fresh.columns(params)
    calibration = calibrate(posterior, theta, sim_id, rng, fom=median, tiles="fresh", optimistic=False)
    fom_error = float(bootstrap_median(fom, fiducial.keys[:, 0], rng).std())
    stage_1, stage_2 = read_result(run_folder / RESULT_NAME, CompressorResult, "stage 1"), read_fom_result(npe_run)
    return {
        "reported": {
            "fom": stage_2.fom_fiducial_median,
            "val_mse": stage_1.val_mse,
            "nll": stage_2.npe.best_test_nll,
            "train_mse": stage_1.train_mse,
        },
        "fresh": {
            "fom": [median, fom_error],
            "val_mse": mean_and_error(squared, sim_id),
            "nll": mean_and_error(nll, sim_id),
            "chi2_per_dof": [calibration.chi2_per_dof, calibration.chi2_per_dof_err],
        },
    }


def over_seeds(values: list[float]) -> str:
    """Mean and its error over seeds, to three digits."""
    digits = max(0, 2 - int(np.floor(np.log10(abs(np.mean(values))))))
    error = f" ± {np.std(values, ddof=1) / np.sqrt(len(values)):.{digits}f}" if len(values) > 1 else ""
    return f"{np.mean(values):.{digits}f}{error}"


def table(found: dict[str, list[dict[str, Any]]]) -> str:
    """A row per configuration; each error is that of the mean over seeds."""
    lines = [
        "| geometry, split | FoM reported | fresh | val MSE reported | fresh | NLL reported | fresh | chi2/dof fresh |",
        "|---|---|---|---|---|---|---|---|",
    ]
    columns: list[Callable[[dict[str, Any]], float]] = []
    for name in ("fom", "val_mse", "nll"):
        columns += [lambda r, n=name: r["reported"][n], lambda r, n=name: r["fresh"][n][0]]  # type: ignore[misc]
    columns.append(lambda r: r["fresh"]["chi2_per_dof"][0])
    for name, runs in found.items():
        lines.append(f"| {name} | " + " | ".join(over_seeds([column(r) for r in runs]) for column in columns) + " |")
    return "\n".join(lines)


def main() -> None:
    """Run what is missing, evaluate, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lmax", type=int, default=100)
    parser.add_argument("--backbone", default="tiny")
    parser.add_argument("--n-sims", type=int, default=N_SIMS, help="fewer are memorised sooner")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--geometries", nargs="+", choices=GEOMETRIES, default=GEOMETRIES)
    parser.add_argument("--splits", nargs="+", choices=SPLITS, default=SPLITS)
    parser.add_argument("--recipe", default=RECIPE, help="options of run_compressor.py")
    parser.add_argument("--results-dir", type=Path, default=Path("build/leakage"))
    options = parser.parse_args()
    lmax, results = options.lmax, options.results_dir
    tiles = f"--lmax {lmax} --noise-level {NOISE_LEVEL}"

    run(f"run_mock.py {tiles} --fresh --n-sims {N_FRESH} --results-dir {results}")
    for geometry in options.geometries:
        home = home_of(results, geometry, options.n_sims)
        run(f"run_mock.py {tiles} --geometry {geometry} --n-sims {options.n_sims} --results-dir {home}")
    fresh = read_tiles(tiles_folder("", results, lmax, NOISE_LEVEL, fresh=True), lmax, NOISE_LEVEL)
    fiducial = fiducial_tiles(lmax)

    found: dict[str, list[dict[str, Any]]] = {}
    for seed in range(1, options.seeds + 1):
        for geometry, split in CONFIGURATIONS:
            if split not in options.splits or geometry not in options.geometries:
                continue
            tag, home = f"{options.backbone}_lmax{lmax}_{split}_{seed}", home_of(results, geometry, options.n_sims)
            run_folder, npe_run = Path(home, COMPRESSOR_RUNS, tag), Path(home, NPE_RUNS, tag)
            if not (run_folder / RESULT_NAME).exists():
                run(
                    f"run_compressor.py {tiles} --backbone {options.backbone} {options.recipe} --split-by {split} "
                    f"--seed {seed} --results-dir {home} --tag {tag}"
                )
            if not (npe_run / NPE_RESULT_NAME).exists():
                run(f"run_npe.py --ckpt {run_folder / CHECKPOINT_NAME} --seed {seed}")
            found.setdefault(f"{geometry}, {split}", []).append(evaluate(run_folder, npe_run, fresh, fiducial))
        record = {
            "lmax": lmax,
            "n_sims": options.n_sims,
            "backbone": options.backbone,
            "recipe": options.recipe,
            "runs": found,
        }
        record |= {"n_bootstrap": N_BOOTSTRAP, "device": describe_device(pick_device("auto")), "versions": versions()}
        write_json(results / f"leakage_{options.backbone}_{options.n_sims}.json", record)
        print(f"\n{seed} of {options.seeds} seeds\n{table(found)}\n", flush=True)


if __name__ == "__main__":
    main()
