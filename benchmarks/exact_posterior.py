"""How much of the information do the two stages reach? Flat Gaussian tiles, whose posterior is known exactly.

python benchmarks/exact_posterior.py                          only Omega_m and S8 vary, the default recipe of a laptop
python benchmarks/exact_posterior.py --recipe best            the best that was found; others differ in one thing
python benchmarks/exact_posterior.py --vary all               all seven parameters vary
python benchmarks/exact_posterior.py --n-sims 3160            four times the tiles

Makes a suite, runs both stages on it through their commands (a finished run is not repeated), draws tiles that neither
has seen, and compares the learnt posteriors with the exact ones. It says nothing about non-Gaussian fields, seams,
masks or leakage.
"""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np
import torch

from common.artifacts import COMPRESSOR_RUNS, NPE_RUNS, read_json, tiles_folder, write_json
from common.device import describe_device
from common.figures import BLUE, GREY, ORANGE, figure
from common.versions import versions
from compress.model import load_compressor
from data.dataset import whole_dataset
from data.mock.config import Vary
from data.mock.cosmology import FIDUCIAL, held_fixed, prior_quantile
from data.mock.exact import (
    ExactPosterior,
    WeightedPoints,
    draws_from_prior,
    exact_posterior,
    grid_over_prior,
    log_likelihood,
)
from data.mock.flat import flat_tiles, powers_of
from data.mock.nz import N_BINS
from data.mock.theory import COSMO_NAMES
from data.norm_stats import read_norm_stats
from data.schema import FOM_PARAMS, NOISELESS, PARAM_NAMES
from data.tiles import Tiles, empty_kappa
from npe.calibration import calibrate
from npe.compressed import CompressedTileDataset, compress_all
from npe.ensemble import gaussian_kl
from npe.model import Posterior, load_npe, predict_posterior

LMAX, NSIDE, NOISE_LEVEL = 200, 64, "des_y3"
N_PRIOR, N_FIDUCIAL = 600, 300  # tiles; every prior-drawn one has a cosmology of its own
WORST = 0.05  # of the tiles; those at the edges of the prior, which cut their posteriors off
SEED = 20250722  # of these tiles, far from the suite's
N_DRAWS_LOG2 = 17  # importance draws where all parameters vary
CPU = torch.device("cpu")
# Options of stage 1, and whether it gets the noiseless tiles. "default" is the recipe of the README, "half" that of
# benchmarks/recipes.py with half its passes, "best" the best that was found; every other differs from the best in one
# thing. {epochs} and {decay} make as many steps, and as many decays, of any number of simulations.
TINY = "--backbone tiny --warmup-steps 200"
POWER = "--backbone power --warmup-steps 200"
LONG = "--max-epochs {epochs} --decay-epochs {decay} --decay-factor 0.75 --ema-decay 0.998"
EPOCHS, DECAY = 64, 4  # of LONG, for N_SIMS
N_SIMS = 791
RECIPES = {
    "default": (f"{TINY} --max-epochs 40 --decay-epochs 2 --decay-factor 0.8", False),
    "half": (
        "--backbone tiny --max-epochs 20 --warmup-steps 100 --decay-epochs 5 --decay-factor 0.6 --ema-decay 0.99 "
        "--norm-tiles 1024",
        False,
    ),
    "best": (f"{POWER} {LONG}", True),
    "own-noise": (f"{POWER} {LONG}", False),
    "tiny": (f"{TINY} {LONG}", True),
}


