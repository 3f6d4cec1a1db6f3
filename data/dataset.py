"""The normalised tiles of one split, on the device or on the disk, augmented and in batches."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from itertools import zip_longest
from typing import Protocol

import numpy as np
import torch

from common.device import to_device
from common.interrupt import check
from data.augment import Symmetries, draw_symmetries, gather_augmented
from data.stream import TileStream


class Batched(Protocol):
    """A data set that gives whole batches and may be told of the next."""

    def __len__(self) -> int: ...
    def prefetch(self, positions: torch.Tensor) -> None: ...
    def __getitems__(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]: ...


class TileDataset:
    """Normalised tiles of one split with their normalised theta.

    `ds[i]` is (kappa (bins, N, N), theta (d,)); `ds[[i, j, ...]]` by way of `__getitems__` is a whole
    batch (kappa (B, bins, N, N) channels_last, theta (B, d)). With an augmentation generator every
    access draws a new symmetry and roll per tile; if there is a `signal`, the same tiles without noise, also
    a new noise: that of another tile of the split, with a symmetry and roll of its own.

    All is drawn on the CPU, so that the draws are the same on every device and a stream knows which tiles to read,
    and goes to the device in one copy a batch.
    """

    def __init__(
        self,
        source: torch.Tensor | TileStream,
        theta: torch.Tensor,
        rows: np.ndarray,
        device: torch.device,
        signal: torch.Tensor | TileStream | None = None,
        keys: np.ndarray | None = None,
    ) -> None:
        self.source, self.theta, self.device, self.signal = source, theta, device, signal
        self.rows, self.keys = torch.from_numpy(rows), keys
        self.augment: torch.Generator | None = None
        self.theta_noise: tuple[float, torch.Generator] | None = None

    def __len__(self) -> int:
        return len(self.rows)

    def augmented(
        self, generator: torch.Generator, theta_noise: tuple[float, torch.Generator] | None = None
    ) -> TileDataset:
        """The same tiles, augmented with draws from `generator`.

        Args:
            generator: of symmetries, rolls and the noise of the tiles.
            theta_noise: standard deviation of Gaussian noise on the normalised theta, and its generator.
        """
        other = copy.copy(self)
        other.augment, other.theta_noise = generator, theta_noise
        return other

    def prefetch(self, positions: torch.Tensor) -> None:
        """Say which batch is asked for next."""
        first = self.source if self.augment is None or self.signal is None else self.signal
        if isinstance(first, TileStream):
            first.prefetch(self.rows[positions])

    def __getitems__(self, positions: Sequence[int] | torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return next(self.in_parts(positions, len(positions)))

    def __getitem__(self, position: int) -> tuple[torch.Tensor, torch.Tensor]:
        kappa, theta = self.__getitems__([position])
        return kappa[0], theta[0]

    def in_parts(
        self, positions: Sequence[int] | torch.Tensor, size: int
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """A batch in parts of `size` tiles: the tiles and draws are those of the whole batch."""
        rows = self.rows[torch.as_tensor(positions)]  # (B,)
        views = self._views(rows)
        theta = self.theta[rows]  # (B, d)
        if self.theta_noise is not None:
            sigma, generator = self.theta_noise
            theta = theta + sigma * torch.randn(theta.shape, generator=generator)
        *drawn, theta = to_device([*(t for view in views for t in view.drawn()), theta], self.device)
        for start in range(0, len(rows), size):
            some = slice(start, start + size)
            here = iter(drawn)
            kappa, *noise = (view.take([next(here)[some] for _ in view.drawn()]) for view in views)
            if noise:  # is what the other tile has beside its signal
                kappa += noise[0]
                kappa -= noise[1]
            yield kappa, theta[some]

    def _views(self, rows: torch.Tensor) -> list[_View]:
        """The tiles, and where noise is exchanged the others with and without it."""
        if self.augment is None:
            return [_View(self.source, rows)]
        nside = self.source.shape[-1]
        symmetries = draw_symmetries(len(rows), nside, self.augment)
        if self.signal is None:
            return [_View(self.source, rows, symmetries)]
        others = self.rows[torch.randint(len(self.rows), (len(rows),), generator=self.augment)]  # (B,)
        of_others = draw_symmetries(len(rows), nside, self.augment)
        tiles = _View(self.signal, rows, symmetries)
        return [tiles, _View(self.source, others, of_others), _View(self.signal, others, of_others)]


class _View:
    """Tiles of a batch, transformed if symmetries are given; those on the disk are read at once."""

    def __init__(
        self, source: torch.Tensor | TileStream, rows: torch.Tensor, symmetries: Symmetries | None = None
    ) -> None:
        if isinstance(source, TileStream):
            source, rows = source.read(rows), torch.arange(len(rows))
        self.store, self.rows, self.symmetries = source, rows, symmetries  # (n, bins, N, N), (B,)

    def drawn(self) -> list[torch.Tensor]:
        """What the device has to know: rows and symmetries, int64 (B,) each."""
        return [self.rows] if self.symmetries is None else [self.rows, *vars(self.symmetries).values()]

    def take(self, drawn: list[torch.Tensor]) -> torch.Tensor:
        """Tiles (m, bins, N, N) for a part of `drawn`, which is on the device."""
        rows, *symmetries = drawn
        if symmetries:
            return gather_augmented(self.store, rows, Symmetries(*symmetries))
        return self.store.permute(0, 2, 3, 1)[rows].permute(0, 3, 1, 2)  # (m, N, N, bins) -> (m, bins, N, N)


def n_batches(n: int, batch_size: int) -> int:
    """Batches per epoch."""
    return -(-n // batch_size)


def batch_positions(n: int, batch_size: int, shuffle: torch.Generator | None) -> list[torch.Tensor]:
    """Cut 0..n-1, shuffled if a generator is given, into batches of nearly equal size.

    Nearly equal, because a last batch of a few tiles would give BatchNorm useless statistics.
    """
    order = torch.arange(n) if shuffle is None else torch.randperm(n, generator=shuffle)
    return list(order.tensor_split(n_batches(n, batch_size)))


def batches(
    dataset: Batched, batch_size: int, shuffle: torch.Generator | None = None, first: int = 0
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """One epoch of what a data set gives for a batch: (kappa (B, bins, N, N) or summary (B, d), theta (B, d)).

    It begins with batch number `first`. Between two batches, where nothing is half done, a waiting signal is answered.
    """
    order = batch_positions(len(dataset), batch_size, shuffle)[first:]
    for positions, following in zip_longest(order, order[1:]):
        check()
        batch = dataset.__getitems__(positions)
        if following is not None:
            dataset.prefetch(following)
        yield batch


def names_of_batch(dataset: TileDataset, batch_size: int, shuffle: torch.Generator, batch: int) -> str:
    """The tiles of one batch of an epoch, given its shuffle: sim_id/orientation_id/tile_id, or the rows if unknown."""
    rows = dataset.rows[batch_positions(len(dataset), batch_size, shuffle)[batch]].tolist()
    return " ".join(str(row) if dataset.keys is None else "/".join(map(str, dataset.keys[row])) for row in rows)
