"""Pictures of stage 2: the fiducial posteriors and their Figures of Merit; the calibration; tiles as maps."""

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.patches import Ellipse
from scipy.stats import chi2

from common.artifacts import NONE
from common.figures import BLUE, GREY, ORANGE, figure
from data.module import SplitTiles
from data.schema import FOM_PARAMS, label_of
from npe.model import Posterior
from npe.result import Calibration, CurvePoint, FomResult, LearningCurves, SweepResult

# Radius in sigma that holds 68.3 % of a two-dimensional Gaussian: sqrt(-2 ln(1 - 0.683)).
RADIUS_68 = np.sqrt(-2 * np.log(1 - 0.683))
MOST_ELLIPSES = 30  # of one colour; more cannot be told apart


def _ellipse(mu: np.ndarray, cov: np.ndarray, **style: Any) -> Ellipse:
    """The 68 % contour of a Gaussian: mu (2,), cov (2, 2)."""
    value, vector = np.linalg.eigh(cov)
    width, height = 2 * RADIUS_68 * np.sqrt(value)
    angle = np.degrees(np.arctan2(vector[1, 0], vector[0, 0]))
    return Ellipse((mu[0], mu[1]), width, height, angle=angle, lw=1, **style)


def draw_fom(result: FomResult, path: Path) -> None:
    """Left, the posteriors of the fiducial tiles over the truth; right, their FoMs with median and scatter."""
    median, scatter = result.fom_fiducial_median, result.fom_fiducial_std or 0.0  # null for one tile
    fom, posterior, two = np.array(result.fom_fiducial_all), result.posterior, result.posterior.of_fom
    mus, covs = posterior.mu[:, two], posterior.cov[:, two][:, :, two]  # (n, 2), (n, 2, 2)
    theta_true, n = np.array(result.fiducial.theta_true)[two], len(fom)
    with figure(path, 9.6, 4.4) as drawn:
        left, right = drawn.subplots(1, 2, width_ratios=(1.15, 1))
        for mu, cov in zip(mus, covs, strict=True):
            left.add_patch(_ellipse(mu, cov, facecolor=(BLUE, 0.07), edgecolor=(BLUE, 0.8)))
        left.plot(*theta_true, "*", color=ORANGE, ms=16, mec="white", label="truth", zorder=5)
        left.plot([], [], color=BLUE, label=f"68 % posterior of each of {n} tiles")
        x, y = 1.05 * np.max(np.abs(mus - theta_true) + RADIUS_68 * posterior.sigma[:, two], axis=0)  # half widths
        left.set_xlim(theta_true[0] - x, theta_true[0] + x)
        left.set_ylim(theta_true[1] - y, theta_true[1] + 1.25 * y)
        left.set(xlabel=label_of(FOM_PARAMS[0]), ylabel=label_of(FOM_PARAMS[1]))
        left.set_title(f"Fiducial simulation, {result.tiles_in_words}")
        left.legend(loc="upper right")

        if n > 1:
            right.axhspan(median - scatter, median + scatter, fc=(BLUE, 0.12), label="tile-to-tile scatter")
        right.axhline(median, color=BLUE, label=f"median {median:.0f}")
        right.plot(np.arange(n), fom, "o", color=ORANGE, ms=6, label="one tile")
        right.set_ylim(0, 1.3 * max(fom.max(), median + scatter))
        right.set_xticks(np.arange(n))
        right.set(xlabel="fiducial tile", ylabel=r"FoM of $(\Omega_{\rm m}, S_8)$")
        right.set_title(f"FoM {median:.0f}" + (f", tile-to-tile scatter {scatter:.0f}" if n > 1 else ""))
        right.legend(loc="lower right")


def draw_calibration(calibration: Calibration, d2: np.ndarray, path: Path) -> None:
    """Left, expected coverage with its 68 % band; right, the distribution of d2 (n,) against chi^2."""
    levels, d = calibration.levels, len(calibration.theta)
    with figure(path, 9.6, 4.2) as drawn:
        left, right = drawn.subplots(1, 2)
        left.plot([0, 1], [0, 1], color=GREY, lw=1, label="exact posterior")
        left.fill_between(levels, calibration.coverage_lo_16, calibration.coverage_hi_84, color=BLUE, alpha=0.2, lw=0)
        left.plot(levels, calibration.coverage, color=BLUE, label="this posterior, 68 % band")
        left.set(xlabel="credibility", ylabel="share of tiles with the truth inside", xlim=(0, 1), ylim=(0, 1))
        chi2_per_dof = f"{calibration.chi2_per_dof:.2f} ± {calibration.chi2_per_dof_err:.2f}"
        left.set_title(f"{calibration.verdict}: chi²/dof {chi2_per_dof}")
        left.set_aspect("equal")
        left.legend(loc="upper left")

        top = 8 + 2.0 * d
        edges, shown = np.linspace(0, top, 25), np.minimum(d2, np.nextafter(top, 0))
        right.hist(shown, edges, density=True, color=BLUE, alpha=0.35, label="tiles (last bin: all above)")
        fine = np.linspace(0, top, 200)
        right.plot(fine, chi2(d).pdf(fine), color=ORANGE, label=rf"$\chi^2$, {d} degrees of freedom")
        right.set(xlabel="squared Mahalanobis distance of the truth", ylabel="density", xlim=(0, top))
        right.set_title(f"{len(d2)} tiles of {calibration.n_sims} simulations:\n{calibration.tiles}", fontsize=9)
        right.legend(loc="upper right")