def train(results: Path, vary: Vary, n_sims: int, recipe: str, seed: int) -> tuple[Path, Path, str]:
    """Suite, stage 1 and stage 2 through their commands: the folders of both runs, and the options of stage 1."""
    tag = f"{recipe}_{seed}"
    stage_1, noiseless = RECIPES[recipe]
    more = max(1, round(n_sims / N_SIMS))
    stage_1 = stage_1.format(epochs=EPOCHS // more, decay=DECAY // more)
    compressor_run, npe_run = Path(results, COMPRESSOR_RUNS, tag), Path(results, NPE_RUNS, tag)
    size, level = f"--lmax {LMAX} --nside {NSIDE}", f"--noise-level {NOISE_LEVEL}"
    suite = f"run_mock.py {size} --geometry flat --field gaussian --vary {vary} --n-sims {n_sims}"
    suite += f" --results-dir {results}"
    commands = [f"{suite} {level}"]
    if noiseless:
        commands.append(f"{suite} --noise-level {NOISELESS}")
        stage_1 += f" --noiseless-tiles {tiles_folder('', results, LMAX, NOISELESS)}"
    if not (compressor_run / "result.json").exists():
        commands.append(f"run_compressor.py {size} {level} {stage_1} --results-dir {results} --tag {tag} --seed {seed}")
    if not (npe_run / "fom_result.json").exists():
        commands.append(f"run_npe.py --ckpt {compressor_run / 'best.ckpt'} --seed {seed}")
    for command in commands:
        print(f"$ python {command}", flush=True)
        script, *options = shlex.split(command)
        subprocess.run([sys.executable, str(ROOT / script), *options], check=True)
    return compressor_run, npe_run, stage_1


def unseen_tiles(vary: Vary) -> tuple[np.ndarray, np.ndarray]:
    """Tiles that no training saw, prior-drawn and then fiducial ones: cosmologies (n, 7), kappa (n, 4, N, N)."""
    fiducial = np.array([FIDUCIAL[name] for name in COSMO_NAMES])
    cosmo = prior_quantile(np.random.default_rng(SEED).random((N_PRIOR, len(COSMO_NAMES))))
    cosmo = np.concatenate([held_fixed(cosmo, vary), np.tile(fiducial, (N_FIDUCIAL, 1))])
    kappa = empty_kappa(len(cosmo), N_BINS, NSIDE)
    for i, one in enumerate(cosmo):
        signal_rng, noise_rng = (np.random.default_rng([SEED, i, kind]) for kind in (1, 2))
        kappa[i] = flat_tiles(one, NOISE_LEVEL, LMAX, NSIDE, 1, signal_rng, noise_rng)[0]
    return cosmo, kappa


def learnt_posterior(compressor_run: Path, npe_run: Path, kappa: np.ndarray) -> Posterior:
    """What the trained networks say of tiles (n, 4, N, N)."""
    norm_stats = read_norm_stats(compressor_run)
    params = np.ones((len(kappa), len(PARAM_NAMES)))  # not looked at
    tiles = Tiles(kappa, np.zeros((len(kappa), 3), dtype=np.int64), params, LMAX, NOISE_LEVEL)
    dataset = whole_dataset(tiles, FOM_PARAMS, norm_stats, CPU)
    compressor = load_compressor(compressor_run / "best.ckpt", CPU, "float32").model
    npe = load_npe(npe_run / "npe_best.ckpt", CPU)[0]
    n_views = read_json(npe_run / "fom_result.json")["config"]["n_views"]
    summary, _ = compress_all(CompressedTileDataset(dataset, compressor, n_views), 256)
    return predict_posterior(npe, summary, norm_stats)


def importance_error(points: WeightedPoints, log_like: np.ndarray) -> tuple[float, float]:
    """Relative error of the exact FoM and the KL (nats) that importance sampling makes, from its two halves.

    Half the rms difference of two halves estimates the error of the whole. Both are per tile. Either half of a Sobol
    sequence, the first and the second, fills the space evenly.
    """
    half = len(points.weight) // 2
    halves = [
        exact_posterior(WeightedPoints(points.cosmo[part], points.weight[part] * 2, 0.0), log_like[part])
        for part in (slice(half), slice(half, None))
    ]
    ln_fom = np.log(halves[0].fom / halves[1].fom)
    kl = gaussian_kl(*(Posterior(h.mu, h.cov, h.fom) for h in halves))
    return float(np.sqrt(np.square(ln_fom).mean()) / 2), float(kl.mean() / 4)


def compare(exact: ExactPosterior, learnt: Posterior, theta: np.ndarray) -> dict[str, Any]:
    """All figures; theta (n, 2) holds the truth, prior-drawn tiles first."""
    best = Posterior(exact.mu, exact.cov, exact.fom)
    prior, fiducial = slice(0, N_PRIOR), slice(N_PRIOR, None)
    kl = (exact.kl_gaussian + gaussian_kl(best, learnt))[prior]
    ratio = learnt.fom / exact.fom

    def calibration(posterior: Posterior) -> dict[str, Any]:
        one = Posterior(posterior.mu[prior], posterior.cov[prior], posterior.fom[prior])
        found = calibrate(one, theta[prior], np.arange(N_PRIOR), np.random.default_rng(0))
        return found.to_json(float(np.median(posterior.fom[fiducial])))

    sigma = np.sqrt(np.diagonal(exact.cov[fiducial], axis1=1, axis2=2)).mean(axis=0)
    return {
        "n_prior_tiles": N_PRIOR,
        "n_fiducial_tiles": len(ratio) - N_PRIOR,
        "kl_mean": float(kl.mean()),
        "kl_mean_err": float(kl.std() / np.sqrt(len(kl))),
        "kl_median": float(np.median(kl)),
        "kl_share_of_worst": float(np.sort(kl)[-int(WORST * len(kl)) :].sum() / kl.sum()),
        "kl_best_gaussian_mean": float(exact.kl_gaussian[prior].mean()),
        "kl_best_gaussian_median": float(np.median(exact.kl_gaussian[prior])),
        "fom_ratio_prior_median": float(np.median(ratio[prior])),
        "fom_ratio_fiducial": float(np.median(learnt.fom[fiducial]) / np.median(exact.fom[fiducial])),
        "fom_exact_fiducial": float(np.median(exact.fom[fiducial])),
        "sigma_exact_fiducial": dict(zip(FOM_PARAMS, sigma.tolist(), strict=True)),
        "n_effective_min": float(exact.n_effective.min()),
        "n_effective_median": float(np.median(exact.n_effective)),
        "calibration": calibration(learnt),
        "calibration_of_exact": calibration(best),
    }


def draw(result: dict[str, Any], exact: ExactPosterior, learnt: Posterior, path: Path) -> None:
    """FoM against the exact one tile by tile, and the coverage of both."""
    with figure(path, 9.6, 4.2) as drawn:
        left, right = drawn.subplots(1, 2)
        for part, colour, name in ((slice(N_PRIOR), BLUE, "prior-drawn"), (slice(N_PRIOR, None), ORANGE, "fiducial")):
            left.loglog(exact.fom[part], learnt.fom[part], ".", ms=4, alpha=0.5, color=colour, label=name)
        ends = [exact.fom.min(), exact.fom.max()]
        left.plot(ends, ends, color=GREY, lw=1)
        left.set(xlabel="exact FoM", ylabel="learnt FoM", title=f"median ratio {result['fom_ratio_prior_median']:.3f}")
        left.legend()
        for key, colour, name in (("calibration_of_exact", GREY, "exact"), ("calibration", BLUE, "learnt")):
            found = result[key]
            right.plot(found["levels"], found["coverage"], color=colour, label=f"{name}, s = {found['s']:.2f}")
        right.fill_between(
            found["levels"], found["coverage_lo_16"], found["coverage_hi_84"], color=BLUE, alpha=0.2, lw=0
        )
        right.set(xlabel="credibility", ylabel="share of tiles with the truth inside", title="Gaussian coverage")
        right.legend()


def main() -> None:
    """Train, compare, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vary", choices=["Omega_m,S8", "all"], default="Omega_m,S8")
    parser.add_argument("--recipe", choices=list(RECIPES), default="default")
    parser.add_argument("--n-sims", type=int, default=N_SIMS)
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--results-dir", type=Path, default=Path("build/exact"))
    options = parser.parse_args()
    results = options.results_dir / f"{options.vary.replace(',', '_')}_{options.n_sims}"
    compressor_run, npe_run, used = train(results, options.vary, options.n_sims, options.recipe, options.seed)

    cosmo, kappa = unseen_tiles(options.vary)
    points = grid_over_prior() if options.vary == "Omega_m,S8" else draws_from_prior(N_DRAWS_LOG2, SEED)
    log_like = log_likelihood(points.cosmo, powers_of(kappa, LMAX), NOISE_LEVEL, LMAX, NSIDE)
    exact = exact_posterior(points, log_like)
    learnt = learnt_posterior(compressor_run, npe_run, kappa)
    result = compare(exact, learnt, cosmo[:, :2])
    if not points.cell:
        result["fom_exact_relative_error"], result["kl_error"] = importance_error(points, log_like)
    result |= {
        "vary": options.vary,
        "n_sims": options.n_sims,
        "recipe": used,
        "seed": options.seed,
    }
    result |= {"device": describe_device(CPU), "versions": versions()}
    name = f"exact_posterior_{options.recipe}_{options.seed}"
    write_json(results / f"{name}.json", result)
    draw(result, exact, learnt, results / f"{name}.png")

    calibration = result["calibration"]
    print(
        f"\n{options.vary} vary, {options.n_sims} simulations, {options.recipe}: {result['recipe']}\n"
        f"KL(exact || NPE)        mean {result['kl_mean']:.3f} +- {result['kl_mean_err']:.3f}, median "
        f"{result['kl_median']:.3f} nats, {N_PRIOR} prior-drawn tiles\n"
        f"  worst {WORST:.0%} of tiles     make {result['kl_share_of_worst']:.0%} of the mean\n"
        f"  best Gaussian         mean {result['kl_best_gaussian_mean']:.3f}, median "
        f"{result['kl_best_gaussian_median']:.3f}\n"
        f"FoM / exact             {result['fom_ratio_prior_median']:.3f} prior-drawn, "
        f"{result['fom_ratio_fiducial']:.3f} fiducial (exact {result['fom_exact_fiducial']:.0f})\n"
        f"s                       {calibration['s']:.2f} +- {calibration['s_err']:.2f}, {calibration['verdict']} "
        f"(exact posterior: {result['calibration_of_exact']['s']:.2f})\n"
        f"effective points        at least {result['n_effective_min']:.0f}, median {result['n_effective_median']:.0f}"
    )
    if not points.cell:
        print(
            f"importance sampling     FoM good to {result['fom_exact_relative_error']:.1%}, KL to "
            f"{result['kl_error']:.4f} nats per tile"
        )
    print(f"all                     {results / name}.json, .png")


if __name__ == "__main__":
    main()
