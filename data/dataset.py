"""Normalised tiles in batches: held on the device or read from the disk (--tiles-on), as they are or augmented."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from itertools import zip_longest
from typing import Protocol, TypeVar

import numpy as np
import torch

from common.device import free_memory_of, name_of_dtype, to_device
from common.errors import say, warn
from common.interrupt import check
from common.processes import ALONE, Processes
from common.progress import Progress
from data.augment import Symmetries, draw_symmetries, gather_augmented
from data.config import TilesOn
from data.norm_stats import NormStats
from data.stream import TileStream
from data.tiles import Tiles, empty_kappa

Batch = tuple[torch.Tensor, torch.Tensor]  # kappa (B, bins, N, N) or summary (B, d), and theta (B, d)
AnyBatch = TypeVar("AnyBatch", covariant=True)
Source = torch.Tensor | TileStream  # (n, bins, N, N)
MEMORY_SHARE = 0.8  # of what the network leaves may go to the tiles; allocators and others need some
LOADED_AT_A_TIME = 64  # tiles


class Batched(Protocol[AnyBatch]):
    """A data set that gives whole batches and may be told of the next."""

    def __len__(self) -> int: ...
    def prefetch(self, positions: torch.Tensor) -> None: ...
    def __getitems__(self, positions: torch.Tensor) -> AnyBatch: ...


class TileDataset:
    """Normalised tiles of one split with their normalised theta.

    `ds[i]` is (kappa (bins, N, N), theta (d,)); `ds.__getitems__([i, j, ...])` is a whole batch (kappa (B, bins, N, N)
    channels_last, theta (B, d)). With an augmentation generator every access draws a new symmetry and roll per tile.
    If there is a `signal`, the same tiles without noise, it also draws new noise: that of another tile of the split,
    with its own symmetry and roll.

    Everything is drawn on the CPU, so that the draws are the same on every device and a stream knows which tiles to
    read, and is copied to the device once a batch.
    """

    def __init__(
        self,
        source: Source,
        theta: torch.Tensor,
        rows: np.ndarray,
        device: torch.device,
        signal: Source | None = None,
        keys: np.ndarray | None = None,
    ) -> None:
        self.source, self.theta, self.device, self.signal = source, theta, device, signal
        self.rows, self.keys = torch.from_numpy(rows), keys
        self.augment: torch.Generator | None = None
        self.theta_noise: tuple[float, torch.Generator] | None = None
        self.processes = ALONE

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def tiles_on(self) -> TilesOn:
        """Where they are."""
        return "disk" if isinstance(self.source, TileStream) else "device"

    @property
    def sim_ids(self) -> np.ndarray:
        """Number of the simulation of each tile, (n,); without keys every tile has one of its own."""
        return self.rows.numpy() if self.keys is None else self.keys[self.rows.numpy(), 0]

    def of_sims(self, sim_ids: np.ndarray) -> TileDataset:
        """The tiles of some simulations; noise is then that of their tiles, too."""
        other = copy.copy(self)
        other.rows = self.rows[torch.from_numpy(np.isin(self.sim_ids, sim_ids))]
        return other

    def augmented(
        self, generator: torch.Generator, theta_noise: tuple[float, torch.Generator] | None = None
    ) -> TileDataset:
        """The same tiles, augmented with draws from `generator`, and with Gaussian noise on the normalised theta.

        `theta_noise` is the standard deviation of that noise, and a generator of its own.
        """
        other = copy.copy(self)
        other.augment, other.theta_noise = generator, theta_noise
        return other

    def shared(self, processes: Processes) -> TileDataset:
        """The same tiles and draws; of a batch it gives this process's share."""
        other = copy.copy(self)
        other.processes = processes
        return other

    def prefetch(self, positions: torch.Tensor) -> None:
        """Say which batch is asked for next."""
        first = self.source if self.augment is None or self.signal is None else self.signal
        if isinstance(first, TileStream):
            first.prefetch(self.rows[positions[self.processes.share(len(positions))]])

    def __getitems__(self, positions: Sequence[int] | torch.Tensor) -> Batch:
        return next(self.in_parts(positions, len(positions)))

    def __getitem__(self, position: int) -> Batch:
        kappa, theta = self.__getitems__([position])
        return kappa[0], theta[0]

    def in_parts(self, positions: Sequence[int] | torch.Tensor, size: int) -> Iterator[Batch]:
        """A batch in parts of `size` tiles, which are the same as those of the whole batch."""
        rows = self.rows[torch.as_tensor(positions)]  # (B,)
        mine = self.processes.share(len(rows))  # B' of them; what is drawn is drawn for all
        views, theta = self._views(rows, mine), self.theta[rows]  # (B, d)
        if self.theta_noise is not None:
            sigma, generator = self.theta_noise
            theta = theta + sigma * torch.randn(theta.shape, generator=generator)
        rows, theta = rows[mine], theta[mine]  # (B',), (B', d)
        *draws, theta = to_device([*(draw for _, draw in views), theta], self.device)
        for start in range(0, max(1, len(rows)), size):  # there may be fewer tiles than processes
            some = slice(start, start + size)
            kappa, *noise = (_taken(store, draw[:, some]) for (store, _), draw in zip(views, draws, strict=True))
            if noise:  # is what the other tile has beside its signal
                kappa += noise[0]
                kappa -= noise[1]
            yield kappa, theta[some]

    def _views(self, rows: torch.Tensor, mine: slice) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Some of the tiles, and where noise is exchanged the other tiles with and without it."""
        if self.augment is None:
            return [_view(self.source, rows[mine])]
        nside = self.source.shape[-1]
        symmetries = draw_symmetries(len(rows), nside, self.augment)[mine]
        if self.signal is None:
            return [_view(self.source, rows[mine], symmetries)]
        others = self.rows[torch.randint(len(self.rows), (len(rows),), generator=self.augment)][mine]  # (B',)
        of_others = draw_symmetries(len(rows), nside, self.augment)[mine]
        tiles = _view(self.signal, rows[mine], symmetries)  # first, as prefetch has it
        return [tiles, _view(self.source, others, of_others), _view(self.signal, others, of_others)]


def _view(
    source: Source, rows: torch.Tensor, symmetries: Symmetries | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Where a batch's tiles are, and what picks them: rows and symmetries, (1 or 6, B). The disk is read at once."""
    if isinstance(source, TileStream):
        source, rows = source.read(rows), torch.arange(len(rows))
    return source, torch.stack([rows, *(vars(symmetries).values() if symmetries else ())])


