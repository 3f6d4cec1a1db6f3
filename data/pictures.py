"""A picture of a suite: one tile, bin by bin, and the cosmologies."""

from pathlib import Path

import numpy as np

from common.figures import BLUE, ORANGE, figure
from data.schema import FOM_PARAMS, label_of
from data.shard import opened


def draw_suite(shard: Path, theta: np.ndarray, fiducial: np.ndarray | None, path: Path) -> None:
    """The first tile of a shard in the compact layout, beside (Omega_m, S8) of every simulation (n_sims, 2).

    The fiducial's (2,) become a star.
    """
    with opened(shard) as file:
        column = next(file.iter_batches(1, columns=["kappa"])).column(0)
    n_bins, nside = column.type.list_size, column.type.value_type.list_size
    kappa = column.flatten().flatten().flatten().to_numpy().reshape(n_bins, nside, nside)
    limit = 3 * float(kappa.std())
    with figure(path, 2.6 * (n_bins + 1), 3.0) as drawn:
        *maps, plane = drawn.subplots(1, n_bins + 1, width_ratios=[1] * n_bins + [1.15])
        for number, (axes, tile) in enumerate(zip(maps, kappa, strict=True), start=1):
            shown = axes.imshow(tile, origin="lower", cmap="RdBu_r", vmin=-limit, vmax=limit, interpolation="none")
            axes.set(xticks=[], yticks=[], title=f"bin {number}")
        drawn.colorbar(shown, ax=maps, label=r"$\kappa$", shrink=0.85, pad=0.01)
        plane.plot(*theta.T, ".", color=BLUE, ms=3, label=f"{len(theta)} simulations")
        if fiducial is not None:
            plane.plot(*fiducial, "*", color=ORANGE, ms=12, mec="white", label="fiducial")
        plane.set(xlabel=label_of(FOM_PARAMS[0]), ylabel=label_of(FOM_PARAMS[1]), ylim=(None, 1.12))
        plane.legend(loc="upper center", ncols=2, fontsize=8, handletextpad=0.2, columnspacing=1)
