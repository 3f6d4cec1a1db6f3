"""TileDataModule: the tiles of a survey, split, normalised, on the device, in batches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Protocol

import numpy as np
import torch

from common.config import Feed, SplitBy, TileGeometry
from common.errors import UserError
from common.interrupt import check
from common.machine import free_memory
from common.progress import Progress
from data.audit import Audit, audit_tiles
from data.augment import Symmetries, draw_symmetries, gather_augmented
from data.cache import read_tiles_through_cache
from data.norm_stats import NormStats, compute_norm_stats
from data.schema import NOISELESS
from data.shards import Tiles, read_orientations
from data.split import SPLIT_NAMES, SplitManifest, make_manifest, split_indices
from data.stream import TileStream

MEMORY_SHARE = 0.6  # of what is free may go to the tiles; the rest is for the network
LOADED_AT_A_TIME = 64  # tiles
SIGNALS_CHECKED = 64  # tiles
NOT_NOISE = 0.2  # of the noise's variance may be missing from the sum; two different skies miss twice the signal's


class Batched(Protocol):
    """A data set that gives whole batches and may be told of the next."""

    def __len__(self) -> int: ...
    def prefetch(self, positions: torch.Tensor) -> None: ...
    def __getitems__(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]: ...


class TileDataset:
    """Normalised tiles of one split with their normalised theta.

    `ds[i]` is (kappa (4, N, N), theta (2,)); `ds[[i, j, ...]]` by way of `__getitems__` is a whole
    batch (kappa (B, 4, N, N) channels_last, theta (B, 2)). With an augmentation generator every
    access draws a new symmetry and roll per tile; if there is a `signal`, the same tiles without noise, also
    a new noise: that of another tile of the split, with a symmetry and roll of its own.
    """

    def __init__(
        self,
        source: torch.Tensor | TileStream,
        theta: torch.Tensor,
        rows: np.ndarray,
        device: torch.device,
        augment: torch.Generator | None = None,
        signal: torch.Tensor | TileStream | None = None,
        keys: np.ndarray | None = None,
    ) -> None:
        self.source, self.theta, self.device, self.augment, self.signal = source, theta, device, augment, signal
        self.rows, self.keys = torch.from_numpy(rows), keys

    def __len__(self) -> int:
        return len(self.rows)

    def augmented(self, generator: torch.Generator) -> TileDataset:
        """The same tiles, augmented with draws from `generator`."""
        return TileDataset(self.source, self.theta, self.rows.numpy(), self.device, generator, self.signal, self.keys)

    def prefetch(self, positions: torch.Tensor) -> None:
        """Say which batch is asked for next."""
        first = self.source if self.augment is None or self.signal is None else self.signal
        if isinstance(first, TileStream):
            first.prefetch(self.rows[positions])

    def __getitems__(self, positions: Sequence[int] | torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return next(self.in_parts(positions, len(positions)))

    def in_parts(
        self, positions: Sequence[int] | torch.Tensor, size: int
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """A batch in parts of `size` tiles: the tiles and draws are those of the whole batch."""
        rows = self.rows[torch.as_tensor(positions)]  # (B,)
        theta = self.theta[rows].to(self.device, non_blocking=True)
        if self.augment is None:
            views = [_View(self.source, rows)]
        else:
            symmetries = draw_symmetries(len(rows), _nside(self.source), self.augment)
            views = [_View(self.source if self.signal is None else self.signal, rows, symmetries)]
            if self.signal is not None:
                others = self.rows[torch.randint(len(self.rows), (len(rows),), generator=self.augment)]  # (B,)
                symmetries = draw_symmetries(len(rows), _nside(self.source), self.augment)
                views += [_View(self.source, others, symmetries), _View(self.signal, others, symmetries)]
        for start in range(0, len(rows), size):
            some = slice(start, start + size)
            kappa = views[0].take(some)
            if len(views) > 1:  # the noise is what the other tile has beside its signal
                kappa += views[1].take(some)
                kappa -= views[2].take(some)
            yield kappa, theta[some]

    def __getitem__(self, position: int) -> tuple[torch.Tensor, torch.Tensor]:
        kappa, theta = self.__getitems__([position])
        return kappa[0], theta[0]


def _nside(source: torch.Tensor | TileStream) -> int:
    return source.nside if isinstance(source, TileStream) else source.shape[-1]


class _View:
    """Tiles of a batch, transformed if symmetries are given; streamed ones are read at once."""

    def __init__(
        self, source: torch.Tensor | TileStream, rows: torch.Tensor, symmetries: Symmetries | None = None
    ) -> None:
        if isinstance(source, TileStream):
            source, rows = source.read(rows), torch.arange(len(rows))
        self.store, self.rows = source, rows  # (n, 4, N, N), (B,)
        self.symmetries = symmetries

    def take(self, some: slice) -> torch.Tensor:
        """Some of them, (m, 4, N, N)."""
        if self.symmetries is None:
            picked = self.store.permute(0, 2, 3, 1)[self.rows[some].to(self.store.device)]  # (m, N, N, 4)
            return picked.permute(0, 3, 1, 2)  # (m, 4, N, N)
        return gather_augmented(self.store, self.rows[some], self.symmetries.of(some))


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
    dataset: Batched, batch_size: int, shuffle: torch.Generator | None = None, first: int = 0
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """One epoch of what a data set gives for a batch: (kappa (B, 4, N, N), theta (B, 2)) or (summary (B, 2), theta).

    It begins with batch number `first`. Between two batches, where nothing is half done, a signal that waits is heard.
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


