"""Check a folder of tiles before training: what the splits share, odd tiles, the fiducial's place in the prior.

python run_check.py --lmax 200 --noise-level des_y3       here; leaves the cache that training reads
modal run run_check.py --lmax 200                         of tiles on the Modal Volume, same options
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from common.command import Command
from common.errors import warn
from data.config import CheckConfig

if TYPE_CHECKING:  # it needs pyarrow, and --help does not
    from data.check import CheckResult


def report(result: CheckResult) -> None:
    """What the user waited for, and on stderr what should worry them."""
    audit = result.audit
    covered, fiducial = audit.covered_patches, audit.fiducial
    where = (
        "unknown (--geometry)" if covered is None else f"the tiles of a simulation cover that of {covered:.1f} tiles"
    )
    lines = [
        f"{audit.n_tiles} tiles of {audit.n_sims} simulations, {result.elapsed_s:.0f} s",
        f"tiles       {result.folder}",
        f"duplicates  {audit.n_duplicates} tiles are the same pixels as another, "
        f"{audit.n_duplicates_across_sims} as one of another simulation",
        f"sky         {where}",
    ]
    for name, leak in audit.leakage.items():
        line = (
            f"{name:10}  of {leak.n_tiles} tiles {leak.duplicates} ({leak.duplicates_fraction:.1%}) have a duplicate "
            "in an earlier split"
        )
        if leak.duplicates_or_sky is not None:
            line += (
                f", {leak.duplicates_or_sky} ({leak.duplicates_or_sky_fraction:.1%}) a duplicate or most of their sky"
            )
        lines.append(line)
    if fiducial is None:
        lines.append("fiducial    its simulation is not here")
    else:
        lines.append(
            f"fiducial    simulation {fiducial.sim_id}: {len(fiducial.patch_of_tile)} tiles, {fiducial.n_patches} "
            f"patches of sky; outside these ranges of the others: {', '.join(fiducial.outside) or 'nothing'}"
        )
    lines += [f"{name:10}  {low:.4g} ... {high:.4g}" for name, (low, high) in audit.ranges.items()]
    lines.append(f"variance    {audit.n_variance_outliers or 'no'} tiles are far from the rest of their simulation")
    lines += [
        f"            {tuple(o.key)}: {o.factor:.3g} times the median in bin {o.bin}, {o.sigma:+.1f} sigma"
        for o in audit.variance_outliers
    ]
    print("\n".join(lines))
    for warning in audit.warnings():
        warn(warning)


COMMAND = Command("check", CheckConfig, "data.check.check_tiles", report, machine="cpu")
main, app = COMMAND.main, COMMAND.modal_app()

if __name__ == "__main__":
    main()
