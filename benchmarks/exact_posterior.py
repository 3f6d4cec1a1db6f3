"""How much of the information do the two stages reach? Flat Gaussian tiles, whose posterior is known exactly.

python benchmarks/exact_posterior.py                    only Omega_m and S8 vary; --recipe laptop of run_compressor.py
python benchmarks/exact_posterior.py --recipe best      --recipe best, with noiseless tiles
python benchmarks/exact_posterior.py --vary all         all seven parameters vary
python benchmarks/exact_posterior.py --nuisances        shear biases and the amplitude of alignments vary, too
python benchmarks/exact_posterior.py --stage-1 "--loss nll"     further options of run_compressor.py
python benchmarks/exact_posterior.py --n-sims 3160      four times the tiles

Makes a suite, runs both stages on it with their commands (a finished run is not repeated), draws tiles that neither has
seen, and compares the learnt posteriors with the exact ones. At the end all runs on the suite stand side by side. It
says nothing about non-Gaussian fields, seams, masks or leakage.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np
import torch

from benchmarks.compare import name_of
from benchmarks.leakage import BATCH_SIZE, run
from common.artifacts import COMPRESSOR_RUNS, NONE, NPE_RUNS, read_json, tiles_folder, write_json
from common.device import describe_device
from common.figures import BLUE, GREY, ORANGE, figure
from common.versions import versions
from compress.model import CHECKPOINT_NAME, load_compressor
from compress.result import RESULT_NAME
from data.dataset import whole_dataset
from data.mock.config import Vary
from data.mock.cosmology import FIDUCIAL_COSMO, held_fixed, prior_quantile
from data.mock.exact import (
    ExactPosterior,
    WeightedPoints,
    draws_from_prior,
    draws_with_nuisances,
    exact_posterior,
    grid_over_prior,
    log_likelihood,
)
from data.mock.flat import flat_tiles, powers_of
from data.mock.nz import N_BINS
from data.mock.theory import COSMO_NAMES
from data.norm_stats import read_norm_stats
from data.nuisance import DES_Y3, Prior, nuisance_of, priors_of, read_priors
from data.nuisance import draw as draw_nuisances
from data.schema import FOM_PARAMS, NOISELESS, PARAM_NAMES
from data.tiles import Tiles, empty_kappa
from npe.calibration import calibrate
from npe.compressed import CompressedTileDataset, compress_all
from npe.ensemble import gaussian_kl
from npe.model import CHECKPOINT_NAME as NPE_CHECKPOINT_NAME
from npe.model import Posterior, load_npe, posterior_of_moments, predict_posterior
from npe.result import RESULT_NAME as NPE_RESULT_NAME

LMAX, NSIDE, NOISE_LEVEL = 200, 64, "des_y3"
N_PRIOR, N_FIDUCIAL = 600, 300  # tiles; each of those drawn from the prior has its own cosmology
WORST = 0.05  # of the tiles; those at the edges of the prior, which cut off their posteriors
SEED = 20250722  # of these tiles, far from the suite's
N_DRAWS_LOG2 = 17  # importance draws if all parameters vary
CPU = torch.device("cpu")
# Options of stage 1, and whether it gets the noiseless tiles. "laptop" and "best" are recipes of run_compressor.py,
# "long" needs twice the passes of "laptop", and the rest differ from "best" in one thing.
LONG = "--backbone tiny --max-epochs 40 --warmup-steps 200 --norm-tiles 0 --decay-epochs 2 --decay-factor 0.8"
N_SIMS = 791
NUISANCE = "m+ia"  # of --nuisances
RECIPES = {
    "laptop": ("--recipe laptop", False),
    "long": (LONG, False),
    "best": ("--recipe best", True),
    "power": ("--recipe best --backbone power", True),
    "tiny": ("--recipe best --backbone tiny", True),
    "own-noise": ("--recipe best", False),
}


def priors_file(results: Path) -> Path:
    """DES Y3's priors of the nuisances, but alignments that do not evolve, so that one number says what they are."""
    path = results / "priors.txt"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(DES_Y3.replace("eta_IA flat -5 5", "eta_IA flat 0 0"))
    return path


