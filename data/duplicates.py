"""Tiles that belong together: the same pixels, or most of the same sky."""

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from common.errors import UserError
from data.moments import Moments, square_symmetries
from data.schema import FACES, name_of_tile
from data.sky import Orientations, overlap_matrix

# Largest difference between pixels of duplicates, relative to the pixel's value plus the rms of its bin. It is twice
# the rounding of float32; pixels of different skies differ by about the rms.
TOLERANCE = 2.0**-22
MAX_CANDIDATES = 20  # whose random projections agree; tiles that are no duplicates have none in practice
SHARED_SKY = 0.5  # of a tile; two tiles that share more count as one patch of sky


def groups_of(n_tiles: int, pairs: np.ndarray) -> np.ndarray:
    """Number of the group that each tile belongs to, int (n_tiles,): tiles that pairs (m, 2) link, directly or not."""
    links = coo_array((np.ones(len(pairs), dtype=bool), pairs.T), shape=(n_tiles, n_tiles))
    return connected_components(links, directed=False)[1]


def has_earlier(group: np.ndarray, label: np.ndarray) -> np.ndarray:
    """Whether a tile's group has a tile with a smaller label (split, simulation) than its own: bool (n_tiles,)."""
    smallest = np.full(len(group), label.max(initial=0))
    np.minimum.at(smallest, group, label)
    return smallest[group] < label


def shared_sky_pairs(keys: np.ndarray, orientations: Orientations) -> np.ndarray:
    """Pairs of tiles of one simulation that share more than SHARED_SKY of their sky, int (m, 2), rows of keys.

    Args:
        keys: (n, 3) sim_id, orientation_id, tile_id.
        orientations: where the tiles lie; empty if they have no common sky.

    Raises:
        UserError: an orientation or a tile that the orientations do not have.
    """
    if not orientations:
        return np.empty((0, 2), dtype=np.int64)
    fits = ((keys[:, 1:] >= 0) & (keys[:, 1:] < (len(orientations), len(FACES)))).all(axis=1)
    if not fits.all():
        places = f"{len(orientations)} orientations of {len(FACES)} tiles"
        odd = name_of_tile(keys[np.argmin(fits)])
        raise UserError(f"{odd} has no place among {places}; leave out --geometry, or rebuild its shard")
    overlap = overlap_matrix(orientations)
    sims, sim = np.unique(keys[:, 0], return_inverse=True)
    row = np.full((len(sims), len(overlap)), -1)
    row[sim, keys[:, 1] * len(FACES) + keys[:, 2]] = np.arange(len(keys))
    pairs = row[:, np.argwhere(np.triu(overlap > SHARED_SKY, 1))].reshape(-1, 2)  # (n_sims, m, 2) -> (n_sims * m, 2)
    return pairs[(pairs >= 0).all(axis=1)]


def duplicate_pairs(kappa: np.ndarray, moments: Moments) -> np.ndarray:
    """Tiles that are the same pixels up to a symmetry of the square, in any simulation.

    Tiles are sorted by a random projection, and only those whose projections agree are compared: with the first of
    any duplicates only and with MAX_CANDIDATES at most, so that a thousand constant tiles take no million comparisons.

    Args:
        kappa, moments: (n, bins, N, N), and those of it.

    Returns:
        int (m, 2): the row of every tile that has a duplicate before it in that order, and of the first of them.
    """
    projection, rms = moments.projection, np.sqrt(moments.variance + moments.mean**2)  # (n, ...), (n, bins)
    # By Cauchy and Schwarz the projections of duplicates differ by no more than this.
    reach = 2 * TOLERANCE * np.sqrt(np.square(rms).mean(axis=1))  # (n,)
    pairs: list[tuple[int, int]] = []
    firsts: list[int] = []
    for i in np.argsort(projection[:, 0]):
        candidates = np.array(firsts[-MAX_CANDIDATES:][::-1], dtype=np.int64)
        candidates = candidates[(np.abs(projection[i] - projection[candidates]) <= reach[i]).all(axis=1)]
        first = next((c for c in candidates if _are_duplicates(kappa[i], kappa[c], rms[c])), None)
        if first is None:
            firsts.append(i)
        else:
            pairs.append((i, first))
    return np.array(pairs, dtype=np.int64).reshape(-1, 2)


def _are_duplicates(tile: np.ndarray, other: np.ndarray, rms: np.ndarray) -> bool:
    """Whether two tiles (bins, N, N) agree under a symmetry of the square; rms (bins,) of a bin's pixels."""

    def agree(a: np.ndarray, b: np.ndarray) -> bool:
        return bool((np.abs(a - b) <= TOLERANCE * (np.abs(b) + rms[:, None, None])).all())

    # The first row alone tells most symmetries apart.
    return any(agree(tile[:, :1], turned[:, :1]) and agree(tile, turned) for turned in square_symmetries(other))
