"""Members of stage 2: each learns as if alone; their mixture and divergence against direct integration."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import multivariate_normal
from test_npe import CPU, TWO, MeanCompressor, Splits, norm_stats_of

from common.device import seeded_generator
from common.resume import LastCheckpoint
from npe.compressed import CompressedTileDataModule, compress_all
from npe.config import NPEConfig
from npe.ensemble import bootstrap_weights, compare, gaussian_kl, mixture, worst_divergence
from npe.model import Posterior, load_npe, posterior_of_moments, predict_posterior
from npe.sweep import combine_seeds
from npe.train import train as train_npe

PARAMS = ("Omega_m", "S8", "w")


def posterior(mu: list[float], cov: list[list[float]]) -> Posterior:
    return posterior_of_moments(PARAMS[: len(mu)], np.array([mu]), np.array([cov]))


ONE = posterior([0.30, 0.80], [[0.0009, -0.0004], [-0.0004, 0.0008]])
OTHER = posterior([0.33, 0.78], [[0.0012, -0.0007], [-0.0007, 0.0007]])


def train(folder: Path, n_members: int) -> list[dict[str, torch.Tensor]]:
    folder.mkdir()
    splits, augment = Splits(TWO.draw(600, 1), TWO.draw(100, 2), TWO.draw(20, 3)), seeded_generator(0, "augment")
    compressed = CompressedTileDataModule(splits, MeanCompressor(), augment)  # type: ignore[arg-type]
    # So little patience that members stop at different epochs.
    config = NPEConfig(ckpt="none", max_epochs=120, patience=3, learning_rate=1e-2, n_members=n_members)
    train_npe(compressed, config, LastCheckpoint(folder, config, {}, "npe_best.ckpt", CPU))
    return [npe.state_dict() for npe in load_npe(folder / "npe_best.ckpt", 2, CPU)]


def test_a_member_learns_the_same_alone_and_among_others(tmp_path: Path) -> None:
    alone, several = train(tmp_path / "alone", 1), train(tmp_path / "several", 4)
    assert len(several) == 4
    for name, tensor in alone[0].items():
        assert torch.equal(tensor, several[0][name]), name
        for other in several[1:]:
            assert not torch.equal(tensor, other[name]), name


def test_the_learning_error_is_the_scatter_of_posteriors_learnt_from_other_simulations(tmp_path: Path) -> None:
    """Twenty training sets: the bootstrap within one quotes, to the sampling errors of both, how far all differ.

    Members that differ in their initial weights alone would quote less than half of it.
    """
    medians, quoted, fiducial = [], [], TWO.draw(12, 99)
    for seed in range(20):
        splits, augment = Splits(TWO.draw(400, 3 * seed), TWO.draw(100, 3 * seed + 1), fiducial), torch.Generator()
        compressed = CompressedTileDataModule(splits, MeanCompressor(), augment)  # type: ignore[arg-type]
        config = NPEConfig(ckpt="none", max_epochs=60, patience=10, learning_rate=5e-3, seed=seed)
        folder = tmp_path / str(seed)
        folder.mkdir()
        members = train_npe(compressed, config, LastCheckpoint(folder, config, {}, "npe_best.ckpt", CPU))
        summary, _ = compress_all(compressed.fiducial_ds, 256)
        ensemble = compare([predict_posterior(m.best, summary, PARAMS[:2], norm_stats_of(2)) for m in members])
        medians.append(ensemble.fom_fiducial_medians[0])
        quoted.append(ensemble.fom_learning_std)
    assert 0.7 < np.sqrt(np.mean(np.square(quoted))) / np.std(medians, ddof=1) < 1.4


def test_bootstrap_weights_belong_to_simulations_and_to_members() -> None:
    config, sims = NPEConfig(ckpt="none", n_members=3), np.array([4, 4, 7, 9])
    train_weight, test_weight = bootstrap_weights(config, sims, np.array([9, 7]))
    assert (train_weight[:, 0] == 1).all()
    assert torch.equal(train_weight[0], train_weight[1])  # two tiles of one simulation
    torch.testing.assert_close(train_weight.mean(dim=0), torch.ones(3))
    ratio = train_weight[[3, 2]] / test_weight  # the same simulations in another split, but for the mean of each
    torch.testing.assert_close(ratio[0], ratio[1])
    more, _ = bootstrap_weights(replace(config, n_members=5), sims, np.array([9, 7]))
    assert torch.equal(more[:, :3], train_weight)


THIRD = ([0.0012, 0.0003, 0.0400], -0.8), ([-0.0008, 0.0010, 0.0300], -0.7)


def with_third(p: Posterior, row: list[float], mu: float) -> Posterior:
    """The posterior with a third parameter that is correlated with the two."""
    cov = np.pad(p.cov[0], (0, 1))
    cov[2], cov[:, 2] = row, row
    return posterior([*p.mu[0], mu], cov.tolist())


@pytest.mark.parametrize("d", [2, 3])
def test_mixture_and_divergence_agree_with_draws(d: int) -> None:
    rng = np.random.default_rng(0)
    one, other = (ONE, OTHER) if d == 2 else (with_third(p, *more) for p, more in zip((ONE, OTHER), THIRD, strict=True))
    p, q = (multivariate_normal(x.mu[0], x.cov[0], seed=rng) for x in (one, other))
    draws = p.rvs(400_000)
    assert gaussian_kl(one, other)[0] == pytest.approx(np.mean(p.logpdf(draws) - q.logpdf(draws)), rel=0.01)
    assert gaussian_kl(one, one)[0] == pytest.approx(0, abs=1e-12)
    assert worst_divergence([one, other]) == max(gaussian_kl(one, other)[0], gaussian_kl(other, one)[0])

    both = np.concatenate([draws, q.rvs(400_000)])
    mixed = mixture([one, other])
    np.testing.assert_allclose(mixed.mu[0], both.mean(axis=0), atol=2e-3 * one.sigma[0].max())
    scale = np.outer(mixed.sigma[0], mixed.sigma[0])
    np.testing.assert_allclose(mixed.cov[0] / scale, np.cov(both.T) / scale, atol=0.01)
    # The third parameter is marginalised over: the FoM is that of the two alone.
    assert one.fom[0] == pytest.approx(ONE.fom[0])
    assert mixed.fom[0] == pytest.approx(1 / np.sqrt(np.linalg.det(mixed.cov[0][:2, :2])))
    assert mixed.fom[0] < min(one.fom[0], other.fom[0])  # disagreement costs information


def test_runs_of_other_seeds_are_combined_by_their_mean_scatter_and_mixture() -> None:
    def run(scale: float) -> Any:
        p = posterior_of_moments(PARAMS, np.tile(ONE.mu, (3, 1)), np.tile(ONE.cov, (3, 1, 1)) / scale)
        return SimpleNamespace(
            posterior=p,
            fom_fiducial_median=float(np.median(p.fom)),
            fom_fiducial_std=10 * scale,
            calibration=SimpleNamespace(chi2_per_dof_of_fom=scale),
            recalibrated=None,
        )

    runs = {seed: run(scale) for seed, scale in enumerate((0.9, 1.0, 1.1))}
    row = combine_seeds(200, "none", runs, runs)
    assert row.fom == pytest.approx(ONE.fom[0])
    assert row.std_over_seeds == pytest.approx(0.1 * ONE.fom[0])
    assert (row.std_over_tiles, row.chi2_per_dof_of_fom) == (pytest.approx(10), pytest.approx(1))
    # Equal means: the mixture's covariance is the mean of theirs.
    assert row.mixture_fom == pytest.approx(ONE.fom[0] / np.mean([1 / 0.9, 1, 1 / 1.1]))
    assert (row.to_bare, row.to_bare_err) == (1, 0)
    alone = combine_seeds(200, "ia", {0: run(1.0)}, {})
    assert alone.std_over_seeds is alone.to_bare is alone.to_bare_err is None

    # Each run stands beside the bare run of its own seed, whatever scatter the two share.
    half = combine_seeds(200, "ia", {0: run(0.45), 1: run(0.5), 2: run(0.61), 3: run(5.0)}, runs)
    ratios = np.array([0.5, 0.5, 0.61 / 1.1])
    assert half.to_bare == pytest.approx(ratios.mean())
    assert half.to_bare_err == pytest.approx(ratios.std(ddof=1) / np.sqrt(3))