def train(
    results: Path, vary: Vary, n_sims: int, recipe: str, more_options: str, seed: int, nuisance: str
) -> tuple[str, str]:
    """Run the commands of the suite and of both stages: the name of both runs, and the options of stage 1."""
    stage_1, noiseless = RECIPES[recipe]
    stage_1 = f"{stage_1} {more_options}".strip()
    tag = name_of(f"{recipe} {more_options} {seed}")
    compressor_run, npe_run = Path(results, COMPRESSOR_RUNS, tag), Path(results, NPE_RUNS, tag)
    size, level = f"--lmax {LMAX} --nside {NSIDE} --nuisance {nuisance}", f"--noise-level {NOISE_LEVEL}"
    suite = f"run_mock.py {size} --geometry flat --field gaussian --vary {vary} --n-sims {n_sims}"
    suite += f" --results-dir {results}"
    if nuisance != NONE:
        suite += f" --nuisance-priors {priors_file(results)}"
    commands = [f"{suite} {level}"]
    if noiseless:
        commands.append(f"{suite} --noise-level {NOISELESS}")
        stage_1 += f" --noiseless-tiles {tiles_folder('', results, LMAX, NOISELESS, nuisance)}"
    if not (compressor_run / RESULT_NAME).exists():
        commands.append(f"run_compressor.py {size} {level} {stage_1} --results-dir {results} --tag {tag} --seed {seed}")
    if not (npe_run / NPE_RESULT_NAME).exists():
        commands.append(f"run_npe.py --ckpt {compressor_run / CHECKPOINT_NAME} --seed {seed}")
    for command in commands:
        run(command)
    return tag, stage_1


def unseen_tiles(vary: Vary, priors: dict[str, Prior]) -> tuple[np.ndarray, np.ndarray]:
    """Tiles that no training saw, first from the prior, then fiducial: cosmologies (n, 7), kappa (n, 4, N, N)."""
    cosmo = prior_quantile(np.random.default_rng(SEED).random((N_PRIOR, len(COSMO_NAMES))))
    cosmo = np.concatenate([held_fixed(cosmo, vary), np.tile(FIDUCIAL_COSMO, (N_FIDUCIAL, 1))])
    kappa = empty_kappa(len(cosmo), N_BINS, NSIDE)
    for i, one in enumerate(cosmo):
        signal_rng, noise_rng = (np.random.default_rng([SEED, i, kind]) for kind in (1, 2))
        drawn = nuisance_of(draw_nuisances(priors, SEED, i, fiducial=i >= N_PRIOR), 0, N_BINS)
        size = NOISE_LEVEL, LMAX, NSIDE, 1
        kappa[i] = flat_tiles(one, *size, signal_rng, noise_rng, [drawn] if priors else ())[0]
    return cosmo, kappa


def learnt_posterior(compressor_run: Path, npe_run: Path, kappa: np.ndarray) -> Posterior:
    """Posteriors of (Omega_m, S8) for tiles (n, 4, N, N) from the trained networks."""
    norm_stats = read_norm_stats(compressor_run)
    compressor = load_compressor(compressor_run / CHECKPOINT_NAME, CPU, "float32")
    params, unused = compressor.config.theta_names, np.ones((len(kappa), len(PARAM_NAMES)))
    nuisances = {name: unused[:, 0] for name in params if name not in PARAM_NAMES}
    keys = np.zeros((len(kappa), 3), dtype=np.int64)
    tiles = Tiles(kappa, keys, unused, LMAX, NOISE_LEVEL, nuisances=nuisances)
    dataset = whole_dataset(tiles, params, norm_stats, CPU)
    npe = load_npe(npe_run / NPE_CHECKPOINT_NAME, len(params), CPU)[0]
    summary, _ = compress_all(CompressedTileDataset(dataset, compressor.model), BATCH_SIZE)
    posterior = predict_posterior(npe, summary, params, norm_stats)
    return posterior_of_moments(FOM_PARAMS, posterior.mu[:, posterior.of_fom], posterior.cov_of_fom)


