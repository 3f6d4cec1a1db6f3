"""Check a folder of tiles before training: what the splits share, odd tiles, the fiducial's place in the prior.

python run_check.py --lmax 200 --noise-level des_y3       here; leaves the cache that training reads
modal run run_check.py --lmax 200                         of tiles on the Modal Volume, same options
"""

from __future__ import annotations

from typing import Any

from common.command import Command
from common.errors import warn
from data.config import CheckConfig


def report(result: dict[str, Any]) -> None:
    """What the user waited for, and on stderr what should worry them."""
    covered, fiducial = result["covered_patches"], result["fiducial"]
    where = (
        "unknown (--geometry)" if covered is None else f"the tiles of a simulation cover that of {covered:.1f} tiles"
    )
    lines = [
        f"{result['n_tiles']} tiles of {result['n_sims']} simulations, {result['elapsed_s']:.0f} s",
        f"tiles       {result['folder']}",
        f"duplicates  {result['n_duplicates']} tiles are the same pixels as another, "
        f"{result['n_duplicates_across_sims']} as one of another simulation",
        f"sky         {where}",
    ]
    for name, leak in result["leakage"].items():
        line = (
            f"{name:10}  of {leak['n_tiles']} tiles {_share(leak, 'duplicates')} have a duplicate in an earlier split"
        )
        if covered is not None:
            line += f", {_share(leak, 'duplicates_or_sky')} a duplicate or most of their sky"
        lines.append(line)
    if fiducial is None:
        lines.append("fiducial    its simulation is not here")
    else:
        lines.append(
            f"fiducial    simulation {fiducial['sim_id']}: {len(fiducial['patch_of_tile'])} tiles, "
            f"{fiducial['n_patches']} patches of sky; outside these ranges of the others: "
            f"{', '.join(fiducial['outside']) or 'nothing'}"
        )
    lines += [f"{name:10}  {low:.4g} ... {high:.4g}" for name, (low, high) in result["ranges"].items()]
    lines.append(f"variance    {result['n_variance_outliers'] or 'no'} tiles are far from the rest of their simulation")
    lines += [
        f"            {tuple(o['key'])}: {o['factor']:.3g} times the median in bin {o['bin']}, {o['sigma']:+.1f} sigma"
        for o in result["variance_outliers"]
    ]
    print("\n".join(lines))
    for warning in result["warnings"]:
        warn(warning)


def _share(leak: dict[str, Any], kind: str) -> str:
    return f"{leak[kind]} ({leak[kind + '_fraction']:.1%})"


COMMAND = Command("check", CheckConfig, "data.check.check_tiles", report, machine="cpu")
main, app = COMMAND.main, COMMAND.modal_app()

if __name__ == "__main__":
    main()
