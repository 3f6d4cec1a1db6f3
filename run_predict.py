"""Answer single tiles: posterior, samples, and whether they look like the training suite.

python run_predict.py --run results/field_npe_runs/<tag> --tiles FILE       here
modal run run_predict.py --run results/field_npe_runs/<tag> --tiles FILE    on Modal, FILE on the Volume
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from common.command import Command
from npe.config import PredictConfig

if TYPE_CHECKING:  # it needs torch, and --help does not
    from npe.predict import PredictResult

SHOWN = 12  # tiles, at the most


def report(result: PredictResult) -> None:
    """What the user waited for."""
    tiles, folder = result.predictions, result.folder
    for tile in tiles[:SHOWN]:
        parts = zip(result.theta, tile.mu, tile.sigma, strict=True)
        values = ", ".join(f"{name} {mu:.3f} +- {sigma:.3f}" for name, mu, sigma in parts)
        print(f"tile {tile.tile}: {values}, FoM {tile.fom:.0f}, {tile.verdict}")
    if len(tiles) > SHOWN:
        print(f"... and {len(tiles) - SHOWN} more")
    print(
        f"flagged   {result.n_out_of_distribution} of {len(tiles)} tiles as out of distribution (1 in 100 ordinary "
        "ones is)\n"
        f"picture   {folder}/predictions.png\n"
        f"all       {folder}/predict.json"
    )
    if result.config["n_samples"]:
        print(f'samples   getdist.loadMCSamples("{folder}/tile_0000")')


COMMAND = Command("predict", PredictConfig, "npe.predict.predict_tiles", report, machine="cpu")
main, app = COMMAND.main, COMMAND.modal_app()

if __name__ == "__main__":
    main()
