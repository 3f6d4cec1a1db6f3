"""Pictures of stage 1: predicted against true parameters; the loss curves, which stage 2 has too."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

from common.figures import BLUE, GREY, ORANGE, figure
from common.progress import read_metrics
from data.dataset import TileDataset
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


def draw_loss_curves(
    metrics_file: Path,
    path: Path,
    title: str,
    loss_name: str,
    *,
    train: tuple[str, str],
    validation: tuple[str, str],
    best_epoch: int,
    log: bool,
) -> None:
    """Training and validation loss per epoch from metrics.jsonl, with the epoch of the kept weights marked.

    Args:
        metrics_file, path: what is read, what is written.
        title, loss_name: of the picture and its vertical axis.
        train, validation: (name in metrics.jsonl, label in the legend).
        best_epoch: whose weights were kept.
        log: whether the vertical axis is logarithmic; it then has ticks at 1, 2, 5 times a power of ten.
    """
    metrics = read_metrics(metrics_file)
    epoch, train_loss, loss = metrics["epoch"], metrics[train[0]], metrics[validation[0]]
    best = int(np.flatnonzero(epoch == best_epoch)[0])
    with figure(path, 6.0, 3.8) as drawn:
        axes = drawn.subplots()
        axes.plot(epoch, train_loss, color=GREY, label=train[1])
        axes.plot(epoch, loss, color=BLUE, label=validation[1])
        axes.plot(
            epoch[best], loss[best], "o", color=ORANGE, label=f"best: {loss[best]:.4f} in epoch {epoch[best]:.0f}"
        )
        axes.set(xlabel="epoch", ylabel=loss_name, title=title)
        if log:
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
            axes.yaxis.set_minor_formatter(NullFormatter())
        axes.legend()