class TileDataModule:
    """Reads the tiles, splits and normalises them.

    Without a manifest and norm stats, `setup()` makes them (stage 1); with those of a stage-1 run it
    uses them and refuses tiles that do not fit (stage 2).

    Attributes, after setup():
        manifest, norm_stats: as made or given.
        audit: what the splits share, and more.
        tiles: the data set, in physical units.
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
        dtype: torch.dtype = torch.float32,
        feed: Feed = "auto",
        noiseless_dir: Path | None = None,
        manifest: SplitManifest | None = None,
        norm_stats: NormStats | None = None,
    ) -> None:
        self.tiles_dir, self.lmax, self.nside, self.noise_level = tiles_dir, lmax, nside, noise_level
        self.geometry: TileGeometry = geometry
        self.fiducial_sim_id, self.split_seed, self.split_by = fiducial_sim_id, split_seed, split_by
        self.device, self.dtype = device, dtype
        self.feed: Feed = feed
        self.noiseless_dir = noiseless_dir
        self._given_manifest, self._given_norm_stats = manifest, norm_stats

    def setup(self) -> None:
        """Read, split, audit, normalise, move to the device.

        Raises:
            UserError: bad shards, too few tiles, or tiles that do not fit the manifest.
        """
        self.tiles, moments = read_tiles_through_cache(self.tiles_dir, self.lmax, self.noise_level, self.nside)
        self.manifest = self._given_manifest or make_manifest(
            self.tiles, self.split_seed, self.split_by, self.fiducial_sim_id
        )
        indices = split_indices(self.manifest, self.tiles, self.tiles_dir)
        self.audit: Audit = audit_tiles(
            self.tiles, moments, indices, self.fiducial_sim_id, read_orientations(self.tiles_dir, self.geometry)
        )
        train = indices["compressor_train"]
        self.norm_stats = self._given_norm_stats or compute_norm_stats(self.tiles.theta[train], moments.of(train))
        everything = whole_dataset(self.tiles, self.norm_stats, self.device, self.dtype, self.feed)
        signal = None
        if self.noiseless_dir is not None:
            noiseless = read_signal(self.noiseless_dir, self.tiles)
            signal = whole_dataset(noiseless, self.norm_stats, self.device, self.dtype, self.feed).source
        self.compressor_train_ds, self.npe_train_ds, self.test_ds, self.fiducial_ds = (
            TileDataset(
                everything.source, everything.theta, indices[name], self.device, signal=signal, keys=self.tiles.keys
            )
            for name in SPLIT_NAMES
        )


def read_signal(folder: Path, tiles: Tiles) -> Tiles:
    """The same tiles without noise.

    Raises:
        UserError: bad shards, other tiles, or a difference that is not noise: one that does not add its variance.
    """
    if not any(folder.glob("shard_*.parquet")):
        raise UserError(
            f"--noiseless-tiles {folder} has no shard_*.parquet; `python run_mock.py --noise-level {NOISELESS}` with "
            "the suite's other options makes them"
        )
    signal, _ = read_tiles_through_cache(folder, tiles.lmax, NOISELESS, tiles.kappa.shape[-1])
    if not (np.array_equal(signal.keys, tiles.keys) and np.array_equal(signal.params, tiles.params)):
        raise UserError(f"--noiseless-tiles {folder} holds other simulations than the tiles; make both from one suite")
    some = np.linspace(0, len(tiles.keys) - 1, SIGNALS_CHECKED).astype(int)
    total, clean = (one.kappa[some].astype(np.float64) for one in (tiles, signal))  # (m, 4, N, N)
    noise = (total - clean).var(axis=(0, 2, 3))  # (4,)
    if not (np.abs(total.var(axis=(0, 2, 3)) - clean.var(axis=(0, 2, 3)) - noise) <= NOT_NOISE * noise).all():
        raise UserError(
            f"--noiseless-tiles {folder}: the tiles are not these ones with noise added; make both from one suite, "
            "with the same --seed"
        )
    return signal


def whole_dataset(
    tiles: Tiles,
    norm_stats: NormStats,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    feed: Feed = "auto",
) -> TileDataset:
    """All tiles as one data set, not augmented.

    Args:
        tiles: in physical units, and left so.
        norm_stats: they are normalised with.
        device: they are given on.
        dtype: that the network computes in; tiles may be held in it, which rounds them as the network would.
        feed: "resident" holds them on the device, "stream" leaves them where they are and reads batch by batch,
            "auto" holds them if they fit.
    """
    theta = torch.from_numpy(norm_stats.normalise_theta(tiles.theta).astype(np.float32))  # (n, 2)
    held_as = _held_as(tiles.kappa, device, dtype, feed)
    source = (
        TileStream(tiles.kappa, norm_stats, device)
        if held_as is None
        else _resident(tiles.kappa, norm_stats, device, held_as)
    )
    return TileDataset(source, theta, np.arange(len(theta)), device)


def _held_as(kappa: np.ndarray, device: torch.device, dtype: torch.dtype, feed: Feed) -> torch.dtype | None:
    """The type in which tiles are held on the device: float32 if they fit, else the network's; None to stream."""
    if feed == "stream":
        return None
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else free_memory()
    for held_as in (torch.float32, dtype):
        if kappa.size * held_as.itemsize <= MEMORY_SHARE * free:
            return held_as
    return dtype if feed == "resident" else None


def _resident(kappa: np.ndarray, norm_stats: NormStats, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    n, n_bins, nside, _ = kappa.shape
    store = torch.empty((n, nside, nside, n_bins), dtype=dtype, device=device).permute(0, 3, 1, 2)  # (n, 4, N, N)
    with Progress("loading tiles", n, "tiles") as progress:
        for start in range(0, n, LOADED_AT_A_TIME):
            some = slice(start, start + LOADED_AT_A_TIME)
            store[some] = torch.from_numpy(norm_stats.normalise_tiles(kappa[some])).to(device)
            progress.advance(len(store[some]))
    return store
