"""Is a posterior as wide as it says? z-scores, Mahalanobis distances and expected coverage on tiles of known theta."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.stats import chi2

from data.schema import THETA_NAMES
from npe.fom import N_BOOTSTRAP
from npe.model import Posterior

LEVELS = np.linspace(0.05, 0.95, 19)  # credibility levels of the coverage curve
VERDICT_SIGMA = 3.0  # s must lie so many of its errors from 1 to be called miscalibrated


@dataclass(frozen=True)
class Calibration:
    """Figures of one set of n tiles; every error is a bootstrap over simulations, whose tiles share theta.

    Attributes:
        z_mean, z_std, z_mean_err, z_std_err: (2,) mean and scatter over tiles of (mu - theta) / sigma; right: 0, 1.
        d2: (n,) squared Mahalanobis distances of the truth; chi^2 with two degrees of freedom if right.
        s, s_err: <d2> / 2; 1 if right, above 1 if the posteriors are too narrow.
        coverage, coverage_lo, coverage_hi: (n_levels,) share of tiles whose truth lies inside the credible region of
            each of LEVELS, and its 16th and 84th percentile.
        n_sims: simulations that the tiles come from.
    """

    z_mean: np.ndarray
    z_std: np.ndarray
    z_mean_err: np.ndarray
    z_std_err: np.ndarray
    d2: np.ndarray
    s: float
    s_err: float
    coverage: np.ndarray
    coverage_lo: np.ndarray
    coverage_hi: np.ndarray
    n_sims: int

    @property
    def verdict(self) -> str:
        """`calibrated`, `over-confident` or `under-confident`."""
        if abs(self.s - 1) <= VERDICT_SIGMA * self.s_err:
            return "calibrated"
        return "over-confident" if self.s > 1 else "under-confident"

    def to_json(self, fom_median: float) -> dict[str, Any]:
        """What fom_result.json holds; `fom_over_s` is the FoM if all covariances were s times as large."""
        return {
            "verdict": self.verdict,
            "n_tiles": len(self.d2),
            "n_sims": self.n_sims,
            "theta": list(THETA_NAMES),
            "z_mean": self.z_mean.tolist(),
            "z_mean_err": self.z_mean_err.tolist(),
            "z_std": self.z_std.tolist(),
            "z_std_err": self.z_std_err.tolist(),
            "s": self.s,
            "s_err": self.s_err,
            "fom_over_s": fom_median / self.s,
            "levels": LEVELS.tolist(),
            "coverage": self.coverage.tolist(),
            "coverage_lo_16": self.coverage_lo.tolist(),
            "coverage_hi_84": self.coverage_hi.tolist(),
        }


def calibrate(posterior: Posterior, theta: np.ndarray, sim_id: np.ndarray, rng: np.random.Generator) -> Calibration:
    """Compare n posteriors with the truth.

    For a Gaussian posterior the credible region of level p is d2 <= chi2.ppf(p), so expected coverage and the
    distribution of d2 are two views of one thing.

    Args:
        posterior: mu (n, 2), cov (n, 2, 2), in the units of theta.
        theta: (n, 2) true parameters.
        sim_id: (n,) simulation of each tile.
        rng: of the bootstrap.
    """
    residual = posterior.mu - theta  # (n, 2)
    z = residual / np.sqrt(np.diagonal(posterior.cov, axis1=1, axis2=2))  # (n, 2)
    d2 = np.einsum("ni,nij,nj->n", residual, np.linalg.inv(posterior.cov), residual)  # (n,)
    inside = d2[:, None] <= chi2.ppf(LEVELS, df=theta.shape[1])  # (n, n_levels)

    # Everything below is a mean over tiles, so a resample of simulations only needs sums per simulation.
    columns = np.column_stack([np.ones(len(d2)), z, z**2, d2, inside])  # (n, 1 + 2 + 2 + 1 + n_levels)
    sims, group = np.unique(sim_id, return_inverse=True)
    sums = np.zeros((len(sims), columns.shape[1]))
    np.add.at(sums, group, columns)
    counts = rng.multinomial(len(sims), np.full(len(sims), 1 / len(sims)), size=N_BOOTSTRAP)  # how often each is drawn
    resampled = counts @ sums  # (N_BOOTSTRAP, n_sims) @ (n_sims, n_columns)
    resampled = resampled[:, 1:] / resampled[:, :1]
    z_mean, z_square, mean_d2, coverage = np.split(columns[:, 1:].mean(axis=0), [2, 4, 5])
    b_z_mean, b_z_square, b_mean_d2, b_coverage = np.split(resampled, [2, 4, 5], axis=1)
    return Calibration(
        z_mean=z_mean,
        z_std=np.sqrt(z_square - z_mean**2),
        z_mean_err=b_z_mean.std(axis=0),
        z_std_err=np.sqrt(b_z_square - b_z_mean**2).std(axis=0),
        d2=d2,
        s=float(mean_d2[0] / 2),
        s_err=float(b_mean_d2.std() / 2),
        coverage=coverage,
        coverage_lo=np.percentile(b_coverage, 16, axis=0),
        coverage_hi=np.percentile(b_coverage, 84, axis=0),
        n_sims=len(sims),
    )
