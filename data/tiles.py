"""Tiles in memory, and the hash of each tile's pixels."""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np

from common.errors import UserError
from data.config import kind_of
from data.schema import PARAM_NAMES

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
        nuisances: of a survey, that the suite varies: by name, each float64 (n,).
    """

    kappa: np.ndarray
    keys: np.ndarray
    params: np.ndarray
    lmax: int
    noise_level: str
    digests: np.ndarray | None = None
    nuisances: dict[str, np.ndarray] = field(default_factory=dict)

    @property
    def n_bins(self) -> int:
        """Tomographic bins of a tile."""
        return self.kappa.shape[1]

    @property
    def nside(self) -> int:
        """Pixels per side of a tile."""
        return self.kappa.shape[-1]

    @property
    def labels(self) -> dict[str, np.ndarray]:
        """All that can be inferred, by name: parameters and nuisances, each (n,)."""
        return dict(zip(PARAM_NAMES, self.params.T, strict=True)) | self.nuisances

    def columns(self, names: Iterable[str]) -> np.ndarray:
        """The named labels (n, d); UserError if the suite does not vary such a nuisance."""
        if absent := [name for name in names if name not in self.labels]:
            varied = ", ".join(self.nuisances) or "no nuisances"
            found = f"--params has {absent[0]}, which these tiles do not vary (but {varied})"
            raise UserError(f"{found}; leave it out, or give tiles with --nuisance {kind_of(absent[0])}")
        return np.stack([self.labels[name] for name in names], axis=1)


def empty_kappa(n_tiles: int, n_bins: int, nside: int) -> np.ndarray:
    """Uninitialised float32 array (n, bins, N, N) whose bins run fastest in memory (channels_last)."""
    return np.empty((n_tiles, nside, nside, n_bins), dtype=np.float32).transpose(0, 3, 1, 2)  # (n, bins, N, N)


def digests_of(kappa: np.ndarray) -> np.ndarray:
    """SHA-256 of every tile's pixels, little-endian float32 in the order (bin, y, x): uint8 (n, 32).

    They protect from pixels that differ from those that were split, written or cached.
    """
    digests = [hashlib.sha256(np.ascontiguousarray(tile, dtype="<f4").data).digest() for tile in kappa]
    return np.frombuffer(b"".join(digests), np.uint8).reshape(-1, DIGEST_SIZE)  # (n, 32)
