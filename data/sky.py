"""Where the twelve tiles of a simulation lie on its sky, and how much of it they share. No HEALPix library is needed.

A simulation's sky is turned once per orientation, and the equatorial HEALPix base faces of each turned sky are its
tiles.
"""

from functools import cache

import numpy as np

from data.schema import FACES, TILES_PER_SIM

# ZYZ Euler angles in degrees (first about z, then about the original y, then about the original z), one row
# per orientation_id. Empty: the tiles are cut out of no common sky.
Orientations = tuple[tuple[float, float, float], ...]

# "disjoint" brings the twelve equatorial faces onto the centres of the twelve HEALPix base faces. "published" is the
# geometry of EiffL/GowerStreetDESY3, whose tiles overlap; it is stated there as (0, 0, 0), (0, 90, 0), (90, 0, 0) for
# turning the frame, and these angles turn the sky, hence the signs.
ORIENTATIONS: dict[str, Orientations] = {
    "disjoint": ((0.0, 0.0, 0.0), (45.0, 90.0, 45.0), (135.0, 90.0, 45.0)),
    "published": ((0.0, 0.0, 0.0), (0.0, -90.0, 0.0), (-90.0, 0.0, 0.0)),
}
FACE_AREA = 1 / 12  # of the sphere: HEALPix base faces are equal in area
N_POINTS = 100_000  # that areas are counted with; good to 0.1 % of a tile


def rotation(angles: np.ndarray) -> np.ndarray:
    """Matrix (3, 3) that moves a direction as ZYZ angles (3,) in radians turn the sky (ducc0.sht.rotate_alm)."""
    psi, theta, phi = angles
    return _about_z(phi) @ _about_y(theta) @ _about_z(psi)


def _about_z(angle: float) -> np.ndarray:
    c, s = np.cos(angle), np.sin(angle)
    return np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]])


def _about_y(angle: float) -> np.ndarray:
    c, s = np.cos(angle), np.sin(angle)
    return np.array([[c, 0, s], [0, 1, 0], [-s, 0, c]])


def equatorial_face(points: np.ndarray) -> np.ndarray:
    """The equatorial HEALPix base face that holds each unit vector (n, 3): int (n,), -1 where it is a polar one.

    Gorski et al. 2005, astro-ph/0409513, section 5: the edges of the equatorial faces are the lines on which
    1/2 + t - s or 1/2 + t + s is an integer, with s = 3 z / 4 and t = phi / (pi / 2). Beyond their tips, |z| > 2/3,
    the two are more than 1 apart and never have the same integer part.
    """
    x, y, z = points.T
    s, t = 0.75 * z, np.arctan2(y, x) / (np.pi / 2)
    falling, rising = np.floor(0.5 + t - s), np.floor(0.5 + t + s)
    return np.where(falling == rising, FACES[0] + falling % len(FACES), -1).astype(int)


def tile_centres(orientations: Orientations) -> np.ndarray:
    """Unit vectors (n_tiles, 3) of the tiles' centres on the unturned sky: four faces per orientation, in turn."""
    longitude = np.arange(len(FACES)) * np.pi / 2
    centres = np.stack([np.cos(longitude), np.sin(longitude), np.zeros(len(FACES))], axis=1)  # (4, 3)
    return np.concatenate([centres @ rotation(angles) for angles in np.radians(orientations)])


def tiles_at(points: np.ndarray, orientations: Orientations) -> np.ndarray:
    """Which tiles hold given directions of the unturned sky: unit vectors (n, 3) -> bool (n, n_tiles)."""
    faces = [equatorial_face(points @ rotation(angles).T) for angles in np.radians(orientations)]
    return np.concatenate([face[:, None] == FACES for face in faces], axis=1)


def overlap_matrix(orientations: Orientations) -> np.ndarray:
    """Sky that two tiles of a simulation share, as a fraction of a tile: (12, 12), in the order of tile_centres."""
    if not orientations:
        return np.eye(TILES_PER_SIM)
    inside = tiles_at(_even_points(), orientations).astype(np.float64)
    return inside.T @ inside / (N_POINTS * FACE_AREA)


def covered_patches(orientations: Orientations) -> float:
    """Sky that the tiles of a simulation cover together, in tiles: twelve if none shares any."""
    if not orientations:
        return float(TILES_PER_SIM)
    return float(tiles_at(_even_points(), orientations).any(axis=1).mean() / FACE_AREA)


@cache
def _even_points() -> np.ndarray:
    """Unit vectors (N_POINTS, 3), the same at every call, spread evenly: a Fibonacci lattice."""
    i = np.arange(N_POINTS)
    z, phi = 1 - (2 * i + 1) / N_POINTS, i * np.pi * (3 - np.sqrt(5))
    radius = np.sqrt(1 - z**2)
    return np.stack([radius * np.cos(phi), radius * np.sin(phi), z], axis=1)
