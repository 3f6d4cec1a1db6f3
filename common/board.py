"""--tensorboard: the curves, pictures and hyperparameters of a training, as TensorBoard reads them."""

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from matplotlib.image import imread

from common.errors import UserError

if TYPE_CHECKING:
    from torch.utils.tensorboard.writer import SummaryWriter

BOARD = "tensorboard"  # folder in that of a run


class Board:
    """Writes while a training goes on; nothing if it is not wanted."""

    def __init__(self, folder: Path, wanted: bool) -> None:
        """Raises UserError if it is wanted and the package is missing."""
        self.folder, self.wanted = folder / BOARD, wanted
        self.writer: SummaryWriter | None = None
        if wanted:
            try:
                import torch.utils.tensorboard  # noqa: F401
            except ImportError:
                cure = "pip install -r requirements-tensorboard.txt"
                raise UserError(f"--tensorboard needs a package that is not installed; {cure}") from None

    def begin(self, metrics: Sequence[Mapping[str, Any]]) -> None:
        """Start over with the epochs that are done; those that a resumed training repeats must not stand twice."""
        if self.wanted:
            from torch.utils.tensorboard.writer import SummaryWriter

            shutil.rmtree(self.folder, ignore_errors=True)
            self.writer = SummaryWriter(str(self.folder))
            for of_epoch in metrics:
                self.add(of_epoch)

    def add(self, metrics: Mapping[str, Any]) -> None:
        """What was measured in an epoch."""
        if self.writer is not None:
            for name, value in metrics.items():
                if name != "epoch":
                    self.writer.add_scalar(name, value, metrics["epoch"])
            self.writer.flush()

    def end(self, options: Mapping[str, Any], found: Mapping[str, float]) -> None:
        """The pictures that now lie in the run's folder, and its options beside what they led to."""
        if self.writer is not None:
            for picture in sorted(self.folder.parent.glob("*.png")):
                self.writer.add_image(picture.stem, imread(picture), dataformats="HWC")  # (height, width, RGBA)
            results = {f"result/{name}": value for name, value in found.items()}  # a curve has the plain name
            self.writer.add_hparams(dict(options), results, run_name=".")
            self.writer.close()
