"""Both stages for several lmax, nuisances and seeds: the Figure of Merit of each, or against the number of simulations.

python run_sweep.py --lmax 200,400,600 --seeds 3               here, one after the other
modal run --detach run_sweep.py --lmax 200,400,600 --seeds 3   on Modal, side by side, a container for every point
python run_sweep.py --lmax 200 --nuisance none,m,dz,ia,all      what a survey's nuisances cost
python run_sweep.py --lmax 200 --n-sims 100,200,400,791 --stage-2 "--calibration-tiles DIR"
"""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from common.artifacts import NONE
from common.command import Command
from common.errors import UserError
from npe.config import SweepConfig

if TYPE_CHECKING:  # it needs torch, and --help does not
    from npe.result import CurvePoint, FomResult, LearningCurve, LearningCurves, SweepResult


HEADER = "lmax  nuisances        FoM  +- seeds  +- tiles  mixture  chi2/dof  / bare           recalibrated  / bare"


def report(result: SweepResult | LearningCurves | FomResult | list[str]) -> None:
    """What the user waited for."""
    if isinstance(result, list):
        print("\n".join(result))
    elif hasattr(result, "points"):
        report_curve(cast("SweepResult | LearningCurves", result))
    else:
        print(f"FoM {result.fom_fiducial_median:.0f}, {result.folder}; the command without --point makes the curve")


def report_curve(result: SweepResult | LearningCurves) -> None:
    """The table of a sweep, or what twice as many simulations would give."""
    if curve := getattr(result, "curve", []):
        print("FoM of (Omega_m, S8), mean over seeds; +- its scatter over seeds and over tiles; / bare its mean ratio")
        print("to the run of the same seed without nuisances, +- the error of that mean")
        print(HEADER)
        for point in curve:
            print(row_of(point))
    for curve in getattr(result, "curves", []):
        print(f"lmax {curve.lmax:5d}  {curve.stages}: {twice_as_many(curve)}")
    for point in result.points:
        if "error" in point:
            print(f"failed    {point['tag']}: {point['error']}")
    name = "fom_vs_lmax" if hasattr(result, "curve") else "learning_curve"
    print(f"picture   {result.folder}/{name}.png\nall       {result.folder}/{name}.json")
    if result.failed:
        raise UserError(f"{len(result.failed)} of {len(result.points)} points failed, for the reasons above")


def row_of(point: CurvePoint) -> str:
    """A row of the table of the FoMs."""
    seeds, tiles = ("" if one is None else f"{one:.0f}" for one in (point.std_over_seeds, point.std_over_tiles))
    fom = f"{point.lmax:4d}  {point.nuisance:9s}  {point.fom:9.0f}  {seeds:>8s}  {tiles:>8s}  {point.mixture_fom:7.0f}"
    bare = ratio(point.nuisance, point.to_bare, point.to_bare_err)
    if point.nuisance != NONE and point.to_bare is None:
        bare = "no bare run; add none to --nuisance"
    fom += f"  {point.chi2_per_dof_of_fom:8.2f}  {bare:15s}"
    if point.fom_recalibrated is not None:
        wide = ratio(point.nuisance, point.recalibrated_to_bare, point.recalibrated_to_bare_err)
        fom += f"  {point.fom_recalibrated:12.0f}  {wide}"
    return fom.rstrip()


def ratio(nuisance: str, value: float | None, error: float | None) -> str:
    """What is left of the FoM without nuisances, where there are any."""
    if nuisance == NONE or value is None:
        return ""
    return f"{value:.3f}" if error is None else f"{value:.3f} +- {error:.3f}"


def twice_as_many(curve: LearningCurve) -> str:
    """What twice as many simulations would give, in words."""
    fom, nll = curve.fom, curve.nll
    if fom is None or nll is None:
        return f"no curve, since {len(set(curve.n_sims))} numbers of simulations have a run that succeeded"
    now = f"{fom.at_largest:.0f} +- {fom.at_largest_err:.0f}"
    merit = f"FoM {fom.at_twice:.0f} +- {fom.at_twice_err:.0f} instead of {now}"
    change = f"NLL {'lower' if nll.gain < 0 else 'higher'} by {abs(nll.gain):.3f} +- {nll.gain_err:.3f} nats"
    return f"twice as many simulations ({2 * max(curve.n_sims)}): {merit}, {change}"


COMMAND = Command("sweep", SweepConfig, "npe.sweep.run_sweep", report, side_by_side="npe.sweep.sweep_side_by_side")
main, app = COMMAND.main, COMMAND.modal_app()

if __name__ == "__main__":
    main()
