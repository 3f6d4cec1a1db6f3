"""TileDataModule: the tiles of a survey, split, normalised, on the device, in batches."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import Protocol

import numpy as np
import torch

from common.device import free_memory_of, name_of_dtype, to_device
from common.errors import UserError, say, warn
from common.interrupt import check
from common.progress import Progress
from data.audit import Audit, audit_tiles
from data.augment import Symmetries, draw_symmetries, gather_augmented
from data.cache import read_tiles_through_cache
from data.config import SplitBy, TileGeometry, TilesOn
from data.norm_stats import NormStats, compute_norm_stats
from data.schema import NOISELESS
from data.shards import Tiles, read_orientations
from data.split import SPLIT_NAMES, SplitManifest, fingerprint_of, make_manifest, split_indices
from data.stream import TileStream

MEMORY_SHARE = 0.8  # of what the network leaves may go to the tiles; allocators and others need some
LOADED_AT_A_TIME = 64  # tiles
SIGNALS_CHECKED = 64  # tiles
NOT_NOISE = 0.5  # slope of the difference on the signal: 0 if that is noise, however weak; -1 for another sky


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

    def in_parts(
        self, positions: Sequence[int] | torch.Tensor, size: int
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """A batch in parts of `size` tiles: the tiles and draws are those of the whole batch."""
        rows = self.rows[torch.as_tensor(positions)]  # (B,)
        views = self._views(rows)
        theta = self.theta[rows]  # (B, 2)
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
        symmetries = draw_symmetries(len(rows), _nside(self.source), self.augment)
        if self.signal is None:
            return [_View(self.source, rows, symmetries)]
        others = self.rows[torch.randint(len(self.rows), (len(rows),), generator=self.augment)]  # (B,)
        of_others = draw_symmetries(len(rows), _nside(self.source), self.augment)
        tiles = _View(self.signal, rows, symmetries)
        return [tiles, _View(self.source, others, of_others), _View(self.signal, others, of_others)]

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
        self.store, self.rows, self.symmetries = source, rows, symmetries  # (n, 4, N, N), (B,)

    def drawn(self) -> list[torch.Tensor]:
        """What the device has to know: rows and symmetries, int64 (B,) each."""
        return [self.rows] if self.symmetries is None else [self.rows, *vars(self.symmetries).values()]

    def take(self, drawn: list[torch.Tensor]) -> torch.Tensor:
        """Tiles (m, 4, N, N) for a part of `drawn`, which is on the device."""
        rows, *symmetries = drawn
        if symmetries:
            return gather_augmented(self.store, rows, Symmetries(*symmetries))
        return self.store.permute(0, 2, 3, 1)[rows].permute(0, 3, 1, 2)  # (m, N, N, 4) -> (m, 4, N, N)


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
        fingerprints: of the tiles, and of those without noise, None if there are none.
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
        tiles_on: TilesOn = "auto",
        reserve: int = 0,
        noiseless_dir: Path | None = None,
        manifest: SplitManifest | None = None,
        norm_stats: NormStats | None = None,
    ) -> None:
        self.tiles_dir, self.lmax, self.nside, self.noise_level = tiles_dir, lmax, nside, noise_level
        self.geometry: TileGeometry = geometry
        self.fiducial_sim_id, self.split_seed, self.split_by = fiducial_sim_id, split_seed, split_by
        self.device, self.dtype = device, dtype
        self.tiles_on: TilesOn = tiles_on
        self.reserve = reserve
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
        self.fingerprints: dict[str, str | None] = {"tiles": self.manifest.fingerprint, "noiseless_tiles": None}
        # Sums of tiles are taken in float32, so then none is held in less.
        dtype = self.dtype if self.noiseless_dir is None else torch.float32
        place = partial(
            whole_dataset,
            norm_stats=self.norm_stats,
            device=self.device,
            dtype=dtype,
            tiles_on=self.tiles_on,
            reserve=self.reserve,
        )
        everything = place(self.tiles, called="tiles")
        signal = None
        if self.noiseless_dir is not None:
            noiseless = read_signal(self.noiseless_dir, self.tiles)
            self.fingerprints["noiseless_tiles"] = fingerprint_of(noiseless)
            signal = place(noiseless, called="noiseless tiles").source
        self.compressor_train_ds, self.npe_train_ds, self.test_ds, self.fiducial_ds = (
            TileDataset(
                everything.source, everything.theta, indices[name], self.device, signal=signal, keys=self.tiles.keys
            )
            for name in SPLIT_NAMES
        )


def read_signal(folder: Path, tiles: Tiles) -> Tiles:
    """The same tiles without noise.

    Raises:
        UserError: bad shards, other tiles, or a difference that is not noise: one that goes with the signal.
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
    if not (np.abs(slope_on_signal(tiles.kappa[some], signal.kappa[some])) <= NOT_NOISE).all():
        raise UserError(
            f"--noiseless-tiles {folder}: the tiles are not these ones with noise added; make both from one suite, "
            "with the same --seed"
        )
    return signal