def _taken(store: torch.Tensor, draw: torch.Tensor) -> torch.Tensor:
    """The tiles (m, bins, N, N) that a part of a view's rows and symmetries, (1 or 6, m) on the device, picks."""
    rows, *symmetries = draw
    if symmetries:
        return gather_augmented(store, rows, Symmetries(*symmetries))
    return store.permute(0, 2, 3, 1)[rows].permute(0, 3, 1, 2)  # (m, N, N, bins) -> (m, bins, N, N)


def whole_dataset(
    tiles: Tiles,
    params: tuple[str, ...],
    norm_stats: NormStats,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    tiles_on: TilesOn = "auto",
    reserve: int = 0,
    called: str = "",
) -> TileDataset:
    """All tiles as one data set, not augmented.

    Args:
        tiles, params, norm_stats: in physical units, names of the inferred parameters, and what normalises both.
        device, dtype: of what is given; the network would round it to its own dtype anyway.
        tiles_on: "device" holds the tiles there, "disk" leaves them where they are and reads batch by batch, "auto"
            holds them if they fit.
        reserve: bytes of the device's free memory that are left to the network.
        called: their name in the line that says what was chosen; without a name nothing is said.
    """
    theta = tiles.columns(params)  # (n, d)
    size, free = tiles.kappa.size * dtype.itemsize, free_memory_of(device)
    held = tiles_on == "device" or (tiles_on == "auto" and size <= int(MEMORY_SHARE * (free - reserve)))
    if called:
        chosen = f"held on {device}" if held else "read from the disk batch by batch"
        auto = f"{_gb(free)} free, of which {_gb(reserve)} for the network"
        why = auto if tiles_on == "auto" else f"--tiles-on {tiles_on}"
        say(f"{called}: {_gb(size)} as {name_of_dtype(dtype)}, {chosen} ({why})")
    if reserve > free:
        warn(f"a step may need {_gb(reserve)} where {_gb(free)} are free on {device}; give a smaller --batch-size")
    of_tiles = (tiles.kappa, norm_stats, device, dtype)
    source = _on_device(*of_tiles) if held else TileStream(*of_tiles)
    normalised = torch.from_numpy(norm_stats.normalise_theta(theta).astype(np.float32))  # (n, d)
    return TileDataset(source, normalised, np.arange(len(theta)), device)


def _gb(n_bytes: int) -> str:
    return f"{n_bytes / 1e9:.1f} GB"


def _on_device(kappa: np.ndarray, norm_stats: NormStats, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    n, n_bins, nside, _ = kappa.shape
    in_place = device.type == "cpu" and dtype == torch.float32
    if in_place:  # numpy's memory comes in huge pages, torch's does not
        store = torch.from_numpy(empty_kappa(n, n_bins, nside))
    else:
        store = torch.empty((n, nside, nside, n_bins), dtype=dtype, device=device).permute(0, 3, 1, 2)
    with Progress("loading tiles", n, "tiles") as progress:
        for start in range(0, n, LOADED_AT_A_TIME):
            some = slice(start, start + LOADED_AT_A_TIME)
            if in_place:
                norm_stats.normalise_tiles(kappa[some], out=store[some].numpy())
            else:
                store[some] = torch.from_numpy(norm_stats.normalise_tiles(kappa[some])).to(device)
            progress.advance(len(store[some]))
    return store  # (n, bins, N, N), channels_last


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
    dataset: Batched[AnyBatch], batch_size: int, shuffle: torch.Generator | None = None, first: int = 0
) -> Iterator[AnyBatch]:
    """One epoch of what a data set gives for a batch, from batch number `first` on.

    Between two batches, where nothing is half done, a waiting signal is answered.
    """
    order = batch_positions(len(dataset), batch_size, shuffle)[first:]
    for positions, following in zip_longest(order, order[1:]):
        check()
        batch = dataset.__getitems__(positions)
        if following is not None:
            dataset.prefetch(following)
        yield batch


def first_bad_batch(
    losses: list[torch.Tensor], dataset: TileDataset, batch_size: int, shuffle: torch.Generator
) -> tuple[int, str] | None:
    """The first batch of an epoch whose loss, one number or several, is not finite, and its tiles; None if all are.

    Tiles are named sim_id/orientation_id/tile_id, or by their rows if they have no keys.
    """
    finite = torch.stack([loss.isfinite().all() for loss in losses])  # (n_batches,)
    if finite.all():
        return None
    batch = int((~finite).int().argmax())
    rows = dataset.rows[batch_positions(len(dataset), batch_size, shuffle)[batch]].tolist()
    names = (str(row) if dataset.keys is None else "/".join(map(str, dataset.keys[row])) for row in rows)
    return batch, " ".join(names)
