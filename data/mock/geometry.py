"""Where the twelve tiles of a simulation lie: three rotations of the sky, four HEALPix faces of each."""

from __future__ import annotations

from functools import cache

import ducc0
import numpy as np

from data.schema import FACES

# ZYZ Euler angles in degrees (first about z, then about the original y, then about the original z), one row
# per orientation_id. "disjoint" brings the twelve equatorial faces onto the centres of the twelve HEALPix base
# faces. "published" is the geometry of EiffL/GowerStreetDESY3, whose tiles overlap; it is stated there as (0, 0, 0),
# (0, 90, 0), (90, 0, 0) for turning the frame, and these angles turn the sky, hence the signs.
ORIENTATIONS = {
    "disjoint": ((0.0, 0.0, 0.0), (45.0, 90.0, 45.0), (135.0, 90.0, 45.0)),
    "published": ((0.0, 0.0, 0.0), (0.0, -90.0, 0.0), (-90.0, 0.0, 0.0)),
}


@cache
def _rings(nside: int) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Rings that the equatorial faces touch, and the place of every tile pixel among their pixels (4, N, N)."""
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
    """Cut the twelve tiles of one simulation.

    Args:
        alm: (4, n_alm), the full sky of every bin.
        lmax: of the alm.
        nside: pixels per side of a tile.
        geometry: a key of ORIENTATIONS.

    Returns:
        float32 (12, 4, N, N): orientation 0 with faces 4, 5, 6, 7, then orientation 1, then 2. Rows
        are the y and columns the x of the HEALPix xyf scheme.
    """
    ring, pixel = _rings(nside)
    tiles = []
    for angles in np.radians(ORIENTATIONS[geometry]):
        rotated = (
            alm if not angles.any() else np.stack([ducc0.sht.rotate_alm(a, lmax, *angles, nthreads=1) for a in alm])
        )
        sky = ducc0.sht.synthesis(alm=rotated[:, None], spin=0, lmax=lmax, nthreads=1, **ring)[:, 0]  # (4, n_pixels)
        tiles.append(sky[:, pixel].transpose(1, 0, 2, 3))  # (4 bins, 4 faces, N, N) -> (4 faces, 4 bins, N, N)
    return np.concatenate(tiles).astype(np.float32)  # (12, 4, N, N)


def tile_centres(geometry: str) -> np.ndarray:
    """Unit vectors (12, 3) of the tiles' centres on the unrotated sky, in the order of tiles_of_alm."""
    return np.concatenate([_unrotated(_face_centres(), angles) for angles in np.radians(ORIENTATIONS[geometry])])


def tiles_at(points: np.ndarray, geometry: str) -> np.ndarray:
    """Which tiles contain given directions of the unrotated sky.

    Args:
        points: unit vectors (n, 3).

    Returns:
        bool (n, 12), in the order of tiles_of_alm.
    """
    base = ducc0.healpix.Healpix_Base(1, "NEST")  # at nside 1 a pixel is a base face
    inside = []
    for angles in np.radians(ORIENTATIONS[geometry]):
        face = base.vec2pix(points @ _rotation(angles).T)
        inside += [face == f for f in FACES]
    return np.stack(inside, axis=1)


def _rotation(angles: np.ndarray) -> np.ndarray:
    """Matrix (3, 3) that moves a direction as rotate_alm moves the sky."""
    psi, theta, phi = angles
    return _about_z(phi) @ _about_y(theta) @ _about_z(psi)


def _about_z(angle: float) -> np.ndarray:
    c, s = np.cos(angle), np.sin(angle)
    return np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]])


def _about_y(angle: float) -> np.ndarray:
    c, s = np.cos(angle), np.sin(angle)
    return np.array([[c, 0, s], [0, 1, 0], [-s, 0, c]])


def _face_centres() -> np.ndarray:
    return ducc0.healpix.Healpix_Base(1, "NEST").pix2vec(np.array(FACES))


def _unrotated(vectors: np.ndarray, angles: np.ndarray) -> np.ndarray:
    return vectors @ _rotation(angles)
