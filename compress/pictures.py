"""Picture of stage 1: predicted against true parameters."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from common.figures import BLUE, ORANGE, figure
from data.module import TileDataset
from data.norm_stats import NormStats

LABELS = (r"$\Omega_{\rm m}$", r"$S_8$")


def draw_predictions(splits: dict[str, tuple[TileDataset, torch.Tensor]], norm_stats: NormStats, path: Path) -> None:
    """Predicted against true Omega_m and S8, one row per split, in physical units.

    Args:
        splits: name -> (data set, predicted normalised theta (n, 2)).
    """
    with figure(path, 7.6, 3.7 * len(splits)) as drawn:
        grid = drawn.subplots(len(splits), len(LABELS), squeeze=False)
        for row, (name, (dataset, predicted)) in zip(grid, splits.items(), strict=True):
            true = norm_stats.physical_theta(dataset.theta[dataset.rows].numpy())  # (n, 2)
            estimate = norm_stats.physical_theta(predicted.numpy())  # (n, 2)
            for k, axes in enumerate(row):
                lower, upper = true[:, k].min(), true[:, k].max()
                rms = np.sqrt(np.mean((estimate[:, k] - true[:, k]) ** 2))
                axes.plot([lower, upper], [lower, upper], color=ORANGE, lw=1.2)
                axes.plot(true[:, k], estimate[:, k], ".", color=BLUE, ms=3, alpha=0.35, mew=0, rasterized=True)
                axes.set(
                    xlabel=f"true {LABELS[k]}",
                    ylabel=f"predicted {LABELS[k]}",
                    xlim=(lower, upper),
                    ylim=(lower, upper),
                )
                axes.set_title(f"{name}, {len(true)} tiles: rms error {rms:.3f}")
                axes.set_aspect("equal")
