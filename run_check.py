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
        f"twins       {result['n_twins']} tiles are the same pixels as another, "
        f"{result['n_twins_across_sims']} as one of another simulation",
        f"sky         {where}",
    ]
    for name, partners in result["partners"].items():
        line = f"{name:10}  of {partners['n_tiles']} tiles {_share(partners, 'twin')} have a twin in an earlier split"
        lines.append(
            line if covered is None else f"{line}, {_share(partners, 'twin_or_sky')} a twin or most of their sky"
        )
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


def _share(partners: dict[str, Any], kind: str) -> str:
    return f"{partners[kind]} ({partners[kind + '_fraction']:.1%})"


COMMAND = Command("check", CheckConfig, "data.check.check_tiles", report, machine="cpu")
main, app = COMMAND.main, COMMAND.modal_app()

if __name__ == "__main__":
    main()
