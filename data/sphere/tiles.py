"""Cut the twelve tiles out of a simulated sky: the equatorial HEALPix faces of its three orientations."""

from functools import cache

import ducc0
import numpy as np

from data.schema import FACES, N_ORIENTATIONS
from data.sky import ORIENTATIONS


@cache
def _rings(nside: int) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """The rings that the equatorial faces touch, and where in them every pixel of the four faces is, (4, N, N)."""
    base = ducc0.healpix.Healpix_Base(nside, "RING")
    ring = base.sht_info()
    equatorial = slice(nside - 1, 3 * nside)  # HEALPix rings nside .. 3 nside, counted from 1
    first_pixel = ring["ringstart"][equatorial][0]
    ring = {name: np.ascontiguousarray(values[equatorial]) for name, values in ring.items()}
    ring["ringstart"] = ring["ringstart"] - first_pixel
    face, y, x = np.meshgrid(FACES, np.arange(nside), np.arange(nside), indexing="ij")
    pixel = base.xyf2pix(np.stack([x, y, face], axis=-1)) - first_pixel  # (4, N, N) [face, y, x]
    return ring, pixel.astype(np.int64)


def tiles_of_alm(alm: np.ndarray, lmax: int, nside: int, geometry: str) -> np.ndarray:
    """Cut the twelve tiles, float32 (12, n_bins, N, N) with N = nside, from full skies alm up to lmax.

    The skies are (n_bins, n_alm), or (3, n_bins, n_alm) if every orientation has its own. Orientation 0 with faces 4,
    5, 6, 7, then orientation 1, then 2. Rows are the y and columns the x of the HEALPix xyf scheme. `geometry` is a key
    of ORIENTATIONS.
    """
    ring, pixel = _rings(nside)
    tiles = []
    skies = np.broadcast_to(alm, (N_ORIENTATIONS, *alm.shape[-2:]))
    for angles, full in zip(np.radians(ORIENTATIONS[geometry]), skies, strict=True):
        turned = np.stack([ducc0.sht.rotate_alm(a, lmax, *angles, nthreads=1) for a in full]) if angles.any() else full
        sky = ducc0.sht.synthesis(alm=turned[:, None], spin=0, lmax=lmax, nthreads=1, **ring)[:, 0]  # (bins, pixels)
        tiles.append(sky[:, pixel].transpose(1, 0, 2, 3))  # (bins, faces, N, N) -> (faces, bins, N, N)
    return np.concatenate(tiles).astype(np.float32)  # (12, n_bins, N, N)
