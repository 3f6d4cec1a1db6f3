"""Cosmologies of the mock suite: a low-discrepancy design in the shape of the Gower Street suite."""

import numpy as np
from scipy.stats import norm, qmc, rv_histogram, truncnorm

from data.mock.config import Vary
from data.mock.theory import COSMO_NAMES
from data.schema import PARAM_NAMES

# Simulation 109 of the Gower Street suite (Jeffrey et al. 2024, arXiv:2403.02314).
FIDUCIAL = {"Omega_m": 0.30066, "S8": 0.80555, "w": -0.679, "h": 0.683, "n_s": 0.9713, "Omega_b": 0.0480, "m_nu": 0.06}
FIDUCIAL_COSMO = np.array([FIDUCIAL[name] for name in COSMO_NAMES])  # (7,)

# The rest describes the table of the 791 published simulations. Simulations per 0.05 of S8 from 0.50 to 1.00:
S8_EDGES = np.linspace(0.50, 1.00, 11)
S8_COUNTS = np.array([39, 44, 65, 73, 108, 154, 129, 76, 60, 43])
OMEGA_M_MEAN, OMEGA_M_STD, OMEGA_M_RANGE = 0.313, 0.069, (0.123, 0.497)
# w: half-normal above -1, and a tenth of the simulations half-normal below it.
W_FRACTION_BELOW, W_STD_BELOW, W_STD_ABOVE, W_RANGE = 0.105, 0.30, 1 / 3, (-1.79, -0.34)
H_MEAN, H_STD = 0.702, 0.0245
N_S_MEAN, N_S_STD = 0.965, 0.0064
OMEGA_B_H2_MEAN, OMEGA_B_H2_STD = 0.0224, 0.0001
M_NU_FRACTION_AT_MINIMUM, M_NU_RANGE = 0.24, (0.06, 0.14)  # [eV]; the others log-uniform
TAIL = 3.5  # standard deviations at which normal parameters are cut, inside the theory table


def design(n_sims: int, seed: int, fiducial_sim_id: int | None, vary: Vary = "all") -> tuple[np.ndarray, np.ndarray]:
    """Simulation ids, int64 (n_sims,), and their cosmologies, float64 (n_sims, 7) in the order of COSMO_NAMES.

    Ids count from 1; a fiducial id beyond n_sims takes the last place. With None, no simulation has the fiducial
    cosmology. A simulation's cosmology depends only on the seed and its id, so a small suite is part of a large one.
    Parameters that do not vary have the fiducial value.
    """
    sim_id = np.arange(1, n_sims + 1)
    if fiducial_sim_id is not None and fiducial_sim_id > n_sims:
        sim_id[-1] = fiducial_sim_id
    power = int(np.ceil(np.log2(sim_id[-1] + 1)))  # a Sobol sequence is balanced in powers of two, and nested
    u = qmc.Sobol(len(COSMO_NAMES), rng=np.random.default_rng(seed)).random_base2(power)[sim_id]
    cosmo = held_fixed(prior_quantile(u), vary)
    cosmo[sim_id == fiducial_sim_id] = FIDUCIAL_COSMO
    return sim_id, cosmo


def prior_quantile(u: np.ndarray) -> np.ndarray:
    """Cosmologies (n, 7) of the suite's prior, in which the parameters are independent, from u (n, 7) in [0, 1)."""
    omega_m = _truncated_normal(u[:, 0], OMEGA_M_MEAN, OMEGA_M_STD, *OMEGA_M_RANGE)
    s8 = np.interp(u[:, 1], np.concatenate([[0], np.cumsum(S8_COUNTS)]) / S8_COUNTS.sum(), S8_EDGES)
    w = _w_quantile(u[:, 2])
    h = _truncated_normal(u[:, 3], H_MEAN, H_STD)
    n_s = _truncated_normal(u[:, 4], N_S_MEAN, N_S_STD)
    omega_b = _truncated_normal(u[:, 5], OMEGA_B_H2_MEAN, OMEGA_B_H2_STD) / h**2
    v = np.clip((u[:, 6] - M_NU_FRACTION_AT_MINIMUM) / (1 - M_NU_FRACTION_AT_MINIMUM), 0, 1)
    m_nu = M_NU_RANGE[0] * (M_NU_RANGE[1] / M_NU_RANGE[0]) ** v
    return np.stack([omega_m, s8, w, h, n_s, omega_b, m_nu], axis=1)


def held_fixed(cosmo: np.ndarray, vary: Vary) -> np.ndarray:
    """Cosmologies (n, 7) with the fiducial value in every parameter that does not vary."""
    if vary == "all":
        return cosmo
    return np.where(np.isin(COSMO_NAMES, vary.split(",")), cosmo, FIDUCIAL_COSMO)


def prior_density(theta: np.ndarray) -> np.ndarray:
    """Density of the suite's prior in (Omega_m, S8): theta (n, 2) -> (n,); zero outside its range."""
    lower, upper = ((edge - OMEGA_M_MEAN) / OMEGA_M_STD for edge in OMEGA_M_RANGE)
    of_omega_m = truncnorm.pdf(theta[:, 0], lower, upper, OMEGA_M_MEAN, OMEGA_M_STD)
    of_s8 = rv_histogram((S8_COUNTS, S8_EDGES), density=False).pdf(theta[:, 1])
    return of_omega_m * of_s8


def _truncated_normal(
    u: np.ndarray, mean: float, std: float, lower: float = -np.inf, upper: float = np.inf
) -> np.ndarray:
    a, b = max((lower - mean) / std, -TAIL), min((upper - mean) / std, TAIL)
    return mean + std * truncnorm.ppf(u, a, b)


def _w_quantile(u: np.ndarray) -> np.ndarray:
    below = u < W_FRACTION_BELOW
    low = 2 * norm.cdf((W_RANGE[0] + 1) / W_STD_BELOW)  # mass of each half-normal beyond the range
    high = 2 * norm.cdf(-(W_RANGE[1] + 1) / W_STD_ABOVE)
    v_below = low + (1 - low) * np.minimum(u / W_FRACTION_BELOW, 1)  # cumulative, from far below up to -1
    v_above = (1 - high) * np.clip((u - W_FRACTION_BELOW) / (1 - W_FRACTION_BELOW), 0, 1)
    w_below = -1 + W_STD_BELOW * norm.ppf(np.clip(v_below / 2, 1e-12, 0.5))
    w_above = -1 + W_STD_ABOVE * norm.ppf(0.5 + v_above / 2)
    return np.where(below, w_below, w_above)


def params_of(cosmo: np.ndarray) -> np.ndarray:
    """Columns of the shards, (n, 8) in the order of PARAM_NAMES, from cosmologies (n, 7)."""
    column = dict(zip(COSMO_NAMES, cosmo.T, strict=True))
    column["sigma_8"] = column["S8"] / np.sqrt(column["Omega_m"] / 0.3)
    return np.stack([column[name] for name in PARAM_NAMES], axis=1)
