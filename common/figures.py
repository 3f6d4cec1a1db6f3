"""One look for all pictures, a way to save them whole, and the loss curves of both stages."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

from common.artifacts import atomic_path
from common.interrupt import deferred
from common.progress import read_metrics

BLUE, ORANGE, GREY = "#2a6f97", "#d1603d", "#8a8f98"
STYLE: Any = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "legend.frameon": False,
    "savefig.dpi": 160,
}


@contextmanager
def figure(path: Path, width: float, height: float) -> Iterator[Figure]:
    """A figure of width x height inches that is saved as PNG when the block ends well; needs no display.

    A signal waits until then: matplotlib's parsers, interrupted, complain after the command's last word.
    """
    with deferred(), mpl.rc_context(STYLE):
        drawn = Figure(figsize=(width, height), layout="constrained")
        FigureCanvasAgg(drawn)
        yield drawn
        with atomic_path(path) as temporary:
            drawn.savefig(temporary, format="png")


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
