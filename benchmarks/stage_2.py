"""How well does stage 2 learn from 2370 tiles, how much does its FoM scatter, and does a run quote that scatter?

python benchmarks/stage_2.py RUN       20 suites for the compressor of a run of exact_posterior.py
python benchmarks/stage_2.py RUN --stage-2= --stage-2="--hidden-layers 0 --learning-rate 0.05"    two recipes

For every suite the tiles that stage 2 would get (2370 to learn from, 474 that stop it) are drawn anew on the testbed of
exact_posterior.py and compressed by the frozen compressor of one finished run; the training loop of stage 2 learns from
them. So all that differs between suites is what stage 2 learnt from. Its posteriors are compared with the exact ones on
the unseen tiles of that benchmark. Tiles are compressed in N_VIEWS augmented views, of which every epoch takes one at
random. Noise is exchanged if the run has --noiseless-tiles.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np
import torch

from benchmarks.exact_posterior import CPU, LMAX, N_PRIOR, NOISE_LEVEL, NSIDE, SEED, unseen_tiles
from benchmarks.leakage import BATCH_SIZE
from common.artifacts import write_json
from common.device import describe_device, seeded_generator
from common.options import parse_args
from common.resume import LastCheckpoint
from common.versions import versions
from compress.model import CHECKPOINT_NAME, TrainedCompressor, load_compressor
from data.dataset import TileDataset, whole_dataset
from data.mock.cosmology import held_fixed, params_of, prior_quantile
from data.mock.exact import ExactPosterior, exact_posterior, grid_over_prior, log_likelihood
from data.mock.flat import flat_tiles, powers_of
from data.mock.nz import N_BINS
from data.mock.theory import COSMO_NAMES
from data.norm_stats import NormStats, read_norm_stats
from data.schema import FOM_PARAMS, NOISELESS, PARAM_NAMES
from data.tiles import Tiles, empty_kappa
from npe.calibration import squared_distances
from npe.compressed import CompressedTileDataset, compress_all
from npe.config import NPEConfig
from npe.ensemble import compare, gaussian_kl, mixture
from npe.model import CHECKPOINT_NAME as NPE_CHECKPOINT_NAME
from npe.model import Posterior, posterior_of_moments, predict_posterior
from npe.train import train

N_SIMS, TILES_TO_LEARN, N_TEST = 790, 3, 474  # simulations, tiles of each, and simulations with a test tile
N_VIEWS = 16
VARY = "Omega_m,S8"


class Views:
    """Summaries (V, n, d) of the views of tiles; every access takes one view of each tile at random."""

    def __init__(self, summary: torch.Tensor, theta: torch.Tensor, generator: torch.Generator | None) -> None:
        self.summary, self.theta, self.generator = summary, theta, generator

    def __len__(self) -> int:
        return len(self.theta)

    def prefetch(self, positions: torch.Tensor) -> None:
        """Everything is in memory."""

    def __getitems__(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        view = torch.zeros(len(positions), dtype=torch.long)
        if self.generator is not None:
            view = torch.randint(len(self.summary), (len(positions),), generator=self.generator)
        return self.summary[view, positions], self.theta[positions]


@dataclass(frozen=True)
class Suite:
    """What the loop of stage 2 needs, in place of CompressedTileDataModule."""

    augment: torch.Generator
    n_params: int
    train_ds: Views
    val_ds: Views
    train_sims: np.ndarray
    val_sims: np.ndarray


def tiles_of(seed: int, noise_level: str) -> Tiles:
    """TILES_TO_LEARN + 1 tiles of each simulation of a suite; the same skies for any noise level."""
    cosmo = held_fixed(prior_quantile(np.random.default_rng(seed).random((N_SIMS, len(COSMO_NAMES)))), VARY)
    n = TILES_TO_LEARN + 1
    kappa = empty_kappa(N_SIMS * n, N_BINS, NSIDE)
    for i, one in enumerate(cosmo):
        signal_rng, noise_rng = (np.random.default_rng([seed, i, kind]) for kind in (1, 2))
        kappa[i * n : (i + 1) * n] = flat_tiles(one, noise_level, LMAX, NSIDE, n, signal_rng, noise_rng)
    sim, tile = np.divmod(np.arange(N_SIMS * n), n)
    keys = np.stack([sim, np.zeros_like(sim), tile], axis=1)
    return Tiles(kappa, keys, np.repeat(params_of(cosmo), n, axis=0), LMAX, NOISE_LEVEL)


def make_suite(seed: int, compressor: TrainedCompressor, norm_stats: NormStats) -> Suite:
    """Draw a suite and compress it."""
    tiles = tiles_of(seed, NOISE_LEVEL)
    everything = whole_dataset(tiles, FOM_PARAMS, norm_stats, CPU)
    signal = None
    if compressor.config.noiseless_tiles:
        signal = whole_dataset(tiles_of(seed, NOISELESS), FOM_PARAMS, norm_stats, CPU).source
    sim, tile = tiles.keys[:, 0], tiles.keys[:, 2]
    learn, test = np.flatnonzero(tile < TILES_TO_LEARN), np.flatnonzero((tile == TILES_TO_LEARN) & (sim < N_TEST))
    augment = seeded_generator(seed, "views")
    learn_ds, test_ds = (TileDataset(everything.source, everything.theta, rows, CPU, signal) for rows in (learn, test))
    augmented = CompressedTileDataset(learn_ds.augmented(augment), compressor.model)
    summaries, theta = zip(*(compress_all(augmented, BATCH_SIZE) for _ in range(N_VIEWS)), strict=True)
    test_summary, test_theta = compress_all(CompressedTileDataset(test_ds, compressor.model), BATCH_SIZE)
    train_ds = Views(torch.stack(summaries), theta[0], augment)
    return Suite(augment, len(FOM_PARAMS), train_ds, Views(test_summary[None], test_theta, None), sim[learn], sim[test])


def figures_of(posterior: Posterior, exact: ExactPosterior, theta: np.ndarray) -> dict[str, float]:
    """KL and FoM against the exact posterior, chi2 per dof; tiles from the prior come first."""
    best = posterior_of_moments(FOM_PARAMS, exact.mu, exact.cov)
    prior = slice(0, N_PRIOR)
    kl = (exact.kl_gaussian + gaussian_kl(best, posterior))[prior]
    d2 = squared_distances(posterior, theta)[prior]
    return {
        "kl": float(kl.mean()),
        "fom_ratio_prior": float(np.median((posterior.fom / exact.fom)[prior])),
        "fom_ratio_fiducial": float(np.median(posterior.fom[N_PRIOR:]) / np.median(exact.fom[N_PRIOR:])),
        "chi2_per_dof": float(d2.mean() / len(FOM_PARAMS)),
    }


def fiducial_part(posterior: Posterior) -> Posterior:
    """The posteriors of the fiducial tiles alone."""
    some = slice(N_PRIOR, None)
    return Posterior(FOM_PARAMS, posterior.mu[some], posterior.cov[some], posterior.inverse_volume[some])


def learn(suite: Suite, config: NPEConfig, summary: torch.Tensor, norm_stats: NormStats) -> tuple[list[Posterior], int]:
    """Posteriors of every member for the unseen tiles' summaries, and the number of epochs."""
    with TemporaryDirectory() as folder:
        last = LastCheckpoint(Path(folder), config, {}, NPE_CHECKPOINT_NAME, CPU)
        members = train(suite, config, last)  # type: ignore[arg-type]
        epochs = last.position.epoch
    return [predict_posterior(m.best.eval(), summary, FOM_PARAMS, norm_stats) for m in members], epochs