def draw_tiles(data: SplitTiles, path: Path) -> None:
    """A fiducial tile and the test tiles of lowest and highest S8, bin by bin; one colour scale for each bin."""
    test, theta, n_bins = data.test_ds.rows.numpy(), data.theta, data.tiles.n_bins
    s8 = theta[test, data.params.index("S8")]
    rows = {"fiducial": data.fiducial_ds.rows[0], "lowest S8": test[s8.argmin()], "highest S8": test[s8.argmax()]}
    with figure(path, 1.0 + 2.5 * n_bins, 8.2) as drawn:
        grid = drawn.subplots(len(rows), n_bins, squeeze=False)
        for number, (line, (name, row)) in enumerate(zip(grid, rows.items(), strict=True)):
            values = ", ".join(f"{n} {v:.3f}" for n, v in zip(data.params, theta[row], strict=True))
            for k, axes in enumerate(line):
                top, kappa = 3 * data.norm_stats.tile_std[k], data.tiles.kappa[row, k]
                shown = axes.imshow(kappa, "RdBu_r", vmin=-top, vmax=top, origin="lower", interpolation="none")
                axes.set(xticks=[], yticks=[], title=f"bin {k + 1}" if number == 0 else "")
                if number == len(rows) - 1:
                    ticks = [-top, 0, top]
                    bar = drawn.colorbar(shown, ax=grid[:, k], location="bottom", shrink=0.9, pad=0.02, ticks=ticks)
                    bar.ax.set_xticklabels([f"{tick:.2g}" for tick in ticks])
                    bar.set_label(r"$\kappa$")
            line[0].set_ylabel(f"{name}\n{values}", fontsize=9)


def draw_predictions(posterior: Posterior, ordinary: np.ndarray, theta: np.ndarray, path: Path) -> None:
    """Posteriors of n tiles, ordinary (n,) or in another colour, over the cosmologies learnt from (n_reference, d)."""
    two = posterior.of_fom
    mu, cov = posterior.mu[:, two], posterior.cov[:, two][:, :, two]  # (n, 2), (n, 2, 2)
    with figure(path, 5.2, 4.2) as drawn:
        axes = drawn.subplots()
        axes.plot(*theta[:, two].T, ".", color="0.8", ms=2, zorder=0, label="cosmologies learnt from")
        for is_ordinary, colour, label in ((True, BLUE, "ordinary"), (False, ORANGE, "out of distribution")):
            some = np.flatnonzero(ordinary == is_ordinary)
            for i in some[:MOST_ELLIPSES]:
                axes.add_patch(_ellipse(mu[i], cov[i], facecolor="none", edgecolor=colour))
            if len(some):
                more = f", {MOST_ELLIPSES} of them drawn" if len(some) > MOST_ELLIPSES else ""
                axes.plot(*mu[some[:MOST_ELLIPSES]].T, ".", color=colour, label=f"{len(some)} {label}{more}")
        axes.set(xlabel=label_of(FOM_PARAMS[0]), ylabel=label_of(FOM_PARAMS[1]), title="68 % of each tile's posterior")
        axes.legend(fontsize=8, loc="upper right", frameon=True, framealpha=0.9, edgecolor="none")