def importance_error(points: WeightedPoints, log_like: np.ndarray) -> tuple[float, float]:
    """Relative error of the exact FoM, and error of the KL (nats), per tile, due to importance sampling.

    Half the rms difference of two halves of the draws estimates the error of the whole. The first and the second half
    of a Sobol sequence both fill the space evenly.
    """
    n_half = len(points.weight) // 2
    halves = [
        exact_posterior(WeightedPoints(points.cosmo[part], points.weight[part] * 2, 0.0), log_like[part])
        for part in (slice(n_half), slice(n_half, None))
    ]
    ln_fom = np.log(halves[0].fom / halves[1].fom)
    kl = gaussian_kl(*(posterior_of_moments(FOM_PARAMS, half.mu, half.cov) for half in halves))
    return float(np.sqrt(np.square(ln_fom).mean()) / 2), float(kl.mean() / 4)


def compare(exact: ExactPosterior, learnt: Posterior, theta: np.ndarray) -> dict[str, Any]:
    """All figures; theta (n, 2) holds the truth, tiles from the prior first."""
    best = posterior_of_moments(FOM_PARAMS, exact.mu, exact.cov)
    prior, fiducial = slice(0, N_PRIOR), slice(N_PRIOR, None)
    kl = (exact.kl_gaussian + gaussian_kl(best, learnt))[prior]
    ratio = learnt.fom / exact.fom

    def calibration(posterior: Posterior) -> dict[str, Any]:
        one = Posterior(FOM_PARAMS, posterior.mu[prior], posterior.cov[prior], posterior.inverse_volume[prior])
        rng, fom = np.random.default_rng(0), float(np.median(posterior.fom[fiducial]))
        name = "unseen tiles from the prior"
        return asdict(calibrate(one, theta[prior], np.arange(N_PRIOR), rng, fom=fom, tiles=name, optimistic=False))

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


def summary(result: dict[str, Any], recipe: str) -> str:
    """The figures to print."""
    calibration = result["calibration"]
    lines = [
        f"{result['vary']} vary, {result['n_sims']} simulations, {recipe}: {result['recipe']}",
        f"KL(exact || NPE)        mean {result['kl_mean']:.3f} +- {result['kl_mean_err']:.3f}, median "
        f"{result['kl_median']:.3f} nats, {N_PRIOR} tiles from the prior",
        f"  worst {WORST:.0%} of tiles     make {result['kl_share_of_worst']:.0%} of the mean",
        f"  best Gaussian         mean {result['kl_best_gaussian_mean']:.3f}, median "
        f"{result['kl_best_gaussian_median']:.3f}",
        f"FoM / exact             {result['fom_ratio_prior_median']:.3f} prior, {result['fom_ratio_fiducial']:.3f} "
        f"fiducial (exact {result['fom_exact_fiducial']:.0f})",
        f"chi2/dof                {calibration['chi2_per_dof']:.2f} +- {calibration['chi2_per_dof_err']:.2f}, "
        f"{calibration['verdict']} (exact posterior: {result['calibration_of_exact']['chi2_per_dof']:.2f})",
        f"effective points        at least {result['n_effective_min']:.0f}, median {result['n_effective_median']:.0f}",
    ]
    if "kl_error" in result:
        lines.append(
            f"importance sampling     FoM good to {result['fom_exact_relative_error']:.1%}, KL to "
            f"{result['kl_error']:.4f} nats per tile"
        )
    return "\n".join(lines)


def table(results: list[dict[str, Any]]) -> str:
    """All runs of a suite side by side."""
    header = "recipe | seed | KL(exact, NPE), nats | median | FoM / exact, prior | fiducial | chi2/dof"
    rows = [f"| {header} |", "|" + "---|" * (header.count("|") + 1)]
    for result in results:
        chi2 = result["calibration"]
        cells = [result["name"], str(result["seed"]), f"{result['kl_mean']:.3f} ± {result['kl_mean_err']:.3f}"]
        cells += [f"{result[key]:.3f}" for key in ("kl_median", "fom_ratio_prior_median", "fom_ratio_fiducial")]
        rows.append(f"| {' | '.join(cells)} | {chi2['chi2_per_dof']:.2f} ± {chi2['chi2_per_dof_err']:.2f} |")
    return "\n".join(rows)


