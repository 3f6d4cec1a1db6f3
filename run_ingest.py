"""Make tiles from simulated lightcones or from full-sky convergence maps.

python run_ingest.py --lightcones DIR --params gower_street_runs.csv --nz nz.txt --lmax 200    here, all cores
modal run run_ingest.py --lightcones URL ...            on Modal, a container per simulation, onto the Volume
"""

from typing import Any

from common.command import Command
from common.errors import UserError
from data.ingest.config import IngestConfig


def report(result: dict[str, Any]) -> None:
    """What the user waited for."""
    print(f"{result['n_sims']} simulations, {result['n_tiles']} tiles in each folder, {result['elapsed_s']:.0f} s")
    if not result["n_sims"]:
        raise UserError(f"no simulation could be used; the reasons are above and in {result['folders'][0]}/ingest.json")
    for folder in result["folders"]:
        print(f"tiles     {folder}\npicture   {folder}/suite.png")
    if result["left_out"]:
        print(f"left out  {len(result['left_out'])} simulations; reasons in {result['folders'][0]}/ingest.json")


PLAN, SIDE_BY_SIDE = "data.ingest.suite.plan", "data.ingest.suite.ingest_side_by_side"
COMMAND = Command("ingest", IngestConfig, "data.ingest.suite.run_ingest", report, "small", PLAN, SIDE_BY_SIDE)
main, app = COMMAND.main, COMMAND.modal_app()

if __name__ == "__main__":
    main()
