"""Full-sky convergence maps from FITS files."""

from pathlib import Path

import healpy
import numpy as np

from data.ingest.config import Ordering
from data.ingest.lightcone import BadSimulationError, reason_of

SUFFIXES = (".fits", ".fit", ".fits.gz", ".fits.fz")
MAX_SHARE_OF_ZEROS = 1e-3  # convergence is a real number: many exact zeros are a mask
_WHOLE = "tiles cover the whole sky, so give maps without a mask"


def read_kappa_maps(source: Path, ordering: Ordering) -> np.ndarray:
    """Convergence of one simulation in every bin, float32 (n_bins, 12 nside^2), in RING order.

    The source is a FITS file with a map per bin, or a folder with a FITS file per bin, in the order of their names. The
    ordering of its pixels may be "auto", which takes it from the header.

    Raises:
        BadSimulationError: the maps are not whole maps of one nside; names the file and the reason.
    """
    files = sorted(path for path in source.iterdir() if path.name.endswith(SUFFIXES)) if source.is_dir() else [source]
    if not files:
        raise BadSimulationError(f"{source} holds no FITS file; put a full-sky map per bin there")
    maps = [one for path in files for one in _read(path, ordering)]
    if len(files) > 1 and len(maps) > len(files):
        raise BadSimulationError(f"{source} holds several FITS files with several maps in one; give a map per file")
    if len(sizes := {len(one) for one in maps}) != 1:
        raise BadSimulationError(f"{source} holds maps of {sorted(sizes)} pixels; all bins need the same nside")
    return np.stack(maps)  # (n_bins, n_pixels)


def _read(path: Path, ordering: Ordering) -> list[np.ndarray]:
    """Every map of a FITS file, float32 (n_pixels,) each, in RING order."""
    try:
        maps, header = healpy.read_map(path, field=None, dtype=np.float32, nest=None, h=True)
    except (OSError, ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
        raise BadSimulationError(f"{path} is not a HEALPix map in FITS ({reason_of(error)})") from None
    stated = dict(header)
    if str(stated.get("INDXSCHM", "IMPLICIT")).strip() == "EXPLICIT":
        raise BadSimulationError(f"{path} covers only part of the sky; {_WHOLE}")
    order = str(stated.get("ORDERING", "")).strip().upper() if ordering == "auto" else ordering
    if order not in ("RING", "NEST", "NESTED"):
        raise BadSimulationError(f"{path} does not state the order of its pixels; add --ordering RING or NEST")
    found = []
    for one in np.atleast_2d(maps):
        if (masked := ~np.isfinite(one) | healpy.mask_bad(one)).any():
            raise BadSimulationError(f"{path} has {masked.sum()} masked pixels; {_WHOLE}")
        if (share := float(np.mean(one == 0))) > MAX_SHARE_OF_ZEROS:
            raise BadSimulationError(f"{path} is exactly zero in {100 * share:.1f} % of its pixels (a mask?); {_WHOLE}")
        found.append(one if order == "RING" else healpy.reorder(one, n2r=True))
    return found
