"""What the check of run_predict.py finds: `python benchmarks/predict_power.py --run results/field_npe_runs/TAG`.

The run must be of the lognormal mock suite. 1008 tiles of 84 fresh simulations from its prior, as they are and with a
defect: how many of each are flagged as out of distribution (probability below 1 %, so 1 % of ordinary tiles are).
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np
import torch

from benchmarks.defects import FIRST_ID, SEED, fresh_tiles
from benchmarks.measure import header
from common.artifacts import write_json
from common.device import pick_device
from compress.model import load_compressor
from data.dataset import whole_dataset
from data.mock.cosmology import design, params_of
from data.mock.nz import N_BINS
from data.norm_stats import read_norm_stats
from data.schema import TILES_PER_SIM, tile_keys
from data.tiles import Tiles
from npe.compressed import CompressedTileDataset
from npe.ood import REFERENCE_NAME, WARN_BELOW, OutOfDistributionCheck, load_reference, look_at
from npe.result import read_fom_result

N_SIMS = 84
BATCH_SIZE = 128


def flagged(run: Path, device: torch.device) -> dict[str, dict[str, float]]:
    """Shares of flagged tiles by kind, then by test, with the error of `all`; prints them as a table."""
    stage_2 = read_fom_result(run)
    ckpt = Path(stage_2.config["ckpt"])
    compressor, norm_stats = load_compressor(ckpt, device, "auto"), read_norm_stats(ckpt.parent)
    lmax, noise_level, params = compressor.config.lmax, compressor.config.noise_level, stage_2.params
    check = OutOfDistributionCheck(load_reference(run / REFERENCE_NAME, stage_2.reference_sha256), N_BINS)
    _, cosmologies = design(N_SIMS, SEED, None)
    keys = np.concatenate([tile_keys(FIRST_ID + k) for k in range(N_SIMS)])
    all_params = np.repeat(params_of(cosmologies), TILES_PER_SIM, axis=0)
    kinds = fresh_tiles(cosmologies, lmax, noise_level)
    print(f"\n| {len(keys)} tiles | flagged | " + " | ".join(check.ordered) + " |")
    print("|---|---|" + "---|" * len(check.ordered))
    found = {}
    for name, kappa in kinds.items():
        dataset = whole_dataset(Tiles(kappa, keys, all_params, lmax, noise_level), params, norm_stats, device)
        tails = check.tail_probabilities(*look_at(CompressedTileDataset(dataset, compressor.model), lmax, BATCH_SIZE))
        shares = {test: float(np.mean(tail < WARN_BELOW)) for test, tail in tails.items()}
        by_sim = (tails["all"] < WARN_BELOW).reshape(N_SIMS, -1).mean(axis=1)  # (n_sims,)
        found[name] = shares | {"error": float(by_sim.std(ddof=1) / np.sqrt(N_SIMS))}
        cells = " | ".join(f"{100 * shares[test]:.1f} %" for test in check.ordered)
        print(f"| {name} | {100 * shares['all']:.1f} ± {100 * found[name]['error']:.1f} % | {cells} |", flush=True)
    return found


def main() -> None:
    """Make tiles, check them, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--results-dir", type=Path, default=Path("build/bench"))
    options = parser.parse_args()
    device = pick_device("auto")
    record = {"run": str(options.run), "shares": flagged(options.run, device)} | header(device)
    options.results_dir.mkdir(parents=True, exist_ok=True)
    write_json(options.results_dir / "predict_power.json", record)


if __name__ == "__main__":
    main()
