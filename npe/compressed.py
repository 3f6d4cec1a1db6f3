"""Tiles seen through the frozen compressor, compressed anew at every access."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from common.device import to_device
from compress.model import FieldLevelCompressor
from data.dataset import TileDataset, batches
from data.module import SplitTiles

TILES_IN_CACHE = 64  # on a CPU: what was just gathered is then still near when it is compressed


class CompressedTileDataset:
    """(compressed_summary (d,), theta (d,)) of each tile of a TileDataset, on its device.

    If the tiles are augmented, every access gives a new summary. `__getitems__` compresses a whole batch in one forward
    pass, on a CPU in a few.
    """

    def __init__(self, tiles: TileDataset, compressor: FieldLevelCompressor) -> None:
        self.tiles = tiles
        self.compressor = compressor.eval().requires_grad_(False)

    def __len__(self) -> int:
        return len(self.tiles)

    def prefetch(self, positions: torch.Tensor) -> None:
        """Say which batch is asked for next."""
        self.tiles.prefetch(positions)

    def __getitems__(self, positions: Sequence[int] | torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        size = TILES_IN_CACHE if self.tiles.device.type == "cpu" else len(positions)
        parts = [(self.compress(kappa), theta) for kappa, theta in self.tiles.in_parts(positions, size)]
        summary, theta = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
        return summary, theta  # (B, d), (B, d)

    @torch.no_grad()
    def compress(self, kappa: torch.Tensor) -> torch.Tensor:
        """Tiles (B, n_bins, N, N) to summaries (B, d)."""
        return self.compressor(kappa)

    def __getitem__(self, position: int) -> tuple[torch.Tensor, torch.Tensor]:
        summary, theta = self.__getitems__([position])
        return summary[0], theta[0]


@dataclass(frozen=True)
class WeightedDataset:
    """Compressed tiles with the weights (n, n_members) that they have in the loss of each member."""

    dataset: CompressedTileDataset
    weight: torch.Tensor

    def __len__(self) -> int:
        return len(self.dataset)

    def prefetch(self, positions: torch.Tensor) -> None:
        """Say which batch is asked for next."""
        self.dataset.prefetch(positions)

    def __getitems__(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        summary, theta = self.dataset.__getitems__(positions)
        (weight,) = to_device([self.weight[positions]], theta.device)  # (B, n_members)
        return summary, theta, weight


def compress_all(dataset: CompressedTileDataset, batch_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Every tile once, in order: summaries (n, d) and theta (n, d)."""
    summaries, thetas = zip(*batches(dataset, batch_size), strict=True)
    return torch.cat(summaries), torch.cat(thetas)


class CompressedTileDataModule:
    """The splits of stage 2: train_ds (NPE split, augmented), val_ds (test split), fiducial_ds."""

    def __init__(self, data: SplitTiles, compressor: FieldLevelCompressor, augment: torch.Generator) -> None:
        self.augment, self.n_params = augment, data.test_ds.theta.shape[1]
        self.train_ds = CompressedTileDataset(data.npe_train_ds.augmented(augment), compressor)
        self.val_ds = CompressedTileDataset(data.test_ds, compressor)
        self.fiducial_ds = CompressedTileDataset(data.fiducial_ds, compressor)
        self.train_sims, self.val_sims = data.npe_train_ds.sim_ids, data.test_ds.sim_ids
