"""Will more simulations help? The law floor + c N^-a through the figures of a sweep's runs, and twice as many."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from npe.config import MIN_NUMBERS
from npe.result import CurveFit, LearningCurve

SEED = 4  # of the seed: evaluate.py and ensemble.py have 1 to 3
N_DRAWS = 20_000
# Exponents that are tried. Where learning is a matter of how many tiles there are, a is 1 (a loss) or 1/2 (a bias in
# proportion to an error); networks on the way there have less. Below 0.1 the law is a logarithm, whose floor the points
# cannot see; beyond 3 all but the smallest number lies on the floor.
EXPONENTS = np.geomspace(0.1, 3, 200)


def learning_curves(points: list[dict[str, Any]], seed: int) -> list[LearningCurve]:
    """Two curves for every lmax of a sweep's points: both stages, and stage 2 alone.

    The runs of both stages with the largest number of simulations are points of either. A curve without a point is
    left out.
    """
    largest, curves = max(point["compressor_n_sims"] for point in points), []
    done = [point for point in points if "error" not in point]
    for lmax in sorted({point["lmax"] for point in done}):
        here = [point for point in done if point["lmax"] == lmax]
        for stages, runs in (
            ("both stages", [p for p in here if p["n_sims"] == p["compressor_n_sims"]]),
            ("stage 2 alone", [p for p in here if p["compressor_n_sims"] == largest]),
        ):
            if runs:
                curves.append(_curve(lmax, stages, runs, seed))
    return curves


def _curve(lmax: int, stages: str, runs: list[dict[str, Any]], seed: int) -> LearningCurve:
    n_sims, nll, fom = ([run[name] for run in runs] for name in ("n_sims", "nll", "fom_fiducial_median"))
    enough = len(set(n_sims)) >= MIN_NUMBERS
    return LearningCurve(
        lmax=lmax,
        stages=stages,
        n_sims=n_sims,
        nll_of_runs=nll,
        fom_of_runs=fom,
        nll=fit_law(n_sims, nll, np.random.default_rng([seed, SEED])) if enough else None,
        fom=fit_law(n_sims, np.log(fom), np.random.default_rng([seed, SEED]), np.exp) if enough else None,
    )


def fit_law(
    n_sims: Sequence[int],
    values: Sequence[float] | np.ndarray,
    rng: np.random.Generator,
    shown: Callable[[Any], Any] = lambda value: value,
) -> CurveFit:
    """Fit floor + c N^-a to one value per run, and predict it at twice the largest N.

    Given a, the law is linear in the other two, so the least squares of every exponent are exact; the best of them
    gives floor, c and a. Runs are taken to scatter as N^-1/2, with a scale that is unknown.

    Four numbers of simulations say little about a, so an error counts every exponent for as much as the points allow
    it (see _draw): within one error of the value lie 68 % of the draws. What it does not have: another law, and what
    all runs share, which is the tiles that they are checked on and, where the largest number is the whole suite, its
    simulations. If the scatter does not fall with N it is too small.

    Args:
        n_sims, values: of each run, with at least MIN_NUMBERS different numbers.
        rng: draws the distribution that the errors are those of.
        shown: what the predictions are of the fitted value, such as np.exp of ln FoM.
    """
    x = np.array(n_sims) / max(n_sims)  # (n,)
    laws = _least_squares(x, np.array(values))
    k, draws = _draw(laws, len(x) - 2, rng)  # (N_DRAWS,), (N_DRAWS, 2)
    to_twice = _left(np.array([2.0]), x.min())[0]  # (n_a,)
    drawn, drawn_twice = shown(draws[:, 0]), shown(draws[:, 0] + draws[:, 1] * to_twice[k])

    best = laws.chi2.argmin()
    (at, off), a = laws.solution[best], EXPONENTS[best]
    c = off / (x.min() ** -a - 1)  # of (N / largest)^-a
    largest, twice = shown(at), shown(at + off * to_twice[best])
    a_lo, a_hi = np.percentile(EXPONENTS[k], [16, 84])
    return CurveFit(
        floor=float(at - c),
        c=float(c * max(n_sims) ** a),
        a=float(a),
        a_lo_16=float(a_lo),
        a_hi_84=float(a_hi),
        at_largest=float(largest),
        at_largest_err=_error(drawn, largest),
        at_twice=float(twice),
        at_twice_err=_error(drawn_twice, twice),
        gain=float(twice - largest),
        gain_err=_error(drawn_twice - drawn, twice - largest),
    )


@dataclass(frozen=True)
class _Laws:
    """For every exponent the law of least squares: value at the largest N, and how far the smallest is off it."""

    solution: np.ndarray  # (n_a, 2)
    root: np.ndarray  # (n_a, 2, 2): its covariance is root root^T times the variance of a run at the largest N
    chi2: np.ndarray  # (n_a,)


def _left(x: np.ndarray, smallest: float) -> np.ndarray:
    """What is left of the way at x (m,), in units of the largest number: 1 at the smallest, 0 at 1; (m, n_a)."""
    return (x[:, None] ** -EXPONENTS - 1) / (smallest**-EXPONENTS - 1)


def _least_squares(x: np.ndarray, y: np.ndarray) -> _Laws:
    """The laws through values y (n,) at numbers x (n,) in units of the largest."""
    weight, left = np.sqrt(x), _left(x, x.min())  # (n,), (n, n_a)
    design = weight[:, None] * np.stack([np.ones_like(left), left], axis=-1).transpose(1, 0, 2)  # (n_a, n, 2)
    q, r = np.linalg.qr(design)
    root = np.linalg.inv(r)
    solution = np.einsum("aij,anj,n->ai", root, q, weight * y)
    chi2 = np.square(weight * y - np.einsum("ani,ai->an", design, solution)).sum(axis=1)
    return _Laws(solution, root, np.maximum(chi2, np.finfo(float).tiny))  # 0 for points that lie on a law


def _draw(laws: _Laws, dof: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Draw from the posterior of the law: positions of exponents (N_DRAWS,), and solutions (N_DRAWS, 2).

    The prior is flat in ln a, in both numbers of a solution and in the logarithm of the runs' scatter. Then for every
    a the solution has Student's t distribution with dof = n - 2, and p(a) goes as |root| chi2^(-dof / 2).
    """
    ln_p = np.linalg.slogdet(laws.root)[1] - dof / 2 * np.log(laws.chi2)  # (n_a,)
    p = np.exp(ln_p - ln_p.max())
    k = rng.choice(len(p), N_DRAWS, p=p / p.sum())
    scatter = np.sqrt(laws.chi2[k] / rng.chisquare(dof, N_DRAWS))  # (N_DRAWS,)
    white = rng.standard_normal((N_DRAWS, 2))
    return k, laws.solution[k] + scatter[:, None] * np.einsum("kij,kj->ki", laws.root[k], white)


def _error(drawn: np.ndarray, value: float) -> float:
    """The distance from a value within which 68 % of what was drawn for it lie."""
    return float(np.percentile(np.abs(drawn - value), 68.3))
