"""Tiles in memory, and the hash of each tile's pixels."""

import hashlib
from dataclasses import dataclass

import numpy as np

DIGEST_SIZE = hashlib.sha256().digest_size  # bytes


@dataclass(frozen=True)
class Tiles:
    """Tiles in the canonical order (sim_id, orientation_id, tile_id).

    Attributes:
        kappa: convergence (dimensionless), float32, shape (n, bins, N, N): bins, then rows y and columns x of
            the HEALPix face (pixel [y, x] is `xyf2pix(x, y, face)`). In memory the bins run fastest.
        keys: int64 (n, 3): sim_id, orientation_id, tile_id.
        params: float64 (n, 8), in the order of PARAM_NAMES.
        lmax, noise_level: one for all tiles.
        digests: digests_of(kappa) if it is known, as it is for tiles that were read; else None.
    """

    kappa: np.ndarray
    keys: np.ndarray
    params: np.ndarray
    lmax: int
    noise_level: str
    digests: np.ndarray | None = None

    @property
    def n_bins(self) -> int:
        """Tomographic bins of a tile."""
        return self.kappa.shape[1]

    @property
    def nside(self) -> int:
        """Pixels per side of a tile."""
        return self.kappa.shape[-1]


def empty_kappa(n_tiles: int, n_bins: int, nside: int) -> np.ndarray:
    """Uninitialised float32 array (n, bins, N, N) whose bins run fastest in memory (channels_last)."""
    return np.empty((n_tiles, nside, nside, n_bins), dtype=np.float32).transpose(0, 3, 1, 2)  # (n, bins, N, N)


def digests_of(kappa: np.ndarray) -> np.ndarray:
    """SHA-256 of every tile's pixels, little-endian float32 in the order (bin, y, x): uint8 (n, 32).

    They protect from pixels that differ from those that were split, written or cached.
    """
    digests = [hashlib.sha256(np.ascontiguousarray(tile, dtype="<f4").data).digest() for tile in kappa]
    return np.frombuffer(b"".join(digests), np.uint8).reshape(-1, DIGEST_SIZE)  # (n, 32)