def table(found: list[dict[str, Any]]) -> str:
    """Means over suites, and scatter against what is quoted."""
    lines = [f"{len(found)} suites, {np.mean([f['epochs'] for f in found]):.0f} epochs"]
    for name in ("first", "mixture"):
        mean = {key: (np.mean(v := [f[name][key] for f in found]), np.std(v, ddof=1)) for key in found[0][name]}
        lines.append(f"{name:8}" + ", ".join(f"{key} {m:.3f} +- {s:.3f}" for key, (m, s) in mean.items()))
        scatter = mean["fom_ratio_fiducial"][1] / mean["fom_ratio_fiducial"][0]
        lines.append(f"        scatter of the fiducial FoM {scatter:.2%}")
    quoted = np.sqrt(np.mean(np.square([f["quoted"] for f in found])))
    lines.append(f"quoted learning error, rms {quoted:.2%}")
    return "\n".join(lines)


def main() -> None:
    """Draw, learn, compare, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder of a finished stage-1 run of exact_posterior.py")
    parser.add_argument("--suites", type=int, default=20)
    parser.add_argument("--stage-2", action="append", help="options of run_npe.py, in quotes; may be repeated")
    parser.add_argument("--out", type=Path, default=Path("build/stage_2.json"))
    options = parser.parse_args()
    compressor = load_compressor(options.run / CHECKPOINT_NAME, CPU, "float32")
    norm_stats = read_norm_stats(options.run)
    cosmo, kappa = unseen_tiles(VARY, {})
    exact = exact_posterior(
        points := grid_over_prior(), log_likelihood(points, powers_of(kappa, LMAX), NOISE_LEVEL, LMAX, NSIDE)
    )
    unused = np.ones((len(kappa), len(PARAM_NAMES)))
    unseen = Tiles(kappa, np.zeros((len(kappa), 3), dtype=np.int64), unused, LMAX, NOISE_LEVEL)
    dataset = whole_dataset(unseen, FOM_PARAMS, norm_stats, CPU)
    summary, _ = compress_all(CompressedTileDataset(dataset, compressor.model), BATCH_SIZE)
    found: dict[str, list[dict[str, Any]]] = {stage_2: [] for stage_2 in options.stage_2 or [""]}
    for seed in range(1, options.suites + 1):
        suite = make_suite(SEED + seed, compressor, norm_stats)
        for stage_2, runs in found.items():
            words = ["--ckpt", str(options.run / CHECKPOINT_NAME), "--seed", str(seed), *stage_2.split()]
            posteriors, epochs = learn(suite, parse_args(NPEConfig, words), summary, norm_stats)
            ensemble = compare([fiducial_part(posterior) for posterior in posteriors])
            one = {"epochs": epochs, "first": figures_of(posteriors[0], exact, cosmo[:, :2])}
            one["mixture"] = figures_of(mixture(posteriors), exact, cosmo[:, :2])
            one["quoted"] = (ensemble.fom_learning_std or 0.0) / ensemble.fom_fiducial_medians[0]
            runs.append(one)
            print(f"{stage_2 or 'default'}: {table(runs)}\n" if len(runs) > 1 else "", flush=True)
        content = {"run": options.run.name, "stage_2": found, "versions": versions(), "device": describe_device(CPU)}
        write_json(options.out, content)


if __name__ == "__main__":
    main()
