"""Stage 2 against an exactly known posterior, and the frozen compressor."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import multivariate_normal

from common.device import seeded_generator
from common.resume import LastCheckpoint
from compress.model import FieldLevelCompressor
from data.augment import Symmetries, fixed_views, gather_augmented
from data.module import TileDataset
from data.norm_stats import NormStats
from npe.compressed import CompressedTileDataModule, CompressedTileDataset, compress_all
from npe.config import NPEConfig
from npe.fom import augmentation_shift, bootstrap_median
from npe.model import GaussianNPE, Posterior, load_npe, predict_fom, predict_posterior
from npe.train import fit

CPU = torch.device("cpu")
FIELDS = list(Symmetries.__dataclass_fields__)
NORM_STATS = NormStats((0.0,) * 4, (1.0,) * 4, (0.3, 0.8), (0.07, 0.11))


class MeanCompressor(torch.nn.Module):
    """Stands for the network where the posterior must be known: summary = mean of the first two bins."""

    def forward(self, kappa: torch.Tensor) -> torch.Tensor:
        return kappa[:, :2].mean(dim=(2, 3))  # (B, 4, N, N) -> (B, 2)


@dataclass
class LinearGaussian:
    """theta ~ N(0, I), summary | theta ~ N(A theta, S): the posterior is Gaussian and known."""

    mixing: np.ndarray
    noise: np.ndarray

    @property
    def cov(self) -> np.ndarray:
        """(I + A^T S^-1 A)^-1"""
        return np.linalg.inv(np.eye(2) + self.mixing.T @ np.linalg.inv(self.noise) @ self.mixing)

    def mu(self, summary: np.ndarray) -> np.ndarray:
        """Cov A^T S^-1 s for summaries (n, 2)."""
        return summary @ (self.cov @ self.mixing.T @ np.linalg.inv(self.noise)).T

    def draw(self, n: int, seed: int) -> TileDataset:
        """n tiles of 2 x 2 pixels whose mean over pixels is the summary."""
        rng = np.random.default_rng(seed)
        theta = rng.standard_normal((n, 2))
        summary = theta @ self.mixing.T + rng.multivariate_normal([0, 0], self.noise, n)
        kappa = rng.standard_normal((n, 4, 2, 2))
        kappa += np.pad(summary, ((0, 0), (0, 2)))[:, :, None, None] - kappa.mean(axis=(2, 3), keepdims=True)
        store = torch.from_numpy(kappa.astype(np.float32)).to(memory_format=torch.channels_last)
        return TileDataset(store, torch.from_numpy(theta.astype(np.float32)), np.arange(n), CPU)


@dataclass
class Splits:
    """As much of a TileDataModule as stage 2 looks at."""

    npe_train_ds: TileDataset
    test_ds: TileDataset
    fiducial_ds: TileDataset


def test_stage_2_reaches_the_exact_posterior_of_a_linear_gaussian_problem(tmp_path: Path) -> None:
    """The whole loop of stage 2, stated tolerance: FoM 3 %, covariance 5 % of its elements' scale, mean 0.06 sigma.

    With 20,000 training tiles the sampling error of a covariance is 1 %.
    """
    toy = LinearGaussian(np.array([[0.9, 0.2], [-0.3, 0.7]]), np.array([[0.10, 0.12], [0.12, 0.20]]))
    splits = Splits(toy.draw(20_000, 1), toy.draw(4_000, 2), toy.draw(500, 3))
    compressed = CompressedTileDataModule(splits, MeanCompressor(), seeded_generator(0, "augment"))  # type: ignore[arg-type]
    config = NPEConfig(ckpt="none", max_epochs=40, learning_rate=5e-4, n_members=1)
    fit(compressed, config, "none", LastCheckpoint(tmp_path, {}, "npe_best.ckpt", CPU), CPU)

    npe = load_npe(tmp_path / "npe_best.ckpt", CPU)[0]
    summary, _ = compress_all(compressed.fiducial_ds, 256)
    posterior = predict_posterior(npe, summary, NORM_STATS)
    scale = np.array(NORM_STATS.theta_std)
    exact_cov = toy.cov * np.outer(scale, scale)
    exact_mu = NORM_STATS.physical_theta(toy.mu(summary.numpy()))
    sigma = np.sqrt(np.diag(exact_cov))

    ratio = posterior.fom * np.sqrt(np.linalg.det(exact_cov))
    assert abs(np.median(ratio) - 1) < 0.03
    assert (
        np.abs(np.median(posterior.cov, axis=0) / np.outer(sigma, sigma) - exact_cov / np.outer(sigma, sigma)).max()
        < 0.05
    )
    assert np.sqrt(np.mean(((posterior.mu - exact_mu) / sigma) ** 2)) < 0.06
    # A diagonal posterior could not: the exact correlation is far from zero.
    assert abs(exact_cov[0, 1] / sigma.prod()) > 0.3


def test_nll_and_fom_are_those_of_the_gaussian_with_the_stated_covariance() -> None:
    # Two routes: the network's Cholesky arithmetic, and scipy's density and numpy's determinant.
    torch.manual_seed(0)
    npe = GaussianNPE().double()
    summary, theta = torch.randn(50, 2).double(), torch.randn(50, 2).double()
    unit = NormStats((0.0,) * 4, (1.0,) * 4, (0.0, 0.0), (1.0, 1.0))
    normalised, physical = predict_posterior(npe, summary, unit), predict_posterior(npe, summary, NORM_STATS)
    nll = npe.nll(summary, theta)
    for i in range(50):
        expected = -multivariate_normal(normalised.mu[i], normalised.cov[i]).logpdf(theta[i].numpy())
        assert nll[i].item() == pytest.approx(expected, rel=1e-9)
    np.testing.assert_allclose(physical.fom, 1 / np.sqrt(np.linalg.det(physical.cov)), rtol=1e-9)
    np.testing.assert_allclose(
        predict_fom(npe, summary, unit) / np.prod(NORM_STATS.theta_std), physical.fom, rtol=1e-12
    )


def test_a_gradient_reaches_every_parameter_of_the_npe() -> None:
    torch.manual_seed(0)
    npe = GaussianNPE()
    npe.nll(torch.randn(9, 2), torch.randn(9, 2)).mean().backward()
    for name, parameter in npe.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


# ---------------------------------------------------------------- compressed tiles


@pytest.fixture
def tile_ds() -> TileDataset:
    rng = np.random.default_rng(0)
    store = torch.from_numpy(rng.standard_normal((24, 4, 16, 16)).astype(np.float32)).to(
        memory_format=torch.channels_last
    )
    return TileDataset(store, torch.from_numpy(rng.standard_normal((24, 2)).astype(np.float32)), np.arange(4, 20), CPU)


@pytest.fixture
def compressor() -> FieldLevelCompressor:
    torch.manual_seed(1)
    return FieldLevelCompressor("tiny")


def test_one_tile_and_a_batch_give_the_same_summary(tile_ds: TileDataset, compressor: FieldLevelCompressor) -> None:
    dataset = CompressedTileDataset(tile_ds, compressor)
    batch, theta = dataset.__getitems__([3, 0, 11])
    for row, position in enumerate([3, 0, 11]):
        summary, one_theta = dataset[position]
        torch.testing.assert_close(summary, batch[row], rtol=1e-5, atol=1e-6)
        assert torch.equal(one_theta, theta[row])
        with torch.no_grad():
            torch.testing.assert_close(compressor(tile_ds.source[[position + 4]])[0], summary, rtol=1e-5, atol=1e-6)


def test_augmented_summaries_are_new_every_time_and_the_rest_are_not(
    tile_ds: TileDataset, compressor: FieldLevelCompressor
) -> None:
    plain = CompressedTileDataset(tile_ds, compressor)
    augmented = CompressedTileDataset(tile_ds.augmented(seeded_generator(0, "x")), compressor)
    everything = list(range(16))
    assert torch.equal(plain.__getitems__(everything)[0], plain.__getitems__(everything)[0])
    first, second = augmented.__getitems__(everything)[0], augmented.__getitems__(everything)[0]
    assert (first != second).any(dim=1).all()


def test_stage_2_trains_on_new_summaries_every_epoch_and_judges_by_fixed_ones(
    tile_ds: TileDataset, compressor: FieldLevelCompressor
) -> None:
    splits = Splits(tile_ds, tile_ds, tile_ds)
    compressed = CompressedTileDataModule(splits, compressor, seeded_generator(0, "augment"))  # type: ignore[arg-type]
    for dataset, fixed in (compressed.train_ds, False), (compressed.val_ds, True), (compressed.fiducial_ds, True):
        first, second = compress_all(dataset, 8)[0], compress_all(dataset, 8)[0]
        assert torch.equal(first, second) is fixed


def test_the_frozen_network_is_bit_identical_after_stage_2(
    tile_ds: TileDataset, compressor: FieldLevelCompressor, tmp_path: Path
) -> None:
    before = {name: tensor.clone() for name, tensor in compressor.state_dict().items()}
    assert any(name.endswith("running_mean") for name in before)
    compressor.train()  # as a careless caller would hand it over
    splits = Splits(tile_ds, tile_ds, tile_ds)
    compressed = CompressedTileDataModule(splits, compressor, seeded_generator(0, "augment"))  # type: ignore[arg-type]
    last = LastCheckpoint(tmp_path, {}, "npe_best.ckpt", CPU)
    fit(compressed, NPEConfig(ckpt="none", max_epochs=3), "none", last, CPU)
    for name, tensor in compressor.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    assert all(p.grad is None and not p.requires_grad for p in compressor.parameters())


def test_augmentation_shift_is_zero_for_a_blind_compressor_and_measured_for_another(tile_ds: TileDataset) -> None:
    class TopLeft(torch.nn.Module):
        """Looks at the pixel in the corner."""

        def forward(self, kappa: torch.Tensor) -> torch.Tensor:
            return kappa[:, :2, 0, 0]

    # A roll brings a random pixel to that corner, so the mean square of its shift is known.
    pixels = tile_ds.source[4:20, :2].flatten(2)  # (16, 2, 256)
    corner_shift = (pixels - pixels[:, :, :1]).square().mean(dim=(0, 2)).sqrt()  # (2,)

    sigma = np.array([0.5, 2.0])  # of the posteriors, in normalised theta
    cov = np.tile(np.diag(np.square(sigma * NORM_STATS.theta_std)), (16, 1, 1))
    posterior = Posterior(np.zeros((16, 2)), cov, np.zeros(16))
    for network, expected in (MeanCompressor(), np.zeros(2)), (TopLeft(), corner_shift.numpy() / sigma):
        dataset = CompressedTileDataset(tile_ds, network)  # type: ignore[arg-type]
        shift = augmentation_shift(dataset, posterior, np.array(NORM_STATS.theta_std), 8, seeded_generator(0, "shift"))
        np.testing.assert_allclose(shift["rolls"]["rms"], expected, rtol=0.15, atol=1e-5)


def test_views_are_the_symmetries_and_their_mean_averages_the_shift_away(tile_ds: TileDataset) -> None:
    class Corner(torch.nn.Module):
        """Looks at the pixel in the corner: on white tiles every view is an independent draw."""

        def forward(self, kappa: torch.Tensor) -> torch.Tensor:
            return kappa[:, :2, 0, 0]

    class Blind(torch.nn.Module):
        """Its summary is the same for every turn and roll."""

        def forward(self, kappa: torch.Tensor) -> torch.Tensor:
            return kappa[:, :2].square().mean(dim=(2, 3))

    everything = list(range(16))
    kappa, _ = tile_ds.__getitems__(everything)
    views = fixed_views(8, 16)
    seen = [
        gather_augmented(kappa, torch.tensor([0]), Symmetries(*(getattr(views, f)[[k]] for f in FIELDS)))
        for k in range(8)
    ]
    assert torch.equal(seen[0], kappa[:1])
    turns = {tuple(int(getattr(views, f)[k]) for f in FIELDS[:3]) for k in range(8)}
    assert len(turns) == 8
    for network in Corner(), Blind():
        compressed = CompressedTileDataset(tile_ds, network, 8)  # type: ignore[arg-type]
        summary, _ = compressed.__getitems__(everything)
        torch.testing.assert_close(summary[0], torch.cat([network(view) for view in seen]).mean(dim=0))
    torch.testing.assert_close(summary, Blind()(kappa))

    # A random turn and roll gives the corner views of the tile's pixels at random: the mean of n has 1 / n of their
    # variance, about the mean of all of them.
    pixels = tile_ds.source[4:20, :2].flatten(2)  # (16, 2, 256)
    unit = Posterior(np.zeros((16, 2)), np.tile(np.diag(np.square(NORM_STATS.theta_std)), (16, 1, 1)), np.zeros(16))
    for n_views in (1, 16):
        dataset = CompressedTileDataset(tile_ds, Corner(), n_views)  # type: ignore[arg-type]
        summary, _ = dataset.__getitems__(everything)
        expected = pixels.var(dim=2, correction=0) / n_views + (summary - pixels.mean(dim=2)).square()  # (16, 2)
        moved = augmentation_shift(dataset, unit, np.array(NORM_STATS.theta_std), 8, seeded_generator(0, "shift"))
        np.testing.assert_allclose(moved["all"]["rms"], expected.mean(dim=0).sqrt().numpy(), rtol=0.12)


def test_bootstrap_draws_simulations_not_tiles() -> None:
    # 40 simulations of 10 equal tiles: the median of 400 tiles is as uncertain as that of 40.
    rng = np.random.default_rng(0)
    per_sim = rng.standard_normal(40)
    grouped = bootstrap_median(np.repeat(per_sim, 10), np.repeat(np.arange(40), 10), rng).std()
    alone = bootstrap_median(per_sim, np.arange(40), rng).std()
    assert grouped == pytest.approx(alone, rel=0.15)
