"""Both stages for several lmax and seeds: the Figure of Merit against lmax.

python run_sweep.py --lmax 200,400,600 --seeds 3               here, one after the other
modal run --detach run_sweep.py --lmax 200,400,600 --seeds 3   on Modal, side by side, a container for every point
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from common.command import Command
from npe.config import SweepConfig

if TYPE_CHECKING:  # it needs torch, and --help does not
    from npe.result import SweepResult


def report(result: SweepResult) -> None:
    """What the user waited for."""
    for row in result.curve:
        seeds = "" if row.std_over_seeds is None else f"+- {row.std_over_seeds:.0f} over {row.n_seeds} seeds, "
        tiles = "" if row.std_over_tiles is None else f"+- {row.std_over_tiles:.0f} over tiles, "
        mixture = "" if row.n_seeds == 1 else f"mixture of the seeds {row.mixture_fom:.0f}"
        print(f"lmax {row.lmax:5d}  FoM {row.fom:.0f}  {seeds}{tiles}{mixture}".rstrip(" ,"))
    for point in result.points:
        if "error" in point:
            print(f"failed    {point['tag']}: {point['error']}")
    print(f"picture   {result.folder}/fom_vs_lmax.png\nall       {result.folder}/fom_vs_lmax.json")


COMMAND = Command("sweep", SweepConfig, "npe.sweep.run_sweep", report, side_by_side="npe.sweep.sweep_side_by_side")
main, app = COMMAND.main, COMMAND.modal_app()

if __name__ == "__main__":
    main()
