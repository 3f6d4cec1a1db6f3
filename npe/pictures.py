"""Picture of stage 2: the fiducial posteriors and their Figures of Merit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.patches import Ellipse

from common.figures import BLUE, ORANGE, figure
from npe.model import Posterior

# Radius in sigma that holds 68.3 % of a two-dimensional Gaussian: sqrt(-2 ln(1 - 0.683)).
RADIUS_68 = np.sqrt(-2 * np.log(1 - 0.683))


def _ellipse(mu: np.ndarray, cov: np.ndarray, radius: float, **style: Any) -> Ellipse:
    """The contour of a Gaussian: mu (2,), cov (2, 2)."""
    value, vector = np.linalg.eigh(cov)
    width, height = 2 * radius * np.sqrt(value)
    angle = np.degrees(np.arctan2(vector[1, 0], vector[0, 0]))
    return Ellipse((mu[0], mu[1]), width, height, angle=angle, **style)


def draw_fom(posterior: Posterior, theta_true: np.ndarray, result: dict[str, Any], path: Path) -> None:
    """Left, the posteriors of the fiducial tiles over the truth; right, their FoMs with median and scatter."""
    median, scatter = result["fom_fiducial_median"], result["fom_fiducial_std"]
    n = len(posterior.fom)
    with figure(path, 9.6, 4.4) as drawn:
        left, right = drawn.subplots(1, 2, width_ratios=(1.15, 1))
        for mu, cov in zip(posterior.mu, posterior.cov, strict=True):
            left.add_patch(_ellipse(mu, cov, RADIUS_68, facecolor=BLUE, edgecolor="none", alpha=0.07))
            left.add_patch(_ellipse(mu, cov, RADIUS_68, facecolor="none", edgecolor=BLUE, lw=1.0, alpha=0.8))
        left.plot(*theta_true, "*", color=ORANGE, ms=16, mec="white", label="truth", zorder=5)
        left.plot([], [], color=BLUE, label=f"68 % posterior of each of {n} tiles")
        half_width = 1.05 * np.max(
            np.abs(posterior.mu - theta_true) + RADIUS_68 * np.sqrt(np.diagonal(posterior.cov, axis1=1, axis2=2)),
            axis=0,
        )
        left.set_xlim(theta_true[0] - half_width[0], theta_true[0] + half_width[0])
        left.set_ylim(theta_true[1] - half_width[1], theta_true[1] + 1.25 * half_width[1])
        left.set(xlabel=r"$\Omega_{\rm m}$", ylabel=r"$S_8$")
        left.set_title(f"Fiducial simulation, lmax {result['lmax']}, {result['noise_level']}")
        left.legend(loc="upper right")

        right.axhspan(median - scatter, median + scatter, color=BLUE, alpha=0.12, lw=0, label="tile-to-tile scatter")
        right.axhline(median, color=BLUE, label=f"median {median:.0f}")
        right.plot(np.arange(n), posterior.fom, "o", color=ORANGE, ms=6, label="one tile")
        right.set_ylim(0, 1.3 * max(posterior.fom.max(), median + scatter))
        right.set_xticks(np.arange(n))
        right.set(xlabel="fiducial tile", ylabel=r"FoM of $(\Omega_{\rm m}, S_8)$")
        right.set_title(f"FoM {median:.0f} ± {scatter:.0f}")
        right.legend(loc="lower right")
