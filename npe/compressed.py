"""Tiles seen through the frozen compressor, compressed anew at every access."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields

import torch

from compress.model import FieldLevelCompressor
from data.augment import Symmetries, fixed_views, gather_augmented
from data.module import TileDataModule, TileDataset, batches

TILES_IN_CACHE = 64  # on a CPU: what was just gathered is then still near when it is compressed


class CompressedTileDataset:
    """(compressed_summary (2,), theta (2,)) of each tile of a TileDataset, on its device.

    The tile is augmented before compression if the tile data set is, so every access gives a new
    summary. `__getitems__` compresses a whole batch in one forward pass per view, on a CPU in a few.
    """

    def __init__(self, tiles: TileDataset, compressor: FieldLevelCompressor, n_views: int = 1) -> None:
        self.tiles, self.n_views = tiles, n_views
        self.compressor = compressor.eval().requires_grad_(False)

    def __len__(self) -> int:
        return len(self.tiles)

    def prefetch(self, positions: torch.Tensor) -> None:
        """Say which batch is asked for next."""
        self.tiles.prefetch(positions)

    @torch.no_grad()
    def __getitems__(self, positions: Sequence[int] | torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        size = TILES_IN_CACHE if self.tiles.device.type == "cpu" else len(positions)
        parts = [(self.compress(kappa), theta) for kappa, theta in self.tiles.in_parts(positions, size)]
        summary, theta = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
        return summary, theta  # (B, 2), (B, 2)

    @torch.no_grad()
    def compress(self, kappa: torch.Tensor) -> torch.Tensor:
        """Tiles (B, 4, N, N) to summaries (B, 2), the mean over the fixed views of each.

        The network is only roughly blind to turns and rolls; what they do to a summary is noise that a mean
        over views reduces.
        """
        summary = self.compressor(kappa)  # (B, 2), the first view
        rows, views = torch.arange(len(kappa)), fixed_views(self.n_views, kappa.shape[-1])
        for k in range(1, self.n_views):
            one = Symmetries(*(getattr(views, f.name)[k].expand(len(rows)) for f in fields(Symmetries)))  # (B,) each
            summary = summary + self.compressor(gather_augmented(kappa, rows, one))
        return summary / self.n_views

    def __getitem__(self, position: int) -> tuple[torch.Tensor, torch.Tensor]:
        summary, theta = self.__getitems__([position])
        return summary[0], theta[0]


def compress_all(dataset: CompressedTileDataset, batch_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Every tile once, in order: summaries (n, 2) and theta (n, 2)."""
    summaries, thetas = zip(*batches(dataset, batch_size), strict=True)
    return torch.cat(summaries), torch.cat(thetas)


class CompressedTileDataModule:
    """The splits of stage 2: train_ds (NPE split, augmented), val_ds (test split), fiducial_ds."""

    def __init__(
        self, data: TileDataModule, compressor: FieldLevelCompressor, augment: torch.Generator, n_views: int = 1
    ) -> None:
        self.train_ds = CompressedTileDataset(data.npe_train_ds.augmented(augment), compressor, n_views)
        self.val_ds = CompressedTileDataset(data.test_ds, compressor, n_views)
        self.fiducial_ds = CompressedTileDataset(data.fiducial_ds, compressor, n_views)