def draw(result: dict[str, Any], exact: ExactPosterior, learnt: Posterior, path: Path) -> None:
    """FoM against the exact one, tile by tile, and the coverage of both."""
    with figure(path, 9.6, 4.2) as drawn:
        left, right = drawn.subplots(1, 2)
        for part, colour, name in ((slice(N_PRIOR), BLUE, "prior"), (slice(N_PRIOR, None), ORANGE, "fiducial")):
            left.loglog(exact.fom[part], learnt.fom[part], ".", ms=4, alpha=0.5, color=colour, label=name)
        ends = [exact.fom.min(), exact.fom.max()]
        left.plot(ends, ends, color=GREY, lw=1)
        left.set(xlabel="exact FoM", ylabel="learnt FoM", title=f"median ratio {result['fom_ratio_prior_median']:.3f}")
        left.legend()
        for key, colour, name in (("calibration_of_exact", GREY, "exact"), ("calibration", BLUE, "learnt")):
            found = result[key]
            label = f"{name}, chi2/dof = {found['chi2_per_dof']:.2f}"
            right.plot(found["levels"], found["coverage"], color=colour, label=label)
        right.fill_between(
            found["levels"], found["coverage_lo_16"], found["coverage_hi_84"], color=BLUE, alpha=0.2, lw=0
        )
        right.set(xlabel="credibility", ylabel="share of tiles with the truth inside", title="Gaussian coverage")
        right.legend()


def main() -> None:
    """Train, compare, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vary", choices=["Omega_m,S8", "all"], default="Omega_m,S8")
    parser.add_argument("--recipe", choices=list(RECIPES), default="laptop")
    parser.add_argument("--nuisances", action="store_true")
    parser.add_argument("--stage-1", default="", metavar="OPTIONS")
    parser.add_argument("--n-sims", type=int, default=N_SIMS)
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--results-dir", type=Path, default=Path("build/exact"))
    options = parser.parse_args()
    if options.nuisances and options.vary == "all":
        parser.error("--nuisances are exact only with --vary Omega_m,S8")
    nuisance = NUISANCE if options.nuisances else NONE
    suite = f"{options.vary.replace(',', '_')}_{options.n_sims}" + "_nuisances" * options.nuisances
    results = options.results_dir / suite
    tag, used = train(results, options.vary, options.n_sims, options.recipe, options.stage_1, options.seed, nuisance)

    priors = priors_of(NUISANCE, read_priors(str(priors_file(results))), N_BINS) if options.nuisances else {}
    cosmo, kappa = unseen_tiles(options.vary, priors)
    if options.nuisances:
        points = draws_with_nuisances(N_DRAWS_LOG2 + 1, SEED, priors)
    else:
        points = grid_over_prior() if options.vary == "Omega_m,S8" else draws_from_prior(N_DRAWS_LOG2, SEED)
    log_like = log_likelihood(points, powers_of(kappa, LMAX), NOISE_LEVEL, LMAX, NSIDE)
    exact = exact_posterior(points, log_like)
    learnt = learnt_posterior(results / COMPRESSOR_RUNS / tag, results / NPE_RUNS / tag, kappa)
    result = compare(exact, learnt, cosmo[:, :2])
    if not points.cell:
        result["fom_exact_relative_error"], result["kl_error"] = importance_error(points, log_like)
    result |= {
        "name": f"{options.recipe} {options.stage_1}".strip(),
        "vary": options.vary,
        "n_sims": options.n_sims,
        "recipe": used,
        "seed": options.seed,
    }
    result |= {"device": describe_device(CPU), "versions": versions()}
    name = f"exact_posterior_{tag}"
    write_json(results / f"{name}.json", result)
    draw(result, exact, learnt, results / f"{name}.png")
    print(f"\n{summary(result, options.recipe)}\nall                     {results / name}.json, .png\n")
    print(table([read_json(path) for path in sorted(results.glob("exact_posterior_*.json"))]))


if __name__ == "__main__":
    main()
