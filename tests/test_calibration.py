"""Calibration figures on posteriors that are right, too narrow, too wide or shifted on purpose."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import chi2, kstest

from npe.calibration import LEVELS, calibrate
from npe.model import Posterior

COV = np.array([[0.0009, -0.0004], [-0.0004, 0.0008]])


def posteriors(
    n_sims: int, widen: float = 1.0, shift: float = 0.0, shared: bool = False
) -> tuple[Posterior, np.ndarray, np.ndarray]:
    """Exact posteriors of 6 tiles a simulation, their covariance then multiplied by `widen`, their mean shifted.

    With `shared` the six tiles of a simulation have one and the same error, as if they were one tile six times.
    """
    rng = np.random.default_rng(5)
    theta = np.repeat(rng.uniform([0.2, 0.6], [0.4, 0.9], (n_sims, 2)), 6, axis=0)
    error = rng.multivariate_normal([0, 0], COV, n_sims if shared else 6 * n_sims)
    mu = theta + (np.repeat(error, 6, axis=0) if shared else error) + shift * np.sqrt(np.diag(COV))
    cov = np.tile(widen * COV, (len(theta), 1, 1))
    return Posterior(mu, cov, 1 / np.sqrt(np.linalg.det(cov))), theta, np.repeat(np.arange(n_sims), 6)


def test_exact_posteriors_are_found_calibrated() -> None:
    posterior, theta, sim_id = posteriors(400)
    found = calibrate(posterior, theta, sim_id, np.random.default_rng(0))
    assert found.verdict == "calibrated"
    assert kstest(found.d2, chi2(2).cdf).pvalue > 0.01
    assert np.abs(found.coverage - LEVELS).max() < 0.03
    assert np.abs(found.z_mean / found.z_mean_err).max() < 3
    assert np.abs((found.z_std - 1) / found.z_std_err).max() < 3
    assert found.to_json(1000.0)["fom_over_s"] == pytest.approx(1000, rel=0.06)


@pytest.mark.parametrize(("widen", "verdict"), [(1 / 1.3, "over-confident"), (1.3, "under-confident")])
def test_too_narrow_and_too_wide_posteriors_are_named(widen: float, verdict: str) -> None:
    posterior, theta, sim_id = posteriors(400, widen)
    found = calibrate(posterior, theta, sim_id, np.random.default_rng(0))
    assert found.verdict == verdict
    assert found.s == pytest.approx(1 / widen, rel=0.06)
    # Dividing by s undoes it: in two dimensions the FoM goes as one over the covariance's scale.
    true_fom = 1 / np.sqrt(np.linalg.det(COV))
    assert found.to_json(float(np.median(posterior.fom)))["fom_over_s"] == pytest.approx(true_fom, rel=0.06)
    expected = chi2(2).cdf(chi2(2).ppf(LEVELS) * widen)
    assert np.abs(found.coverage - expected).max() < 0.03


def test_a_bias_shows_in_the_z_scores() -> None:
    posterior, theta, sim_id = posteriors(400, shift=0.5)
    found = calibrate(posterior, theta, sim_id, np.random.default_rng(0))
    assert np.abs(found.z_mean - 0.5).max() < 0.08
    assert (found.z_mean / found.z_mean_err > 5).all()


def test_tiles_that_share_their_error_count_as_one_simulation() -> None:
    # Six copies of one tile say no more than one: the error is that of 400 tiles, not of 2400.
    alone, _, _ = posteriors(400)
    posterior, theta, sim_id = posteriors(400, shared=True)
    found = calibrate(posterior, theta, sim_id, np.random.default_rng(0))
    assert found.s_err == pytest.approx(1 / np.sqrt(400), rel=0.15)  # d2 / 2 has unit scatter
    posterior, theta, sim_id = posteriors(400)
    assert calibrate(posterior, theta, sim_id, np.random.default_rng(0)).s_err == pytest.approx(
        1 / np.sqrt(2400), rel=0.15
    )
    assert len(alone.fom) == 2400