def slope_on_signal(kappa: np.ndarray, signal: np.ndarray) -> np.ndarray:
    """How much of a bin's signal is in the difference from it, (4,): cov(kappa - signal, signal) / var(signal).

    0 where the difference is noise, give or take the noise's rms over the signal's and the root of the number of modes;
    -1 where kappa is another sky.

    Args:
        kappa, signal: tiles (m, 4, N, N).
    """
    clean = signal - signal.mean(axis=(0, 2, 3), keepdims=True, dtype=np.float64)
    return (clean * (kappa - clean)).sum(axis=(0, 2, 3)) / np.square(clean).sum(axis=(0, 2, 3))


def whole_dataset(
    tiles: Tiles,
    norm_stats: NormStats,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    tiles_on: TilesOn = "auto",
    reserve: int = 0,
    called: str = "",
) -> TileDataset:
    """All tiles as one data set, not augmented.

    Args:
        tiles: in physical units, and left so.
        norm_stats: they are normalised with.
        device: they are given on.
        dtype: that they are given in, the one that the network computes in: it would round them to it anyway.
        tiles_on: "device" holds them there, "disk" leaves them where they are and reads batch by batch,
            "auto" holds them if they fit.
        reserve: bytes of the device's free memory that are left to the network.
        called: so in the line that says what was chosen; without a name nothing is said.
    """
    theta = torch.from_numpy(norm_stats.normalise_theta(tiles.theta).astype(np.float32))  # (n, 2)
    size, free = tiles.kappa.size * dtype.itemsize, free_memory_of(device)
    room = int(MEMORY_SHARE * (free - reserve))
    held = tiles_on == "device" or (tiles_on == "auto" and size <= room)
    if called:
        chosen = f"held on {device}" if held else "read batch by batch"
        why = (
            f"--tiles-on {tiles_on}"
            if tiles_on != "auto"
            else f"{_gb(free)} free, of which {_gb(reserve)} for the network"
        )
        say(f"{called}: {_gb(size)} as {name_of_dtype(dtype)}, {chosen} ({why})")
    if reserve > free:
        warn(f"a step may need {_gb(reserve)} where {_gb(free)} are free on {device}; give a smaller --batch-size")
    store = _resident if held else TileStream
    return TileDataset(store(tiles.kappa, norm_stats, device, dtype), theta, np.arange(len(theta)), device)


def _gb(n_bytes: int) -> str:
    return f"{n_bytes / 1e9:.1f} GB"


def _resident(kappa: np.ndarray, norm_stats: NormStats, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    n, n_bins, nside, _ = kappa.shape
    store = torch.empty((n, nside, nside, n_bins), dtype=dtype, device=device).permute(0, 3, 1, 2)  # (n, 4, N, N)
    with Progress("loading tiles", n, "tiles") as progress:
        for start in range(0, n, LOADED_AT_A_TIME):
            some = slice(start, start + LOADED_AT_A_TIME)
            store[some] = torch.from_numpy(norm_stats.normalise_tiles(kappa[some])).to(device)
            progress.advance(len(store[some]))
    return store
