"""Fewer passes for the same loss: `python benchmarks/recipes.py` (half an hour on two cores for tiny).

Stage 1 on the lognormal suite of 791 simulations at lmax 100, with the long recipe and others, over several seeds. They
are evaluated on 500 fresh simulations from the same prior, which no run and no early stopping has seen. Prints the mean
squared error on those tiles, its ratio to that of the long recipe with the same seed, and the number of epochs. The
suites are those of benchmarks/leakage.py. A finished run is not repeated.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np

from benchmarks.leakage import BATCH_SIZE, N_FRESH, N_SIMS, NOISE_LEVEL, home_of, mean_and_error, run
from common.artifacts import COMPRESSOR_RUNS, tiles_folder, write_json
from common.device import describe_device, pick_device
from common.results import read_result
from common.versions import versions
from compress.evaluate import predict
from compress.model import CHECKPOINT_NAME, load_compressor
from compress.result import RESULT_NAME, CompressorResult
from data.cache import read_tiles_through_cache
from data.dataset import whole_dataset
from data.norm_stats import read_norm_stats
from data.tiles import Tiles

LMAX = 100
LONG = "--max-epochs 40 --warmup-steps 200 --decay-epochs 2 --decay-factor 0.8"
RECIPES = {  # the others are compared with the first
    "long": f"{LONG} --norm-tiles 0",
    "fresh statistics": f"{LONG} --norm-tiles 1024",  # of BatchNorm
    "laptop": "--recipe laptop --norm-tiles 1024",
    "third": "--recipe laptop --norm-tiles 1024 --max-epochs 13 --decay-epochs 3 --decay-factor 0.5",
}


def evaluate(run_folder: Path, fresh: Tiles) -> dict[str, Any]:
    """Losses and cost of a finished run."""
    device = pick_device("auto")
    result = read_result(run_folder / RESULT_NAME, CompressorResult, "stage 1")
    compressor = load_compressor(run_folder / CHECKPOINT_NAME, device, "float32")
    dataset = whole_dataset(fresh, compressor.config.theta_names, read_norm_stats(run_folder), device)
    error = predict(compressor.model, dataset, BATCH_SIZE) - dataset.theta  # (n, d)
    return {
        "fresh_mse": mean_and_error(error.square().mean(dim=1).double().numpy(), fresh.keys[:, 0]),
        "val_mse": result.val_mse,
        "epochs": result.epochs,
        "seconds": result.elapsed_s,
    }


def table(found: dict[str, list[dict[str, Any]]]) -> str:
    """A row per recipe."""
    lines = ["| recipe | epochs | s | val MSE | fresh MSE | fresh / long, same seed |", "|---|---|---|---|---|---|"]
    long = [r["fresh_mse"][0] for r in next(iter(found.values()))]
    for name, runs in found.items():
        ratio = np.array([r["fresh_mse"][0] for r in runs]) / long[: len(runs)]
        error = f" ± {ratio.std(ddof=1) / np.sqrt(len(ratio)):.3f}" if len(ratio) > 1 else ""
        mean = {key: np.mean([r[key] for r in runs]) for key in ("epochs", "seconds", "val_mse")}
        lines.append(
            f"| {name} | {mean['epochs']:.0f} | {mean['seconds']:.0f} | {mean['val_mse']:.4f} "
            f"| {np.mean([r['fresh_mse'][0] for r in runs]):.4f} | {ratio.mean():.3f}{error} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Run what is missing, evaluate, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", default="tiny")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--n-sims", type=int, default=N_SIMS)
    parser.add_argument("--recipes", nargs="+", choices=list(RECIPES), default=list(RECIPES))
    parser.add_argument("--results-dir", type=Path, default=Path("build/leakage"))
    options = parser.parse_args()
    home = home_of(options.results_dir, "disjoint", options.n_sims)
    tiles = f"--lmax {LMAX} --noise-level {NOISE_LEVEL}"
    run(f"run_mock.py {tiles} --fresh --n-sims {N_FRESH} --results-dir {options.results_dir}")
    run(f"run_mock.py {tiles} --geometry disjoint --n-sims {options.n_sims} --results-dir {home}")
    folder = tiles_folder("", options.results_dir, LMAX, NOISE_LEVEL, fresh=True)
    fresh, _ = read_tiles_through_cache(folder, LMAX, NOISE_LEVEL)
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in options.recipes}
    for seed in range(1, options.seeds + 1):
        for name in options.recipes:
            tag = f"{options.backbone}_{name.replace(' ', '_')}_{seed}"
            run_folder = Path(home, COMPRESSOR_RUNS, tag)
            if not (run_folder / RESULT_NAME).exists():
                run(
                    f"run_compressor.py {tiles} --backbone {options.backbone} {RECIPES[name]} --seed {seed} "
                    f"--results-dir {home} --tag {tag}"
                )
            found[name].append(evaluate(run_folder, fresh))
        record = {
            "lmax": LMAX,
            "n_sims": options.n_sims,
            "backbone": options.backbone,
            "recipes": RECIPES,
            "runs": found,
        }
        record |= {"device": describe_device(pick_device("auto")), "versions": versions()}
        write_json(options.results_dir / f"recipes_{options.backbone}_{options.n_sims}.json", record)
        print(f"\n{seed} of {options.seeds} seeds\n{table(found)}\n", flush=True)


if __name__ == "__main__":
    main()
