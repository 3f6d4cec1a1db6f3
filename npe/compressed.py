"""Tiles seen through the frozen compressor, compressed anew at every access."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from compress.model import FieldLevelCompressor
from data.module import TileDataModule, TileDataset, batch_positions


class CompressedTileDataset:
    """(compressed_summary (2,), theta (2,)) of each tile of a TileDataset, on its device.

    The tile is augmented before compression if the tile data set is, so every access gives a new
    summary. `__getitems__` compresses a whole batch in one forward pass.
    """

    def __init__(self, tiles: TileDataset, compressor: FieldLevelCompressor) -> None:
        self.tiles = tiles
        self.compressor = compressor.eval().requires_grad_(False)

    def __len__(self) -> int:
        return len(self.tiles)

    @torch.no_grad()
    def __getitems__(self, positions: Sequence[int] | torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        kappa, theta = self.tiles.__getitems__(positions)  # (B, 4, N, N), (B, 2)
        return self.compressor(kappa), theta  # (B, 2), (B, 2)

    def __getitem__(self, position: int) -> tuple[torch.Tensor, torch.Tensor]:
        summary, theta = self.__getitems__([position])
        return summary[0], theta[0]


def compressed_batches(
    dataset: CompressedTileDataset, batch_size: int, shuffle: torch.Generator | None = None
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """One epoch of (summary (B, 2), theta (B, 2))."""
    for positions in batch_positions(len(dataset), batch_size, shuffle):
        yield dataset.__getitems__(positions)


def compress_all(dataset: CompressedTileDataset, batch_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Every tile once, in order: summaries (n, 2) and theta (n, 2)."""
    summaries, thetas = zip(*compressed_batches(dataset, batch_size), strict=True)
    return torch.cat(summaries), torch.cat(thetas)


class CompressedTileDataModule:
    """The splits of stage 2: train_ds (NPE split, augmented), val_ds (test split), fiducial_ds."""

    def __init__(self, data: TileDataModule, compressor: FieldLevelCompressor, augment: torch.Generator) -> None:
        self.train_ds = CompressedTileDataset(data.npe_train_ds.augmented(augment), compressor)
        self.val_ds = CompressedTileDataset(data.test_ds, compressor)
        self.fiducial_ds = CompressedTileDataset(data.fiducial_ds, compressor)
