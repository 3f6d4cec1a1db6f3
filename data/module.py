"""TileDataModule: the tiles of a survey, split, normalised, on the device, in batches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

from common.config import SplitBy, TileGeometry
from data.audit import Audit, audit_tiles
from data.augment import draw_symmetries, gather_augmented
from data.cache import read_tiles_through_cache
from data.norm_stats import NormStats, compute_norm_stats
from data.shards import Tiles, read_orientations
from data.split import SPLIT_NAMES, SplitManifest, make_manifest, split_indices

GPU_MEMORY_SHARE = 0.6  # of the free memory may go to the tiles; above it they stay in host memory


class TileDataset:
    """Normalised tiles of one split with their normalised theta.

    `ds[i]` is (kappa (4, N, N), theta (2,)); `ds[[i, j, ...]]` by way of `__getitems__` is a whole
    batch (kappa (B, 4, N, N) channels_last, theta (B, 2)). With an augmentation generator every
    access draws a new symmetry and roll per tile.
    """

    def __init__(
        self,
        store: torch.Tensor,
        theta: torch.Tensor,
        rows: np.ndarray,
        device: torch.device,
        augment: torch.Generator | None = None,
    ) -> None:
        self.store, self.theta, self.device, self.augment = store, theta, device, augment
        self.rows = torch.from_numpy(rows)

    def __len__(self) -> int:
        return len(self.rows)

    def augmented(self, generator: torch.Generator) -> TileDataset:
        """The same tiles, augmented with draws from `generator`."""
        return TileDataset(self.store, self.theta, self.rows.numpy(), self.device, generator)

    def __getitems__(self, positions: Sequence[int] | torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        rows = self.rows[torch.as_tensor(positions)]  # (B,)
        if self.augment is None:
            kappa = self.store.permute(0, 2, 3, 1)[rows.to(self.store.device)].permute(0, 3, 1, 2)  # (B, 4, N, N)
        else:
            symmetries = draw_symmetries(len(rows), self.store.shape[-1], self.augment)
            kappa = gather_augmented(self.store, rows, symmetries)
        theta = self.theta[rows]
        return kappa.to(self.device, non_blocking=True), theta.to(self.device, non_blocking=True)

    def __getitem__(self, position: int) -> tuple[torch.Tensor, torch.Tensor]:
        kappa, theta = self.__getitems__([position])
        return kappa[0], theta[0]


def batch_positions(n: int, batch_size: int, shuffle: torch.Generator | None) -> list[torch.Tensor]:
    """Cut 0..n-1, shuffled if a generator is given, into ceil(n / batch_size) batches of nearly equal size.

    Nearly equal, because a last batch of a few tiles would give BatchNorm useless statistics.
    """
    order = torch.arange(n) if shuffle is None else torch.randperm(n, generator=shuffle)
    return list(order.tensor_split(n_batches(n, batch_size)))


def n_batches(n: int, batch_size: int) -> int:
    """Batches per epoch."""
    return -(-n // batch_size)


def batches(
    dataset: TileDataset, batch_size: int, shuffle: torch.Generator | None = None
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """One epoch of (kappa (B, 4, N, N), theta (B, 2)) on the device."""
    for positions in batch_positions(len(dataset), batch_size, shuffle):
        yield dataset.__getitems__(positions)


class TileDataModule:
    """Reads the tiles, splits and normalises them.

    Without a manifest and norm stats, `setup()` makes them (stage 1); with those of a stage-1 run it
    uses them and refuses tiles that do not fit (stage 2).

    Attributes, after setup():
        manifest, norm_stats: as made or given.
        audit: what the splits share, and more.
        tiles: the data set. Its kappa is normalised in place.
        compressor_train_ds, npe_train_ds, test_ds, fiducial_ds: one TileDataset per split, not augmented.
    """

    def __init__(
        self,
        tiles_dir: Path,
        lmax: int,
        noise_level: str,
        fiducial_sim_id: int,
        *,
        nside: int = 0,
        geometry: TileGeometry = "auto",
        split_seed: int,
        split_by: SplitBy,
        device: torch.device,
        manifest: SplitManifest | None = None,
        norm_stats: NormStats | None = None,
    ) -> None:
        self.tiles_dir, self.lmax, self.nside, self.noise_level = tiles_dir, lmax, nside, noise_level
        self.geometry: TileGeometry = geometry
        self.fiducial_sim_id, self.split_seed, self.split_by = fiducial_sim_id, split_seed, split_by
        self.device = device
        self._given_manifest, self._given_norm_stats = manifest, norm_stats

    def setup(self) -> None:
        """Read, split, audit, normalise, move to the device.

        Raises:
            UserError: bad shards, too few tiles, or tiles that do not fit the manifest.
        """
        self.tiles: Tiles = read_tiles_through_cache(self.tiles_dir, self.lmax, self.noise_level, self.nside)
        self.manifest = self._given_manifest or make_manifest(
            self.tiles, self.split_seed, self.split_by, self.fiducial_sim_id
        )
        indices = split_indices(self.manifest, self.tiles, self.tiles_dir)
        self.audit: Audit = audit_tiles(
            self.tiles, indices, self.fiducial_sim_id, read_orientations(self.tiles_dir, self.geometry)
        )
        self.norm_stats = self._given_norm_stats or compute_norm_stats(self.tiles, indices["compressor_train"])
        everything = whole_dataset(self.tiles, self.norm_stats, self.device)
        self.compressor_train_ds, self.npe_train_ds, self.test_ds, self.fiducial_ds = (
            TileDataset(everything.store, everything.theta, indices[name], self.device) for name in SPLIT_NAMES
        )


def whole_dataset(tiles: Tiles, norm_stats: NormStats, device: torch.device) -> TileDataset:
    """All tiles as one data set, not augmented; their kappa is normalised in place."""
    norm_stats.normalise_tiles_in_place(tiles.kappa)
    theta = torch.from_numpy(norm_stats.normalise_theta(tiles.theta).astype(np.float32))  # (n, 2)
    return TileDataset(_resident(torch.from_numpy(tiles.kappa), device), theta, np.arange(len(theta)), device)


def _resident(kappa: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The tiles on the device if they fit there with room to compute, else in host memory."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        if kappa.nbytes > GPU_MEMORY_SHARE * free:
            return kappa
    return kappa.to(device)
