"""Picture of stage 1: predicted against true parameters."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from data.dataset import TileDataset

from common.figures import BLUE, ORANGE, figure
from data.norm_stats import NormStats
from data.schema import label_of


def draw_predictions(
    splits: dict[str, tuple[TileDataset, torch.Tensor]], params: tuple[str, ...], norm_stats: NormStats, path: Path
) -> None:
    """Predicted against true parameters in physical units, one row per split.

    Args:
        splits: name -> (data set, predicted normalised theta (n, n_params)).
        params: names of the parameters.
        norm_stats: of the run.
        path: of the picture.
    """
    with figure(path, 3.8 * len(params), 3.7 * len(splits)) as drawn:
        grid = drawn.subplots(len(splits), len(params), squeeze=False)
        for row, (name, (dataset, predicted)) in zip(grid, splits.items(), strict=True):
            true = norm_stats.physical_theta(dataset.theta[dataset.rows].numpy())  # (n, n_params)
            estimate = norm_stats.physical_theta(predicted.numpy())  # (n, n_params)
            for k, axes in enumerate(row):
                label, lower, upper = label_of(params[k]), true[:, k].min(), true[:, k].max()
                rms = np.sqrt(np.mean((estimate[:, k] - true[:, k]) ** 2))
                axes.plot([lower, upper], [lower, upper], color=ORANGE, lw=1.2)
                axes.plot(true[:, k], estimate[:, k], ".", color=BLUE, ms=3, alpha=0.35, mew=0, rasterized=True)
                axes.set(xlabel=f"true {label}", ylabel=f"predicted {label}", xlim=(lower, upper), ylim=(lower, upper))
                axes.set_title(f"{name}, {len(true)} tiles: rms error {rms:.3f}")
                axes.set_aspect("equal")
