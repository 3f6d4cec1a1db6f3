"""Is a posterior as wide as it says? z-scores, Mahalanobis distances and expected coverage on tiles of known theta."""

import numpy as np
from scipy.stats import chi2

from data.schema import FOM_PARAMS
from npe.fom import N_BOOTSTRAP
from npe.model import Posterior
from npe.result import Calibration, Recalibrated

LEVELS = np.linspace(0.05, 0.95, 19)  # credibility levels of the coverage curve
VERDICT_SIGMA = 3.0  # beyond so many errors from 1 a posterior is called miscalibrated


def squared_distances(posterior: Posterior, theta: np.ndarray) -> np.ndarray:
    """Squared Mahalanobis distances of the truth theta (n, d), (n,): chi^2 with d degrees of freedom if calibrated."""
    residual = posterior.mu - theta  # (n, d)
    return np.einsum("ni,nij,nj->n", residual, np.linalg.inv(posterior.cov), residual)


def calibrate(
    posterior: Posterior,
    theta: np.ndarray,
    sim_id: np.ndarray,
    rng: np.random.Generator,
    *,
    fom: float,
    tiles: str,
    optimistic: bool,
) -> Calibration:
    """Compare the posteriors of n tiles with the truth theta (n, d), with errors from a bootstrap over sim_id (n,).

    For a Gaussian posterior the credible region of level p is d2 <= chi2.ppf(p), so expected coverage and the
    distribution of d2 are two views of one thing. `fom` is the run's; `tiles` and `optimistic` go into the result.
    """
    d = theta.shape[1]
    z, d2 = (posterior.mu - theta) / posterior.sigma, squared_distances(posterior, theta)  # (n, d), (n,)
    inside = d2[:, None] <= chi2.ppf(LEVELS, df=d)  # (n, n_levels)

    of_fom = posterior.squared_distances_of_fom(theta)  # (n,)
    columns = np.column_stack([z, z**2, d2, of_fom, posterior.nll(theta), inside])  # (n, n_columns), whose means count
    parts = d, 2 * d, 2 * d + 1, 2 * d + 2, 2 * d + 3
    z_mean, z_square, mean_d2, mean_of_fom, nll, coverage = np.split(columns.mean(axis=0), parts)
    resampled = np.split(_resampled_means(columns, sim_id, rng), parts, axis=1)
    b_z_mean, b_z_square, b_mean_d2, b_of_fom, b_nll, b_coverage = resampled
    chi2_per_dof, error = float(mean_d2[0] / d), float(b_mean_d2.std() / d)
    scale, scale_err = float(mean_of_fom[0] / len(FOM_PARAMS)), float(b_of_fom.std() / len(FOM_PARAMS))
    return Calibration(
        tiles=tiles,
        optimistic=optimistic,
        verdict=_verdict(chi2_per_dof, error),
        n_tiles=len(d2),
        n_sims=len(np.unique(sim_id)),
        theta=list(posterior.params),
        z_mean=z_mean.tolist(),
        z_mean_err=b_z_mean.std(axis=0).tolist(),
        z_std=np.sqrt(np.maximum(z_square - z_mean**2, 0)).tolist(),
        z_std_err=np.sqrt(np.maximum(b_z_square - b_z_mean**2, 0)).std(axis=0).tolist(),
        chi2_per_dof=chi2_per_dof,
        chi2_per_dof_err=error,
        nll=float(nll[0]),
        nll_err=float(b_nll.std()),
        chi2_per_dof_of_fom=scale,
        chi2_per_dof_of_fom_err=scale_err,
        fom_rescaled=fom / scale,
        levels=LEVELS.tolist(),
        coverage=coverage.tolist(),
        coverage_lo_16=np.percentile(b_coverage, 16, axis=0).tolist(),
        coverage_hi_84=np.percentile(b_coverage, 84, axis=0).tolist(),
    )


def _resampled_means(columns: np.ndarray, sim_id: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Means of columns (n, n_columns) over the tiles of resampled simulations, (N_BOOTSTRAP, n_columns).

    A resample needs no more than a simulation's sums, and how often it is drawn.
    """
    sims, group = np.unique(sim_id, return_inverse=True)
    sums = np.zeros((len(sims), 1 + columns.shape[1]))  # the first is the number of tiles
    np.add.at(sums, group, np.column_stack([np.ones(len(columns)), columns]))
    resampled = rng.multinomial(len(sims), np.full(len(sims), 1 / len(sims)), size=N_BOOTSTRAP) @ sums
    return resampled[:, 1:] / resampled[:, :1]


def recalibrate(posterior: Posterior, calibration: Calibration) -> Recalibrated | None:
    """Posteriors (n,) as wide as independent tiles say, or None if their calibration is that of the test split.

    With every covariance times chi2_per_dof_of_fom, (Omega_m, S8) have a mean squared Mahalanobis distance of one per
    parameter on those tiles. Their FoM goes as one over the factor, and has its relative error.
    """
    if calibration.optimistic:
        return None
    scale, error = calibration.chi2_per_dof_of_fom, calibration.chi2_per_dof_of_fom_err
    fom = posterior.fom / scale
    median = float(np.median(fom))
    return Recalibrated(scale, error, median, median * error / scale, fom.tolist())


def _verdict(chi2_per_dof: float, error: float) -> str:
    if abs(chi2_per_dof - 1) <= VERDICT_SIGMA * error:
        return "calibrated"
    return "over-confident" if chi2_per_dof > 1 else "under-confident"
