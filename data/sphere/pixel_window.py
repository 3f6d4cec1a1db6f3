"""How much of each multipole survives averaging over HEALPix pixels."""

from functools import cache

import ducc0
import numpy as np
from scipy.special import j0

# Apart from the curvature of the sky, the window depends on ell / nside alone, so one nside serves all. (healpy has
# tables of it, but downloads them on first use.)
NSIDE = 16
POINTS = 16  # per side of a pixel
SHARE_OF_FACE = {0: 8 / 12, 4: 4 / 12}  # polar and equatorial; the other faces are rotations or reflections of these
N_SEPARATIONS = 2000


@cache
def _separations() -> tuple[np.ndarray, np.ndarray]:
    """Distances between two points in a pixel, in units of 1 / nside, and how often each occurs: (n,), (n,)."""
    base = ducc0.healpix.Healpix_Base(NSIDE * POINTS, "NEST")
    counts = np.zeros(N_SEPARATIONS)
    edges = np.linspace(0, 4 / NSIDE, N_SEPARATIONS + 1)  # most pixels are about 1 / nside wide, a few are longer
    for face, share in SHARE_OF_FACE.items():
        # In NEST order the points of a pixel are consecutive.
        pixels = np.arange(NSIDE**2 * POINTS**2) + face * NSIDE**2 * POINTS**2
        points = base.pix2ang(pixels)  # (n, 2): colatitude, longitude
        sin = np.sin(points[:, 0])
        vectors = np.stack([sin * np.cos(points[:, 1]), sin * np.sin(points[:, 1]), np.cos(points[:, 0])], axis=1)
        for pixel in vectors.reshape(NSIDE**2, POINTS**2, 3):  # (pixels, points, 3)
            chord = np.linalg.norm(pixel[:, None] - pixel[None], axis=2)  # (points, points)
            counts += share * np.histogram(chord, edges)[0]
    # A square of m x m points is narrower than the pixel by 1 - 1 / m^2 in its second moment.
    middle = (edges[1:] + edges[:-1]) / 2 * NSIDE / np.sqrt(1 - 1 / POINTS**2)
    middle[0] = 0  # nearly all of these are points paired with themselves
    return middle, counts / counts.sum()


def pixel_window(nside: int, lmax: int) -> np.ndarray:
    """Amplitude (lmax + 1,) of the multipoles of a map whose pixels are means over their area.

    The square is P_ell(cos gamma), at small angles J_0((ell + 1/2) gamma), averaged over all pairs of points in a pixel
    and over all pixels: the definition of the HEALPix pixel window.
    """
    separation, share = _separations()
    ell = np.arange(lmax + 1)
    return np.sqrt(j0((ell[:, None] + 0.5) * separation / nside) @ share) * (ell > 0) + (ell == 0)
