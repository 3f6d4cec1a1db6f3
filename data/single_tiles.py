"""Tiles for a prediction, which need no cosmology: from a shard or from a numpy file."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from common.errors import UserError
from data.schema import KEY_NAMES, PARAM_NAMES
from data.shard import kappa_of_shard, n_bins_of, opened, read_labels
from data.shard_metadata import CONTENT_KEY, check_lmax
from data.tiles import Tiles, digests_of, empty_kappa

MAX_SHARE_OF_ZEROS = 1e-3  # convergence is a real number: many exact zeros are a mask
UNSEEN = -1.6375e30  # HEALPix' mark of a pixel that was not observed
WHOLE = "a tile is a whole base face without a mask, which the network has never seen"


@dataclass(frozen=True)
class SingleTiles(Tiles):
    """Tiles without a cosmology (their params are NaN), with a name for each."""

    names: tuple[str, ...] = ()

    def columns(self, names: Iterable[str]) -> np.ndarray:
        """Nothing is known of them: NaN (n, d)."""
        return np.full((len(self.keys), len(tuple(names))), np.nan)


def read_single_tiles(path: Path, lmax: int, nside: int, n_bins: int) -> SingleTiles:
    """Tiles of a parquet shard, or of an .npy file (n, bins, N, N) or (bins, N, N), in the order of the file.

    Args:
        path: of the file.
        lmax, nside, n_bins: of the tiles that the network was trained with.

    Raises:
        UserError: no such file, tiles of another shape, or a masked one.
    """
    if not path.exists():
        raise UserError(f"--tiles {path} is not there; give a shard (.parquet) or an .npy file")
    kappa, names = (_of_shard if path.suffix == ".parquet" else _of_npy)(path, lmax, nside, n_bins)
    for tile, name in zip(kappa, names, strict=True):
        if n_hidden := int((~np.isfinite(tile) | (tile < 0.99 * UNSEEN)).sum()):
            raise UserError(f"{path}, tile {name}: {n_hidden} pixels are masked or not finite; {WHOLE}")
        if (share := float(np.mean(tile == 0))) > MAX_SHARE_OF_ZEROS:
            raise UserError(f"{path}, tile {name}: {100 * share:.1f} % of its pixels are exactly zero; {WHOLE}")
    n = len(names)
    keys = np.arange(n)[:, None] * (1, 0, 0)  # (n, 3)
    return SingleTiles(kappa, keys, np.full((n, len(PARAM_NAMES)), np.nan), lmax, "", names=names)


def _of_shard(path: Path, lmax: int, nside: int, n_bins: int) -> tuple[np.ndarray, tuple[str, ...]]:
    check_lmax(path, lmax)
    with opened(path) as file:
        names = [name for name in KEY_NAMES if name in file.schema_arrow.names]
        rows = zip(*(column.to_pylist() for column in file.read(names).columns), strict=True)
        found, has_hash = n_bins_of(path, file), CONTENT_KEY.encode() in (file.metadata.metadata or {})
    if found != n_bins:
        raise UserError(f"--tiles {path} has {found} bins, but the network takes {n_bins} bins; give such tiles")
    chunks = list(kappa_of_shard(path, n_bins, nside, lmax))
    kappa = empty_kappa(sum(map(len, chunks)), n_bins, nside)
    np.concatenate(chunks, out=kappa)
    if has_hash:
        read_labels(path, lmax).check(digests_of(kappa))
    return kappa, tuple("/".join(map(str, row)) for row in rows) or tuple(map(str, range(len(kappa))))


def _of_npy(path: Path, lmax: int, nside: int, n_bins: int) -> tuple[np.ndarray, tuple[str, ...]]:
    try:
        given = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        reason = str(error).splitlines()[0][:160]
        raise UserError(f"--tiles {path} is neither a shard (.parquet) nor an .npy file ({reason})") from None
    shape = getattr(given, "shape", ())
    if shape[-3:] != (n_bins, nside, nside) or len(shape) not in (3, 4) or given.dtype.kind != "f":
        wanted = f"floats ({n_bins}, {nside}, {nside}) or (n, {n_bins}, {nside}, {nside})"
        found = f"--tiles {path} holds {getattr(given, 'dtype', 'no array')} {shape}"
        raise UserError(f"{found}; the run is for lmax {lmax}, so give {wanted}")
    if not given.size:
        raise UserError(f"--tiles {path} holds no tile; give one or more")
    given = given.reshape(-1, n_bins, nside, nside)  # (n, bins, N, N)
    kappa = empty_kappa(*given.shape[:3])
    with np.errstate(over="ignore"):  # a double beyond float32 becomes infinite and is refused
        kappa[:] = given
    return kappa, tuple(map(str, range(len(given))))