def draw_curve(result: SweepResult, path: Path) -> None:
    """FoM against lmax, or of every nuisance and lmax: every run, the mean over seeds, scatter of seeds and tiles."""
    several = len({row.nuisance for row in result.curve}) > 1
    lmaxes = sorted({row.lmax for row in result.curve})
    rows = result.curve if several else sorted(result.curve, key=lambda row: row.lmax)
    name = {(row.lmax, row.nuisance): _name_of(row, several, len(lmaxes) > 1) for row in rows}
    place = np.arange(len(rows)) if several else np.array([row.lmax for row in rows])
    at = dict(zip(name, place, strict=True))
    fom, tiles, seeds = (  # a scatter is null for one tile or seed
        np.array([getattr(row, of) or 0.0 for row in rows]) for of in ("fom", "std_over_tiles", "std_over_seeds")
    )
    with figure(path, 6.4, 4.4) as drawn:
        axes = drawn.subplots()
        # Bars rather than a band: there may be one lmax alone.
        axes.errorbar(place, fom, tiles, fmt="none", ecolor=BLUE, elinewidth=8, alpha=0.2, label="scatter over tiles")
        mean = "o" if several else "o-"
        axes.errorbar(place, fom, seeds, fmt=mean, color=BLUE, capsize=4, label="mean and scatter over seeds")
        recalibrated = np.array([row.fom_recalibrated or np.nan for row in rows])
        kind = "recalibrated " if np.isfinite(recalibrated).any() else ""
        if kind:
            label = "recalibrated on fresh simulations"
            axes.plot(place, recalibrated, "s", mfc="none", color=GREY, zorder=4, label=label)
        runs = [point for point in result.points if "error" not in point]
        where = [at[point["lmax"], point["nuisance"]] for point in runs]
        axes.plot(where, [point["fom_fiducial_median"] for point in runs], ".", color=ORANGE, label="one run", zorder=3)
        axes.set_ylim(0, 1.25 * (fom + np.maximum(tiles, seeds)).max())
        axes.set_xticks(place, list(name.values()))
        axes.set(
            xlabel=f"nuisances, and {kind}FoM / FoM without any" if several else "lmax",
            ylabel=r"FoM of $(\Omega_{\rm m}, S_8)$",
        )
        alike = [f"lmax {lmaxes[0]}"] if len(lmaxes) == 1 else []
        alike += [f"nuisances {rows[0].nuisance}"] if not several and rows[0].nuisance != NONE else []
        axes.set_title(", ".join(["Fiducial tiles", result.noise_level, *alike]))
        axes.legend(loc="lower right")


def _name_of(row: CurvePoint, several: bool, with_lmax: bool) -> str:
    """A tick of the sweep's picture: nuisance, what is left of the FoM without any, and the lmax where they differ."""
    if not several:
        return str(row.lmax)
    left = row.to_bare if row.recalibrated_to_bare is None else row.recalibrated_to_bare
    ratio = "" if left is None or row.nuisance == NONE else f"\n{left:.2f}"
    return f"{row.nuisance}{ratio}" + (f"\n{row.lmax}" if with_lmax else "")


def draw_learning_curves(result: LearningCurves, path: Path) -> None:
    """Every run against its number of simulations, the fits, and twice as many; NLL left, FoM right, a row per lmax."""
    lmaxes = sorted({curve.lmax for curve in result.curves})
    style = {"both stages": (BLUE, "o"), "stage 2 alone": (ORANGE, "s")}
    with figure(path, 9.6, 3.8 * len(lmaxes)) as drawn:
        grid = drawn.subplots(len(lmaxes), 2, squeeze=False)
        for curve in result.curves:
            (left, right), (colour, marker) = grid[lmaxes.index(curve.lmax)], style[curve.stages]
            twice = 2 * max(curve.n_sims)
            n = np.geomspace(min(curve.n_sims), twice)
            left.plot(curve.n_sims, curve.nll_of_runs, marker, color=colour, ms=4, label=curve.stages)
            right.plot(curve.n_sims, curve.fom_of_runs, marker, color=colour, ms=4, label=curve.stages)
            if curve.nll and curve.fom:
                left.plot(n, curve.nll.at(n), color=colour, lw=1)
                right.plot(n, np.exp(curve.fom.at(n)), color=colour, lw=1)
                for axes, fit in ((left, curve.nll), (right, curve.fom)):
                    label = f"{twice} simulations, predicted"
                    bar = {"fmt": marker, "mfc": "white", "color": colour, "capsize": 4, "label": label}
                    axes.errorbar(twice, fit.at_twice, fit.at_twice_err, **bar)
            left.set(ylabel="NLL on fresh simulations [nats]", title=f"lmax {curve.lmax}, {result.noise_level}")
            right.set(ylabel=r"FoM of $(\Omega_{\rm m}, S_8)$", title="Fiducial tiles")
            for axes in (left, right):
                axes.set(xlabel="simulations", xscale="log")
                axes.set_xticks(ticks := sorted({*curve.n_sims, twice}), ticks)
                axes.minorticks_off()
                axes.legend(fontsize=8)
