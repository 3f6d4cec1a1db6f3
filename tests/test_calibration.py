"""Calibration figures on posteriors that are right, too narrow, too wide or shifted on purpose."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from scipy.stats import chi2, kstest, multivariate_normal

from npe.calibration import LEVELS, calibrate, recalibrate, squared_distances
from npe.model import Posterior, posterior_of_moments
from npe.result import Calibration

PARAMS = ("Omega_m", "S8", "w")
COV = np.array([[0.0009, -0.0004, 0.0010], [-0.0004, 0.0008, 0.0012], [0.0010, 0.0012, 0.0400]])


def posteriors(
    n_sims: int, widen: float = 1.0, shift: float = 0.0, shared: bool = False, d: int = 2
) -> tuple[Posterior, np.ndarray, np.ndarray]:
    """Exact posteriors of 6 tiles a simulation, their covariance then multiplied by `widen`, their mean shifted.

    With `shared` the six tiles of a simulation have one and the same error, as if they were one tile six times.
    """
    rng, exact = np.random.default_rng(5), COV[:d, :d]
    theta = np.repeat(rng.uniform([0.2, 0.6, -1.0][:d], [0.4, 0.9, -0.5][:d], (n_sims, d)), 6, axis=0)
    error = rng.multivariate_normal([0] * d, exact, n_sims if shared else 6 * n_sims)
    mu = theta + (np.repeat(error, 6, axis=0) if shared else error) + shift * np.sqrt(np.diag(exact))
    cov = np.tile(widen * exact, (len(theta), 1, 1))
    return posterior_of_moments(PARAMS[:d], mu, cov), theta, np.repeat(np.arange(n_sims), 6)


def calibration_of(posterior: Posterior, theta: np.ndarray, sim_id: np.ndarray) -> Calibration:
    fom = float(np.median(posterior.fom))
    return calibrate(posterior, theta, sim_id, np.random.default_rng(0), fom=fom, tiles="drawn here", optimistic=False)


@pytest.mark.parametrize("d", [2, 3])
def test_exact_posteriors_are_found_calibrated(d: int) -> None:
    posterior, theta, sim_id = posteriors(400, d=d)
    found = calibration_of(posterior, theta, sim_id)
    assert found.verdict == "calibrated"
    assert kstest(squared_distances(posterior, theta), chi2(d).cdf).pvalue > 0.01
    assert np.abs(np.array(found.coverage) - LEVELS).max() < 0.03
    assert len(found.z_mean) == len(found.z_std) == d
    assert np.abs(np.array(found.z_mean) / found.z_mean_err).max() < 3
    assert np.abs((np.array(found.z_std) - 1) / found.z_std_err).max() < 3
    entropy = multivariate_normal(cov=COV[:2, :2]).entropy()  # of the pair, whatever else is inferred
    assert found.nll == pytest.approx(entropy, abs=3 * found.nll_err)
    assert found.nll_err == pytest.approx(1 / np.sqrt(2400), rel=0.15)  # as d2 / 2 of the pair
    assert found.fom_rescaled == pytest.approx(1 / np.sqrt(np.linalg.det(COV[:2, :2])), rel=0.06)


@pytest.mark.parametrize("d", [2, 3])
@pytest.mark.parametrize(("widen", "verdict"), [(1 / 1.3, "over-confident"), (1.3, "under-confident")])
def test_too_narrow_and_too_wide_posteriors_are_named(widen: float, verdict: str, d: int) -> None:
    posterior, theta, sim_id = posteriors(400, widen, d=d)
    found = calibration_of(posterior, theta, sim_id)
    assert found.verdict == verdict
    assert found.chi2_per_dof == pytest.approx(1 / widen, rel=0.06)
    # Dividing by it undoes it: the FoM of two parameters goes as one over the covariance's scale.
    assert found.fom_rescaled == pytest.approx(1 / np.sqrt(np.linalg.det(COV[:2, :2])), rel=0.06)
    expected = chi2(d).cdf(chi2(d).ppf(LEVELS) * widen)
    assert np.abs(np.array(found.coverage) - expected).max() < 0.03


def test_a_bias_shows_in_the_z_scores() -> None:
    found = calibration_of(*posteriors(400, shift=0.5))
    assert np.abs(np.array(found.z_mean) - 0.5).max() < 0.08
    assert (np.array(found.z_mean) / found.z_mean_err > 5).all()


def test_tiles_that_all_miss_by_the_same_have_no_scatter_and_no_nan() -> None:
    posterior, theta, sim_id = posteriors(3)
    missed = replace(posterior, mu=theta + 0.1 * posterior.sigma)
    found = calibration_of(missed, theta, sim_id)
    np.testing.assert_allclose([found.z_std, found.z_std_err], 0, atol=1e-6)


def test_tiles_that_share_their_error_count_as_one_simulation() -> None:
    # Six copies of one tile say no more than one: the error is that of 400 tiles, not of 2400.
    shared = calibration_of(*posteriors(400, shared=True))
    assert shared.chi2_per_dof_err == pytest.approx(1 / np.sqrt(400), rel=0.15)  # d2 / 2 has unit scatter
    alone = calibration_of(*posteriors(400))
    assert alone.chi2_per_dof_err == pytest.approx(1 / np.sqrt(2400), rel=0.15)
    assert alone.n_tiles == 2400


@pytest.mark.parametrize("widen", [0.6, 1.0, 1.7])
def test_recalibration_mends_posteriors_made_over_and_under_confident(widen: float) -> None:
    """Checked on simulations that did not give the scale, and within the error that the result states."""
    exact, _, _ = posteriors(50)
    wrong, *_ = posteriors(50, widen)
    found = recalibrate(wrong, calibration_of(*posteriors(400, widen)))
    assert found is not None
    assert found.scale * widen == pytest.approx(1, abs=3 * found.scale_err * widen)
    assert found.fom_fiducial_median == pytest.approx(np.median(exact.fom), abs=3 * found.fom_fiducial_median_err)
    assert found.fom_fiducial_median_err / found.fom_fiducial_median == pytest.approx(1 / np.sqrt(2400), rel=0.2)
    corrected = posterior_of_moments(wrong.params, wrong.mu, found.scale * wrong.cov)
    np.testing.assert_allclose(corrected.fom, found.fom_fiducial_all)
    assert recalibrate(wrong, replace(calibration_of(*posteriors(400)), optimistic=True)) is None


def test_what_is_wrong_with_another_parameter_leaves_the_fom_alone() -> None:
    """Of three parameters only w has an error twice as large as its posterior says."""
    posterior, theta, sim_id = posteriors(400, d=3)
    mu = posterior.mu.copy()
    mu[:, 2] += np.sqrt(3 * COV[2, 2]) * np.random.default_rng(1).standard_normal(len(mu))
    found = calibration_of(posterior := replace(posterior, mu=mu), theta, sim_id)
    corrected = recalibrate(posterior, found)
    assert corrected is not None
    assert found.chi2_per_dof > 1.5
    assert corrected.scale == pytest.approx(1, abs=3 * corrected.scale_err)
    assert corrected.fom_fiducial_median == pytest.approx(posterior.fom[0] / corrected.scale)
