"""Tiles that stay on the disk: read batch by batch, the next one while this one is computed with."""

from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch

from data.norm_stats import NormStats
from data.tiles import empty_kappa


class TileStream:
    """Normalised tiles in `dtype` out of kappa (n, bins, N, N): physical, mapped into memory, bins fastest."""

    def __init__(self, kappa: np.ndarray, norm_stats: NormStats, device: torch.device, dtype: torch.dtype) -> None:
        self.kappa, self.norm_stats, self.device, self.dtype = kappa, norm_stats, device, dtype
        self.shape = kappa.shape
        self._reader = ThreadPoolExecutor(1, "tile reader")
        self._ahead: tuple[torch.Tensor, Future[torch.Tensor]] | None = None

    def prefetch(self, rows: torch.Tensor) -> None:
        """Begin to read these tiles (B,) in the background; `read` of the same rows then waits less."""
        self._ahead = (rows, self._reader.submit(self._read, rows))

    def read(self, rows: torch.Tensor) -> torch.Tensor:
        """Tiles (B, bins, N, N) on the device, channels_last."""
        ahead, self._ahead = self._ahead, None
        kappa = ahead[1].result() if ahead is not None and torch.equal(ahead[0], rows) else self._read(rows)
        return kappa.to(self.device, non_blocking=kappa.is_pinned())

    def _read(self, rows: torch.Tensor) -> torch.Tensor:
        n_bins, nside = self.shape[1:3]
        read = empty_kappa(len(rows), n_bins, nside)
        for i, row in enumerate(rows.tolist()):
            # numpy does this without the interpreter's lock: the main thread works on while pages come from the disk.
            self.norm_stats.normalise_tiles(self.kappa[row : row + 1], out=read[i : i + 1])
        kappa = torch.from_numpy(read).to(self.dtype)
        return kappa.pin_memory() if self.device.type == "cuda" else kappa  # (B, bins, N, N)
