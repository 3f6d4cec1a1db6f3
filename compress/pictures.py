"""Pictures of stage 1: predicted against true parameters; the loss curves, which stage 2 has too."""

from pathlib import Path

import numpy as np
import torch
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, StrMethodFormatter

from common.figures import BLUE, GREY, ORANGE, figure
from common.progress import METRICS_NAME, read_metrics
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


def draw_loss_curves(folder: Path, title: str, curves: dict[str, str], best_epoch: int, *, log: bool = False) -> None:
    """Losses per epoch from metrics.jsonl of a run's folder: loss_curves.png, the epoch of the kept weights marked.

    Args:
        folder, title: of the run and the picture.
        curves: label by name in metrics.jsonl, of the training loss and of the validation loss.
        best_epoch: whose weights were kept.
        log: whether the vertical axis is logarithmic; it then has ticks at 1, 2, 5 times a power of ten.
    """
    metrics = read_metrics(folder / METRICS_NAME)
    epoch, (train, validation) = metrics["epoch"], (metrics[name] for name in curves)
    best = int(np.flatnonzero(epoch == best_epoch)[0])
    with figure(folder / "loss_curves.png", 6.0, 3.8) as drawn:
        axes = drawn.subplots()
        for values, colour, label in zip((train, validation), (GREY, BLUE), curves.values(), strict=True):
            axes.plot(epoch, values, color=colour, label=label)
        marked = f"best: {validation[best]:.4f} in epoch {best_epoch}"
        axes.plot(best_epoch, validation[best], "o", color=ORANGE, label=marked)
        axes.set(xlabel="epoch", title=title)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        if log:
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
            axes.yaxis.set_minor_formatter(NullFormatter())
        axes.legend()
