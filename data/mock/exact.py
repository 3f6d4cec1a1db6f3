"""The exact posterior of (Omega_m, S8) from flat Gaussian tiles, on a grid or by importance sampling."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy.interpolate import RegularGridInterpolator
from scipy.special import logsumexp
from scipy.stats import qmc

from common.progress import Progress
from data.mock.cosmology import FIDUCIAL, FIDUCIAL_COSMO, OMEGA_M_RANGE, S8_EDGES, prior_density, prior_quantile
from data.mock.flat import modes_of
from data.mock.limber import spectra_ratio
from data.mock.nz import N_BINS
from data.mock.theory import BIN_PAIRS, COSMO_NAMES, cl_matrix, theory_cl_at
from data.nuisance import Nuisance, Prior
from data.schema import A_IA, noise_cl

N_RESPONSE = (10, 12)  # cosmologies in Omega_m and S8 at which the response to alignments is computed
N_GRID = (240, 320)  # cells in Omega_m and S8 over the prior's range: a fifth of a typical sigma
CHUNK = 512  # cosmologies at a time
NEGLIGIBLE = 1e-9  # of the largest weight


@dataclass(frozen=True)
class Nuisances:
    """Of every point: amplitude of the alignments (n,) and shear biases (n, 4)."""

    a_ia: np.ndarray
    m: np.ndarray


@dataclass(frozen=True)
class WeightedPoints:
    """Cosmologies (n, 7) whose weights (n,) make them stand for the prior; `cell`, the area of a grid's cells, or 0."""

    cosmo: np.ndarray
    weight: np.ndarray
    cell: float
    nuisances: Nuisances | None = None


@dataclass(frozen=True)
class ExactPosterior:
    """Moments of exact posteriors of (Omega_m, S8) for n tiles, in physical units."""

    mu: np.ndarray  # (n, 2)
    cov: np.ndarray  # (n, 2, 2)
    kl_gaussian: np.ndarray  # (n,) KL(exact || Gaussian of these moments) [nats]; on a grid exact, else leading order
    n_effective: np.ndarray  # (n,) effective number of points that carry the posterior

    @property
    def fom(self) -> np.ndarray:
        """1 / sqrt(det Cov), (n,)."""
        return 1 / np.sqrt(np.linalg.det(self.cov))


def grid_over_prior(n_grid: tuple[int, int] = N_GRID) -> WeightedPoints:
    """Cell centres of a regular grid in (Omega_m, S8), all else at the fiducial."""
    edges = [np.linspace(*OMEGA_M_RANGE, n_grid[0] + 1), np.linspace(S8_EDGES[0], S8_EDGES[-1], n_grid[1] + 1)]
    omega_m, s8 = np.meshgrid(*[(e[1:] + e[:-1]) / 2 for e in edges], indexing="ij")
    cosmo = np.tile([FIDUCIAL[name] for name in COSMO_NAMES], (omega_m.size, 1))  # (n, 7)
    cosmo[:, 0], cosmo[:, 1] = omega_m.ravel(), s8.ravel()
    cell = float(np.prod([e[1] - e[0] for e in edges]))
    return WeightedPoints(cosmo, prior_density(cosmo[:, :2]) * cell, cell)


def draws_from_prior(n_log2: int, seed: int) -> WeightedPoints:
    """2^n_log2 cosmologies that vary in all seven parameters, weighted to the suite's prior.

    A scrambled Sobol sequence, for importance sampling: the posterior of a tile from the edge of the prior needs points
    there, so Omega_m and S8 are drawn uniformly and w with the square of a uniform number as its quantile, which puts a
    third of the points below -1 where the prior has a tenth.
    """
    v = qmc.Sobol(len(COSMO_NAMES), rng=np.random.default_rng(seed)).random_base2(n_log2)  # (n, 7)
    theta_range = np.array([OMEGA_M_RANGE, (S8_EDGES[0], S8_EDGES[-1])])
    quantile = v.copy()
    quantile[:, 2] = v[:, 2] ** 2  # of w; du = 2 v dv
    cosmo = prior_quantile(quantile)
    cosmo[:, :2] = theta_range[:, 0] + v[:, :2] * np.ptp(theta_range, axis=1)
    weight = prior_density(cosmo[:, :2]) * np.prod(np.ptp(theta_range, axis=1)) * 2 * v[:, 2] / len(v)
    return WeightedPoints(cosmo, weight, 0.0)


