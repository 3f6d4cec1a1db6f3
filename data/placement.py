"""Where normalised tiles are while a network reads them: on its device, or on the disk (--tiles-on)."""

from __future__ import annotations

import numpy as np
import torch

from common.device import free_memory_of, name_of_dtype
from common.errors import say, warn
from common.progress import Progress
from data.config import TilesOn
from data.dataset import TileDataset
from data.norm_stats import NormStats
from data.schema import columns_of
from data.stream import TileStream
from data.tiles import Tiles

MEMORY_SHARE = 0.8  # of what the network leaves may go to the tiles; allocators and others need some
LOADED_AT_A_TIME = 64  # tiles


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
        tiles: in physical units, and left so.
        params: names of the inferred parameters.
        norm_stats: that they are normalised with.
        device: that they are given on.
        dtype: that they are given in, the one that the network computes in: it would round them to it anyway.
        tiles_on: "device" holds them there, "disk" leaves them where they are and reads batch by batch,
            "auto" holds them if they fit.
        reserve: bytes of the device's free memory that are left to the network.
        called: their name in the line that says what was chosen; without a name nothing is said.
    """
    theta = columns_of(tiles.params, params)  # (n, d)
    size, free = tiles.kappa.size * dtype.itemsize, free_memory_of(device)
    held = tiles_on == "device" or (tiles_on == "auto" and size <= int(MEMORY_SHARE * (free - reserve)))
    if called:
        chosen = f"held on {device}" if held else "read from the disk batch by batch"
        why = f"{_gb(free)} free, of which {_gb(reserve)} for the network"
        why = why if tiles_on == "auto" else f"--tiles-on {tiles_on}"
        say(f"{called}: {_gb(size)} as {name_of_dtype(dtype)}, {chosen} ({why})")
    if reserve > free:
        warn(f"a step may need {_gb(reserve)} where {_gb(free)} are free on {device}; give a smaller --batch-size")
    source = (_on_device if held else TileStream)(tiles.kappa, norm_stats, device, dtype)
    normalised = torch.from_numpy(norm_stats.normalise_theta(theta).astype(np.float32))  # (n, d)
    return TileDataset(source, normalised, np.arange(len(theta)), device)


def _gb(n_bytes: int) -> str:
    return f"{n_bytes / 1e9:.1f} GB"


def _on_device(kappa: np.ndarray, norm_stats: NormStats, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    n, n_bins, nside, _ = kappa.shape
    store = torch.empty((n, nside, nside, n_bins), dtype=dtype, device=device).permute(0, 3, 1, 2)  # (n, bins, N, N)
    with Progress("loading tiles", n, "tiles") as progress:
        for start in range(0, n, LOADED_AT_A_TIME):
            some = slice(start, start + LOADED_AT_A_TIME)
            store[some] = torch.from_numpy(norm_stats.normalise_tiles(kappa[some])).to(device)
            progress.advance(len(store[some]))
    return store
