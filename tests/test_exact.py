"""Flat Gaussian tiles and their exact posterior: spectra, coverage, Fisher limit, grid against importance sampling."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import gamma, kstest, norm

from common.errors import UserError
from data.mock.config import MockConfig
from data.mock.cosmology import FIDUCIAL_COSMO, held_fixed, prior_density, prior_quantile
from data.mock.exact import (
    ExactPosterior,
    WeightedPoints,
    draws_from_prior,
    draws_with_nuisances,
    exact_posterior,
    grid_over_prior,
    log_likelihood,
)
from data.mock.flat import flat_tiles, modes_of, powers_of
from data.mock.nz import N_BINS
from data.mock.suite import build_suite
from data.mock.theory import BIN_PAIRS, cl_matrix, theory_cl_at
from data.nuisance import Prior, draw, nuisance_of, priors_of, read_priors
from data.read_shards import read_tiles
from data.schema import noise_cl
from data.shard_metadata import read_orientations

LMAX, NSIDE, NOISE_LEVEL = 60, 24, "des_y3"  # few modes: broad posteriors that feel the prior and are not Gaussian


def tiles_of(cosmo: np.ndarray, lmax: int, nside: int, seed: int) -> np.ndarray:
    """One tile (4, N, N) for each cosmology (n, 7)."""
    draws = [[np.random.default_rng([seed, i, kind]) for kind in (0, 1)] for i in range(len(cosmo))]
    return np.concatenate(
        [flat_tiles(c, NOISE_LEVEL, lmax, nside, 1, *rngs) for c, rngs in zip(cosmo, draws, strict=True)]
    )


def prior_cosmologies(n: int, seed: int) -> np.ndarray:
    return held_fixed(prior_quantile(np.random.default_rng(seed).random((n, 7))), "Omega_m,S8")


def expected_powers(lmax: int, nside: int) -> np.ndarray:
    """C_ell + N_ell of the fiducial, (10, n_ell)."""
    noise = np.array([noise_cl(NOISE_LEVEL, N_BINS)[i] if i == j else 0 for i, j in BIN_PAIRS])
    return theory_cl_at(FIDUCIAL_COSMO, modes_of(lmax, nside).ell)[0] + noise[:, None]


@pytest.mark.parametrize("nside", [64, 128])
def test_flat_tiles_have_the_spectra_of_theory_and_noise(nside: int) -> None:
    lmax, n = 200, 60
    kappa = flat_tiles(FIDUCIAL_COSMO, NOISE_LEVEL, lmax, nside, n, *map(np.random.default_rng, (0, 1)))
    count, expected = modes_of(lmax, nside).count, expected_powers(lmax, nside)
    powers = powers_of(kappa, lmax).mean(axis=0)  # (10, n_ell)
    auto = {i: p for p, (i, j) in enumerate(BIN_PAIRS) if i == j}
    for p, (i, j) in enumerate(BIN_PAIRS):
        # Of a mean over m complex modes: (C_ii C_jj + C_ij^2) / (2 m), two real numbers each.
        variance = (expected[auto[i]] * expected[auto[j]] + expected[p] ** 2) / (2 * count * n)
        assert np.square(powers[p] - expected[p]).sum() / variance.sum() == pytest.approx(1, abs=0.4)
        for band in np.array_split(np.arange(len(count)), 5):
            pull = ((powers - expected)[p, band] * count[band]).sum() / np.sqrt((variance * count**2)[band].sum())
            assert abs(pull) < 3.5, (i, j, band)
    # Every variance of a tile is in its modes: nothing beyond lmax, nothing at ell = 0.
    every_mode = 2 * (powers_of(kappa, lmax) * count).sum(axis=-1)[:, list(auto.values())] / (np.pi / 3)
    total = kappa.astype(np.float64).var(axis=(2, 3))  # (n, 4)
    # `powers` counts half of the modes; the other half are their conjugates.
    np.testing.assert_allclose(every_mode, total, rtol=1e-4)


def test_the_exact_posterior_covers_as_it_says() -> None:
    cosmo = prior_cosmologies(500, 1)
    powers = powers_of(tiles_of(cosmo, LMAX, NSIDE, 2), LMAX)
    grid = grid_over_prior((120, 160))
    on_grid = log_likelihood(grid, powers, NOISE_LEVEL, LMAX, NSIDE)  # (n_cells, 500)
    with np.errstate(divide="ignore"):
        log_density = on_grid + np.log(grid.weight / grid.cell)[:, None]
    at_truth = np.array(
        [
            log_likelihood(WeightedPoints(c[None], np.ones(1), 0.0), p[None], NOISE_LEVEL, LMAX, NSIDE)[0, 0]
            for c, p in zip(cosmo, powers, strict=True)
        ]
    ) + np.log(prior_density(cosmo[:, :2]))
    p = np.exp(log_density - log_density.max(axis=0))
    above = np.where(log_density > at_truth, p, 0).sum(axis=0) / p.sum(axis=0)  # credibility of the truth's contour
    assert kstest(above, "uniform").pvalue > 0.01
    # The same question to the moments that everything else uses.
    exact = exact_posterior(grid, on_grid)
    z = (exact.mu - cosmo[:, :2]) / np.sqrt(np.diagonal(exact.cov, axis1=1, axis2=2))
    assert np.abs(z.mean(axis=0)).max() < 3 / np.sqrt(500)
    assert np.abs(z.std(axis=0) - 1).max() < 3 / np.sqrt(2 * 500)


def test_with_a_hundred_times_the_area_it_is_the_inverse_fisher_matrix() -> None:
    """F_ab = sum over complex modes of tr(D^-1 dD/da D^-1 dD/db), with derivatives of the theory table."""
    lmax, nside, area = 200, 64, 100
    modes = modes_of(lmax, nside)
    inverse = np.linalg.inv(cl_matrix(expected_powers(lmax, nside)))  # (n_ell, 4, 4)
    slopes = []
    for k in range(2):
        step = np.zeros(7)
        step[k] = 1e-3
        up, down = theory_cl_at(np.stack([FIDUCIAL_COSMO + step, FIDUCIAL_COSMO - step]), modes.ell)
        slopes.append(inverse @ cl_matrix((up - down) / 2e-3))
    fisher = [[area * modes.count @ np.trace(a @ b, axis1=1, axis2=2) for a in slopes] for b in slopes]
    expected = np.linalg.inv(fisher)

    # Independent tiles of one cosmology are one larger tile: their likelihoods multiply.
    powers = powers_of(tiles_of(np.tile(FIDUCIAL_COSMO, (area, 1)), lmax, nside, 3), lmax).mean(axis=0, keepdims=True)
    axes = [FIDUCIAL_COSMO[k] + np.linspace(-8, 8, 81) * np.sqrt(expected[k, k]) for k in range(2)]
    cosmo = np.tile(FIDUCIAL_COSMO, (81 * 81, 1))
    cosmo[:, 0], cosmo[:, 1] = (a.ravel() for a in np.meshgrid(*axes, indexing="ij"))
    cell = float(np.prod([a[1] - a[0] for a in axes]))
    points = WeightedPoints(cosmo, np.full(len(cosmo), cell), cell)
    exact = exact_posterior(points, area * log_likelihood(points, powers, NOISE_LEVEL, lmax, nside))
    sigma = np.sqrt(np.diag(expected))
    assert np.abs((exact.cov[0] - expected) / np.outer(sigma, sigma)).max() < 0.03
    assert exact.fom[0] * np.sqrt(np.linalg.det(expected)) == pytest.approx(1, abs=0.03)
    assert np.abs((exact.mu[0] - FIDUCIAL_COSMO[:2]) / sigma).max() < 3
    assert exact.kl_gaussian[0] < 0.01


def test_with_nuisances_the_exact_posterior_covers_and_is_wider() -> None:
    priors = priors_of("m+ia", read_priors("") | {"eta_IA": Prior("flat", 0, 0)}, N_BINS)
    cosmo = prior_cosmologies(300, 7)
    rng = np.random.default_rng(8)
    drawn = [nuisance_of(draw(priors, 9, i, fiducial=False), 0, N_BINS) for i in range(len(cosmo))]
    kappa = [
        flat_tiles(one, NOISE_LEVEL, LMAX, NSIDE, 1, rng, rng, [nuisance])[0]
        for one, nuisance in zip(cosmo, drawn, strict=True)
    ]
    powers = powers_of(np.stack(kappa), LMAX)
    points = draws_with_nuisances(16, 10, priors)
    exact = exact_posterior(points, log_likelihood(points, powers, NOISE_LEVEL, LMAX, NSIDE))
    z = (exact.mu - cosmo[:, :2]) / np.sqrt(np.diagonal(exact.cov, axis1=1, axis2=2))
    assert exact.n_effective.min() > 50
    assert np.abs(z.mean(axis=0)).max() < 3 / np.sqrt(len(z))
    assert np.abs(z.std(axis=0) - 1).max() < 3 / np.sqrt(2 * len(z))
    # Who takes the tiles for bare ones is too sure.
    bare = exact_posterior(grid := grid_over_prior((60, 80)), log_likelihood(grid, powers, NOISE_LEVEL, LMAX, NSIDE))
    z = (bare.mu - cosmo[:, :2]) / np.sqrt(np.diagonal(bare.cov, axis1=1, axis2=2))
    assert z.std(axis=0).max() > 1 + 5 / np.sqrt(2 * len(z))
    assert np.median(exact.fom / bare.fom) < 0.9


def test_grid_and_importance_sampling_give_one_posterior() -> None:
    powers = powers_of(tiles_of(prior_cosmologies(20, 5), LMAX, NSIDE, 6), LMAX)

    def posterior(points: WeightedPoints) -> ExactPosterior:
        return exact_posterior(points, log_likelihood(points, powers, NOISE_LEVEL, LMAX, NSIDE))

    draws = draws_from_prior(16, 0)
    grid = posterior(grid_over_prior((120, 160)))
    drawn = posterior(WeightedPoints(held_fixed(draws.cosmo, "Omega_m,S8"), draws.weight, 0.0))
    assert drawn.n_effective.min() > 300
    np.testing.assert_allclose(drawn.fom, grid.fom, rtol=0.05)
    sigma = np.sqrt(np.diagonal(grid.cov, axis1=1, axis2=2))
    assert np.abs((drawn.mu - grid.mu) / sigma).max() < 0.06


def test_distance_from_a_gaussian_to_leading_order_agrees_with_the_integral() -> None:
    # A mildly skew density on a grid, gamma in one parameter and Gaussian in the other.
    x, y = (a.ravel() for a in np.meshgrid(np.linspace(20, 120, 400), np.linspace(-6, 6, 200), indexing="ij"))
    cosmo = np.pad(np.stack([x, y], axis=1), ((0, 0), (0, 5)))
    cell = (120 - 20) / 399 * 12 / 199
    log_density = (gamma(60).logpdf(x) + norm.logpdf(y))[:, None]
    by_cells, by_cumulants = (
        exact_posterior(WeightedPoints(cosmo, np.full(len(x), cell), c), log_density).kl_gaussian[0]
        for c in (cell, 0.0)
    )
    assert by_cells > 0.004
    assert by_cumulants == pytest.approx(by_cells, rel=0.05)


def test_a_flat_suite_goes_to_shards_and_has_no_common_sky(tmp_path) -> None:  # type: ignore[no-untyped-def]
    config = MockConfig(
        results_dir=str(tmp_path),
        lmax=LMAX,
        nside=NSIDE,
        n_sims=3,
        geometry="flat",
        field="gaussian",
        vary="Omega_m,S8",
    )
    folder = build_suite(config)["folder"]
    tiles = read_tiles(tmp_path / "tiles" / f"lmax_{LMAX}_{NOISE_LEVEL}", LMAX, NOISE_LEVEL, NSIDE)
    assert read_orientations(tmp_path / "tiles" / f"lmax_{LMAX}_{NOISE_LEVEL}") == ()
    assert folder.endswith(f"lmax_{LMAX}_{NOISE_LEVEL}")
    powers = powers_of(tiles.kappa, LMAX)
    assert (np.abs(np.corrcoef(powers.reshape(len(powers), -1))[np.triu_indices(len(powers), 1)]) < 0.999).all()
    assert len(np.unique(tiles.params[:, 3:], axis=0)) == 1  # w, h, n_s, Omega_b, m_nu stay at the fiducial
    with pytest.raises(UserError, match="--nside"):  # stage 1 must be told, or it stops
        read_tiles(tmp_path / "tiles" / f"lmax_{LMAX}_{NOISE_LEVEL}", LMAX, NOISE_LEVEL)


@pytest.mark.parametrize(
    ("options", "said"), [({"geometry": "flat"}, "--field gaussian"), ({"nside": 48}, "power of two")]
)
def test_senseless_flat_and_curved_options_are_refused(options: dict, said: str) -> None:
    with pytest.raises(UserError, match=said):
        MockConfig(**options)