def draws_with_nuisances(n_log2: int, seed: int, priors: dict[str, Prior]) -> WeightedPoints:
    """2^n_log2 points in (Omega_m, S8), uniform and weighted to the prior, A_IA and the m of their priors."""
    names = [A_IA, *(f"m_{a + 1}" for a in range(N_BINS))]
    v = qmc.Sobol(2 + len(names), rng=np.random.default_rng(seed)).random_base2(n_log2)  # (n, 7)
    theta_range = np.array([OMEGA_M_RANGE, (S8_EDGES[0], S8_EDGES[-1])])
    cosmo = np.tile(FIDUCIAL_COSMO, (len(v), 1))
    cosmo[:, :2] = theta_range[:, 0] + v[:, :2] * np.ptp(theta_range, axis=1)
    weight = prior_density(cosmo[:, :2]) * np.prod(np.ptp(theta_range, axis=1)) / len(v)
    a_ia, *m = (priors[name].quantile(np.clip(u, 1e-12, 1)) for name, u in zip(names, v[:, 2:].T, strict=True))
    return WeightedPoints(cosmo, weight, 0.0, Nuisances(a_ia, np.stack(m, axis=1)))


def response_of(points: WeightedPoints, ell: np.ndarray) -> Callable[[slice], np.ndarray]:
    """What the nuisances of some of the points multiply their spectra by: slice -> (n, 10, n_ell).

    In the amplitude a spectrum is a parabola, whose two coefficients are smooth in (Omega_m, S8): they are computed on
    a grid. Other parameters are fiducial, and the alignments do not evolve.
    """
    if (of_points := points.nuisances) is None:
        return lambda some: np.ones(1)
    axes = [np.linspace(*OMEGA_M_RANGE, N_RESPONSE[0]), np.linspace(S8_EDGES[0], S8_EDGES[-1], N_RESPONSE[1])]
    zero, table = np.zeros(N_BINS), np.empty((*N_RESPONSE, 2, len(BIN_PAIRS), len(ell)))
    both = [Nuisance(zero, zero, a_ia, 0.0) for a_ia in (1.0, -1.0)]
    for place in np.ndindex(N_RESPONSE):
        cosmo = FIDUCIAL_COSMO.copy()
        cosmo[:2] = axes[0][place[0]], axes[1][place[1]]
        plus, minus = spectra_ratio(cosmo, both, ell)
        table[place] = (plus - minus) / 2, (plus + minus) / 2 - 1
    interpolated = RegularGridInterpolator(axes, table, method="cubic")
    first, second = np.array(BIN_PAIRS).T

    def response(some: slice) -> np.ndarray:
        a_ia, scale = of_points.a_ia[some, None, None], 1 + of_points.m[some]  # (n, 1, 1), (n, 4)
        linear, square = interpolated(points.cosmo[some, :2]).swapaxes(0, 1)  # (n, 10, n_ell) each
        ratio = 1 + a_ia * linear + a_ia**2 * square
        return ratio * (scale[:, first] * scale[:, second])[..., None]

    return response


