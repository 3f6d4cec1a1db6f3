"""Normalisation: float64 statistics of one split, and a round trip."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import make_tiles

from common.errors import UserError
from data.moments import moments_of
from data.norm_stats import NormStats, compute_norm_stats, read_norm_stats, write_norm_stats
from data.schema import PARAM_NAMES, columns_of
from data.tiles import Tiles

PARAMS = ("Omega_m", "S8", "w")


def stats_of(tiles: Tiles, rows: np.ndarray) -> NormStats:
    return compute_norm_stats(columns_of(tiles.params, PARAMS)[rows], moments_of(tiles.kappa).of(rows))


@pytest.mark.parametrize("n_bins", [1, 4, 6])
def test_statistics_are_those_of_the_chosen_tiles_in_float64(n_bins: int) -> None:
    tiles = make_tiles(30, 8, 16, n_bins=n_bins)
    # A mean 10^4 times the scatter: float32 sums would be off in the third digit of the variance.
    means = np.array([10, -10, 0, 1, 2, -1])[:n_bins, None, None]
    tiles = replace(tiles, kappa=(1e-3 * tiles.kappa + means).astype(np.float32))
    chosen = np.random.default_rng(2).permutation(360)[:250]
    stats = stats_of(tiles, chosen)
    pixels = tiles.kappa[chosen].astype(np.float64).transpose(1, 0, 2, 3).reshape(n_bins, -1)
    np.testing.assert_allclose(stats.tile_mean, pixels.mean(axis=1), rtol=1e-12, atol=1e-15)
    np.testing.assert_allclose(stats.tile_std, pixels.std(axis=1), rtol=1e-10)
    theta = tiles.params[chosen][:, [0, 2, 3]]
    np.testing.assert_allclose(stats.theta_mean, theta.mean(axis=0), rtol=1e-14)
    np.testing.assert_allclose(stats.theta_std, theta.std(axis=0), rtol=1e-14)


@pytest.mark.parametrize("n_bins", [1, 4, 6])
def test_moments_of_a_tile_are_those_of_its_pixels_and_do_not_change_when_it_is_turned(n_bins: int) -> None:
    kappa = make_tiles(2, 8, 16, n_bins=n_bins).kappa
    moments = moments_of(kappa)
    np.testing.assert_allclose(moments.mean, kappa.mean(axis=(2, 3), dtype=np.float64), rtol=1e-12)
    np.testing.assert_allclose(moments.variance, kappa.var(axis=(2, 3), dtype=np.float64), rtol=1e-12)
    turned = moments_of(np.rot90(kappa, axes=(2, 3)))
    np.testing.assert_allclose(turned.projection, moments.projection, atol=1e-14)
    assert np.abs(moments_of(np.roll(kappa, 1, axis=3)).projection - moments.projection).min() > 1e-6


@pytest.mark.parametrize("n_bins", [1, 4, 6])
def test_normalising_gives_zero_mean_and_unit_variance_and_theta_comes_back(n_bins: int) -> None:
    tiles = make_tiles(30, 8, 16, n_bins=n_bins)
    stats = stats_of(tiles, np.arange(360))
    expected = (tiles.kappa - np.array(stats.tile_mean)[:, None, None]) / np.array(stats.tile_std)[:, None, None]
    np.testing.assert_allclose(stats.normalise_tiles(tiles.kappa), expected, rtol=2e-6, atol=1e-6)
    theta = columns_of(tiles.params, PARAMS)
    np.testing.assert_allclose(stats.physical_theta(stats.normalise_theta(theta)), theta, rtol=1e-14)


def test_the_file_holds_the_four_promised_fields_exactly(tmp_path: Path) -> None:
    stats = stats_of(make_tiles(10, 8, 16), np.arange(50))
    write_norm_stats(tmp_path, stats)
    assert set(json.loads((tmp_path / "norm_stats.json").read_text())) == {
        "tile_mean",
        "tile_std",
        "theta_mean",
        "theta_std",
    }
    assert read_norm_stats(tmp_path) == stats


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        "{}",
        '{"tile_mean": [0,0,0,0], "tile_std": [1,1,1,0], "theta_mean": [0,0], "theta_std": [1,1]}',
        '{"tile_mean": [0,0,0,0], "tile_std": [1,1,1], "theta_mean": [0,0], "theta_std": [1,1]}',
        '{"tile_mean": [0,0,0,0], "tile_std": [1,1,1,1], "theta_mean": [0,0], "theta_std": [1,1,1]}',
        '{"tile_mean": [], "tile_std": [], "theta_mean": [0,0], "theta_std": [1,1]}',
    ],
)
def test_other_content_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "norm_stats.json").write_text(content)
    with pytest.raises(UserError, match=r"norm_stats.json"):
        read_norm_stats(tmp_path)


def test_a_constant_parameter_is_refused() -> None:
    tiles = make_tiles(3, 8, 16)
    with pytest.raises(UserError, match=r"constant over the training split"):
        stats_of(tiles, np.arange(12))  # one simulation
    params = tiles.params.copy()
    params[:, PARAM_NAMES.index("S8")] = 0.805555555  # whose standard deviation is that of rounding
    with pytest.raises(UserError, match=r"parameter 2 of --params is constant"):
        stats_of(replace(tiles, params=params), np.arange(36))
