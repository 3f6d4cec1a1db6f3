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
    audit, fiducial = result.audit, result.audit.fiducial
    same, across = audit.n_duplicates, audit.n_duplicates_across_sims
    print(f"{audit.n_tiles} tiles of {audit.n_sims} simulations, {result.elapsed_s:.0f} s")
    print(f"tiles       {result.folder}")
    print(f"duplicates  {same} tiles are the same pixels as another, {across} as one of another simulation")
    if audit.covered_patches is None:
        print("sky         unknown (--geometry)")
    else:
        print(f"sky         the tiles of a simulation cover that of {audit.covered_patches:.1f} tiles")
    for name, leak in audit.leakage.items():
        found = f"{leak.duplicates} ({leak.duplicates_fraction:.1%}) have a duplicate in an earlier split"
        if leak.duplicates_or_sky is not None:
            share = f"{leak.duplicates_or_sky} ({leak.duplicates_or_sky_fraction:.1%})"
            found += f", {share} a duplicate or most of their sky"
        print(f"{name:10}  of {leak.n_tiles} tiles {found}")
    if fiducial is None:
        print("fiducial    its simulation is not here")
    else:
        found = f"{len(fiducial.patch_of_tile)} tiles, {fiducial.n_patches} patches of sky"
        outside = f"outside these ranges of the others: {', '.join(fiducial.outside) or 'nothing'}"
        print(f"fiducial    simulation {fiducial.sim_id}: {found}; {outside}")
    for name, (low, high) in audit.ranges.items():
        print(f"{name:10}  {low:.4g} ... {high:.4g}")
    print(f"variance    {audit.n_variance_outliers or 'no'} tiles are far from the rest of their simulation")
    for o in audit.variance_outliers:
        print(f"            {tuple(o.key)}: {o.factor:.3g} times the median in bin {o.bin}, {o.sigma:+.1f} sigma")
    for warning in audit.warnings():
        warn(warning)


COMMAND = Command("check", CheckConfig, "data.check.check_tiles", report, machine="cpu")
main, app = COMMAND.main, COMMAND.modal_app()

if __name__ == "__main__":
    main()
