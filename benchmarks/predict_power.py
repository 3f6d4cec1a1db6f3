"""What run_predict.py's verdict catches: `python benchmarks/predict_power.py --run results/field_npe_runs/TAG`.

The run is of the lognormal mock suite. 1008 tiles of 84 fresh simulations from its prior, and the same tiles with
something wrong: how many of each are called unlike the training tiles (below 1 %, which is the share of ordinary ones).
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np
import pyccl
from npe.likeness import REFERENCE_NAME, WARN_BELOW, Likeness, load_reference, look_at

from benchmarks.measure import header
from common.artifacts import read_sealed, write_json
from common.device import pick_device
from common.machine import usable_cores
from common.progress import Progress
from compress.model import load_compressor
from data.dataset import whole_dataset
from data.mock.cosmology import design, params_of
from data.mock.fields import band_of, lognormal_alm
from data.mock.make_theory_table import ELL, ccl_universe
from data.mock.nz import N_BINS, nz_of_bins
from data.mock.theory import BIN_PAIRS, theory_cl
from data.norm_stats import read_norm_stats
from data.schema import FOM_PARAMS, nside_of, tile_keys
from data.sphere.harmonics import noise_alm
from data.sphere.tiles import tiles_of_alm
from data.tiles import Tiles
from data.workers import in_order, worker_pool
from npe.compressed import CompressedTileDataset

N_SIMS, SEED, FIRST_ID = 84, 987_654_321, 2_000_000  # sim_ids, and so skies, that no suite has
NOISE_FACTOR, STRIPES, DELTA_Z = 1.2, 0.5, 0.1
PERIODS = (4, 8, 16, 32)  # of the stripes, in pixels
BATCH_SIZE = 128


def ratio_of_shifted(cosmo: np.ndarray) -> np.ndarray:
    """C_ell with the sources of bin 1 moved by DELTA_Z over those without: (10, n_ell) at ELL."""
    universe = ccl_universe(cosmo)
    z = np.linspace(1e-4, 4.0, 801)
    usual = nz_of_bins(z)
    moved = np.concatenate([nz_of_bins(z - DELTA_Z)[:1], usual[1:]])

    def spectra(nz: np.ndarray) -> np.ndarray:
        tracers = [pyccl.WeakLensingTracer(universe, dndz=(z, n)) for n in nz]
        return np.stack([pyccl.angular_cl(universe, tracers[i], tracers[j], ELL) for i, j in BIN_PAIRS])

    return spectra(moved) / spectra(usual)


def tiles_of(job: tuple[int, np.ndarray, int, str, str]) -> dict[str, np.ndarray]:
    """Signal, signal with moved sources, and noise of one simulation: float32 (12, 4, N, N) each."""
    sim_id, cosmo, lmax, noise_level, geometry = job
    band = band_of(lmax, "lognormal")
    cl = theory_cl(cosmo[None], band)[0]  # (10, band + 1)
    ell = np.maximum(np.arange(band + 1), ELL[0])
    ratio = np.stack([np.interp(np.log(ell), np.log(ELL), one) for one in ratio_of_shifted(cosmo)])
    alms = {
        "signal": lognormal_alm(cl, lmax, np.random.default_rng([SEED, sim_id, 0])),
        "moved": lognormal_alm(cl * ratio, lmax, np.random.default_rng([SEED, sim_id, 0])),
        "noise": noise_alm(noise_level, N_BINS, lmax, np.random.default_rng([SEED, sim_id, 1])),
    }
    return {name: tiles_of_alm(alm, lmax, nside_of(lmax), geometry) for name, alm in alms.items()}


def main() -> None:
    """Make tiles, judge, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--results-dir", type=Path, default=Path("build/bench"))
    options = parser.parse_args()
    device = pick_device("auto")
    stage_2 = read_sealed(options.run / "fom_result.json", "stage 2")
    ckpt = Path(stage_2["config"]["ckpt"])
    trained = load_compressor(ckpt, device, "auto")
    norm_stats = read_norm_stats(ckpt.parent)
    lmax, level = trained.config.lmax, trained.config.noise_level
    likeness = Likeness(load_reference(options.run / REFERENCE_NAME, stage_2["reference_sha256"]))

    _, cosmologies = design(N_SIMS, SEED, None)
    jobs = [(FIRST_ID + k, cosmo, lmax, level, "disjoint") for k, cosmo in enumerate(cosmologies)]
    with worker_pool(usable_cores()) as pool, Progress("fresh skies", N_SIMS, "simulations") as progress:
        made = []
        for one in in_order(pool, tiles_of, jobs, 4):
            made.append(one)
            progress.advance()
    parts = {name: np.concatenate([one[name] for one in made]) for name in made[0]}
    signal, noise = parts["signal"], parts["noise"]
    sigma = (signal + noise).std(axis=(0, 2, 3), keepdims=True)
    x = np.arange(signal.shape[-1])
    kinds = {"ordinary": signal + noise, f"noise x {NOISE_FACTOR}": signal + np.float32(NOISE_FACTOR) * noise}
    for period in PERIODS:
        wave = np.float32(STRIPES) * sigma * np.sqrt(2) * np.sin(2 * np.pi * x / period + 0.5)
        kinds[f"stripes of {STRIPES} sigma, {period} pixels"] = (signal + noise + wave).astype(np.float32)
    kinds[f"bin 1 moved by {DELTA_Z} in z"] = parts["moved"] + noise
    keys = np.concatenate([tile_keys(FIRST_ID + k) for k in range(N_SIMS)])
    params = np.repeat(params_of(cosmologies), len(keys) // N_SIMS, axis=0)
    found = {}
    print(f"\n| {len(keys)} tiles | called unlike | " + " | ".join(likeness.ordered) + " |")
    print("|---|---|" + "---|" * len(likeness.ordered))
    for name, kappa in kinds.items():
        dataset = whole_dataset(Tiles(kappa, keys, params, lmax, level), FOM_PARAMS, norm_stats, device)
        summary, spectra = look_at(
            CompressedTileDataset(dataset, trained.model, stage_2["config"]["n_views"]), lmax, 128
        )
        tails = likeness.judge(summary, spectra)
        shares = {test: float(np.mean(tail < WARN_BELOW)) for test, tail in tails.items()}
        by_sim = (tails["all"] < WARN_BELOW).reshape(N_SIMS, -1).mean(axis=1)
        found[name] = shares | {"error": float(by_sim.std(ddof=1) / np.sqrt(N_SIMS))}
        cells = " | ".join(f"{100 * shares[test]:.1f} %" for test in likeness.ordered)
        print(f"| {name} | {100 * shares['all']:.1f} ± {100 * found[name]['error']:.1f} % | {cells} |", flush=True)
    record = {"run": str(options.run), "shares": found} | header(device)
    write_json(options.results_dir / "predict_power.json", record)


if __name__ == "__main__":
    main()