def log_likelihood(points: WeightedPoints, powers: np.ndarray, noise_level: str, lmax: int, nside: int) -> np.ndarray:
    """ln p(tile | point) up to a constant of the data, (n_points, n_tiles).

    With m modes at an ell, D = C_ell + N_ell and P the mean of a a^dagger over them, the complex normal modes give
    -m (ln det D + tr(D^-1 P)). The powers (n_tiles, 10, n_ell) are those of `powers_of`.
    """
    modes, cosmo = modes_of(lmax, nside), points.cosmo
    response = response_of(points, modes.ell)
    noise = np.diag(noise_cl(noise_level, N_BINS))
    twice_off_diagonal = np.array([1.0 if i == j else 2.0 for i, j in BIN_PAIRS])
    data = powers.reshape(len(powers), -1).T  # (10 * n_ell, n_tiles)
    out = np.empty((len(cosmo), len(powers)))
    with Progress("likelihood", len(cosmo), "cosmologies") as progress:
        for start in range(0, len(cosmo), CHUNK):
            some = slice(start, start + CHUNK)
            cl = theory_cl_at(cosmo[some], modes.ell) * response(some)  # (n, 10, n_ell)
            covariance = np.stack([cl_matrix(c) for c in cl]) + noise  # (n, n_ell, 4, 4)
            inverse = np.linalg.inv(covariance)
            weight = np.stack([inverse[..., i, j] for i, j in BIN_PAIRS], axis=1)  # (n, 10, n_ell)
            weight *= twice_off_diagonal[:, None] * modes.count
            log_det = np.linalg.slogdet(covariance)[1] @ modes.count  # (n,)
            out[some] = -(weight.reshape(len(cl), -1) @ data) - log_det[:, None]
            progress.advance(len(cl))
    return out


def exact_posterior(points: WeightedPoints, log_like: np.ndarray) -> ExactPosterior:
    """Moments of the posterior under weighted points of the prior and log_like (n_points, n_tiles)."""
    theta = points.cosmo[:, :2]  # (n_points, 2)
    with np.errstate(divide="ignore"):  # cells outside the prior weigh nothing
        log_p = log_like + np.log(points.weight)[:, None]
    log_p -= logsumexp(log_p, axis=0)  # (n_points, n_tiles)
    p = np.exp(log_p)
    mu = p.T @ theta  # (n_tiles, 2)
    second = p.T @ (theta[:, :, None] * theta[:, None, :]).reshape(-1, 4)  # (n_tiles, 4)
    cov = second.reshape(-1, 2, 2) - mu[:, :, None] * mu[:, None, :]  # (n_tiles, 2, 2)
    if points.cell:
        # E_p[ln p] from the cells; E_p[ln g] = -ln(2 pi) - ln det(Cov) / 2 - 1 for the Gaussian of p's own moments.
        minus_entropy = np.einsum("pn,pn->n", p, np.where(p > 0, log_p, 0)) - np.log(points.cell)
        kl = minus_entropy + np.log(2 * np.pi) + np.log(np.linalg.det(cov)) / 2 + 1
    else:
        kl = np.array([_edgeworth_negentropy(theta, p[:, n], mu[n], cov[n]) for n in range(len(mu))])
    return ExactPosterior(mu, cov, kl, 1 / np.square(p).sum(axis=0))


def _edgeworth_negentropy(theta: np.ndarray, p: np.ndarray, mu: np.ndarray, cov: np.ndarray) -> float:
    """KL(p || Gaussian of its moments) to leading order in the cumulants of theta (n_points, 2), weights p (n_points,).

    sum_ijk k_ijk^2 / 12 + sum_ijkl k_ijkl^2 / 48 for whitened theta (Comon 1994, Signal Processing 36, 287, in
    one dimension). Steps of the prior's density, which a broad posterior feels, are no cumulants: it misses them.
    """
    heavy = p > NEGLIGIBLE * p.max()
    y = (theta[heavy] - mu) @ np.linalg.inv(np.linalg.cholesky(cov)).T  # (n_heavy, 2), white
    third = np.einsum("n,ni,nj,nk->ijk", p[heavy], y, y, y, optimize=True)
    fourth = np.einsum("n,ni,nj,nk,nl->ijkl", p[heavy], y, y, y, y, optimize=True)
    one = np.eye(2)
    gaussian = sum(np.einsum(f"{pairs}->ijkl", one, one) for pairs in ("ij,kl", "ik,jl", "il,jk"))
    return float(np.square(third).sum() / 12 + np.square(fourth - gaussian).sum() / 48)
