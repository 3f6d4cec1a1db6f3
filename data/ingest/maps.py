"""Full-sky convergence maps of four bins from FITS files."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import healpy
import numpy as np

from data.ingest.config import Ordering
from data.ingest.lightcone import BadSimulationError
from data.schema import N_BINS

SUFFIXES = (".fits", ".fit", ".fits.gz", ".fits.fz")
MAX_SHARE_OF_ZEROS = 1e-3  # convergence is a real number: many exact zeros are a mask


def read_kappa_maps(source: Path, ordering: Ordering) -> np.ndarray:
    """Convergence of the four bins of one simulation, float32 (4, 12 nside^2), in RING order.

    Args:
        source: a FITS file with four columns, or a folder with four FITS files, which are taken in the order of their
            names.
        ordering: of the pixels; "auto" takes what the file says.

    Raises:
        BadSimulationError: there are not four whole maps of one nside: names the file and the reason.
    """
    files = sorted(path for path in source.iterdir() if path.name.endswith(SUFFIXES)) if source.is_dir() else [source]
    if len(files) not in (1, N_BINS):
        raise BadSimulationError(f"{source} holds {len(files)} FITS files; {N_BINS} are due, or one with {N_BINS} maps")
    maps = [bin_map for path in files for bin_map in _read(path, ordering)]
    if len(maps) != N_BINS or len({len(m) for m in maps}) != 1:
        sizes = ", ".join(str(len(m)) for m in maps)
        raise BadSimulationError(f"{source} holds maps of {sizes} pixels; {N_BINS} of the same size are due")
    return np.stack(maps)  # (4, n_pixels)


def _read(path: Path, ordering: Ordering) -> list[np.ndarray]:
    """Every map of a FITS file, float32 (n_pixels,) each."""
    try:
        maps, header = healpy.read_map(path, field=None, dtype=np.float32, nest=None, h=True)
    except (OSError, ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
        reason = str(error).splitlines()[0][:160] if str(error) else type(error).__name__
        raise BadSimulationError(f"{path} is no HEALPix map in FITS ({reason}); give full-sky maps") from None
    said = dict((key, value) for key, value in header)
    if str(said.get("INDXSCHM", "IMPLICIT")).strip() == "EXPLICIT":
        raise BadSimulationError(f"{path} covers a part of the sky; {_WHOLE}")
    order = str(said.get("ORDERING", "")).strip().upper() if ordering == "auto" else ordering
    order = {"NESTED": "NEST"}.get(order, order)
    if order not in get_args(Ordering):
        raise BadSimulationError(f"{path} does not say how its pixels are ordered; add --ordering RING or NEST")
    found = []
    for one in np.atleast_2d(maps):
        if (hidden := ~np.isfinite(one) | healpy.mask_bad(one)).any():
            raise BadSimulationError(f"{path} has {hidden.sum()} masked pixels; {_WHOLE}")
        if (share := float(np.mean(one == 0))) > MAX_SHARE_OF_ZEROS:
            raise BadSimulationError(f"{path} is exactly zero in {100 * share:.1f} % of its pixels (a mask?); {_WHOLE}")
        found.append(healpy.reorder(one, n2r=True) if order == "NEST" else one)
    return found


_WHOLE = "tiles are whole base faces of the sky in several orientations, so give maps without a mask"
