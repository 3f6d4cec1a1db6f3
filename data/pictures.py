"""A picture of a suite: one tile in its four bins, and the cosmologies."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from common.figures import BLUE, ORANGE, figure
from data.schema import N_BINS


def draw_suite(shard: Path, nside: int, theta: np.ndarray, fiducial: np.ndarray | None, path: Path) -> None:
    """The first tile of a shard, bin by bin, beside the suite's cosmologies.

    Args:
        shard: of the compact layout.
        nside: pixels per side of its tiles.
        theta: (Omega_m, S8) of every simulation, (n_sims, 2).
        fiducial: (2,), if there is one.
        path: of the picture.
    """
    column = next(pq.ParquetFile(shard, pre_buffer=False).iter_batches(1, columns=["kappa"])).column(0)
    kappa = column.flatten().flatten().flatten().to_numpy().reshape(N_BINS, nside, nside)
    limit = 3 * float(kappa.std())
    with figure(path, 13.0, 3.0) as drawn:
        *maps, plane = drawn.subplots(1, N_BINS + 1, width_ratios=[1] * N_BINS + [1.15])
        for number, (axes, tile) in enumerate(zip(maps, kappa, strict=True), start=1):
            shown = axes.imshow(tile, origin="lower", cmap="RdBu_r", vmin=-limit, vmax=limit, interpolation="none")
            axes.set(xticks=[], yticks=[], title=f"bin {number}")
        drawn.colorbar(shown, ax=maps, label=r"$\kappa$", shrink=0.85, pad=0.01)
        plane.plot(*theta.T, ".", color=BLUE, ms=3, label=f"{len(theta)} simulations")
        if fiducial is not None:
            plane.plot(*fiducial, "*", color=ORANGE, ms=12, mec="white", label="fiducial")
        plane.set(xlabel=r"$\Omega_{\rm m}$", ylabel=r"$S_8$", ylim=(None, 1.12))
        plane.legend(loc="upper center", ncols=2, fontsize=8, handletextpad=0.2, columnspacing=1)
