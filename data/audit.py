"""Audit of tiles before a training: what the splits share, odd tiles, and the fiducial's place among the others."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from common.artifacts import tiles_folder
from common.errors import UserError
from data.band_limit import band_limit_problem
from data.cache import read_tiles_through_cache
from data.config import CheckConfig
from data.moments import Moments, square_symmetries
from data.schema import FACES, PARAM_NAMES
from data.shards import Tiles, read_orientations
from data.sky import Orientations, covered_patches, overlap_matrix
from data.split import make_manifest, split_indices

# Of a pixel's value plus its bin's rms: twice the rounding of float32, where two tiles of two skies differ by the rms.
TWIN_TOLERANCE = 2.0**-22
MAX_CANDIDATES = 20  # with sketches that agree; tiles that are not twins have none in practice
SHARED_SKY = 0.5  # of a tile; two tiles that share more count as one patch of sky
TOLERATED_LEAK = 0.01  # of a split's tiles

# In robust sigmas of ln variance, the scale being that of differences between neighbours: offsets from a median would
# be too small where a simulation has few tiles, or has them twice. Of 791 simulations at lmax 64 and 200 and of 40 at
# 600, noiseless to des_y3, no tile lay beyond 4.8. A tile times 1.5 then lies at 10 +- 1 at lmax 64 (3 of 10,000 below
# 6) and at 20 or beyond at 200, one of noise alone at 13 or beyond. At lmax 32 a factor of 1.5 does not show.
OUTLIER_SIGMA = 6.0
MIN_TILES = 8  # of a simulation, else its median says too little
MIN_JUDGED = 120  # tiles in all, else their scatter says too little
SMALLEST_VARIANCE = 1e-12  # of the median tile's; stands for that of a constant tile
N_LISTED = 5  # outliers
MEDIAN_TO_SIGMA = 1.4826  # of the absolute values of a normal variable


@dataclass(frozen=True)
class Partners:
    """Tiles of one split that a split before it has too: the same pixels, or the same pixels or most of the sky.

    The second is None where it is unknown where the tiles lie.
    """

    n_tiles: int
    twin: int
    twin_fraction: float
    twin_or_sky: int | None
    twin_or_sky_fraction: float | None


@dataclass(frozen=True)
class Outlier:
    """A tile whose variance in a bin (from 0) is `factor` times the median of its simulation, `sigma` robust sigmas."""

    key: list[int]
    bin: int
    factor: float
    sigma: float


@dataclass(frozen=True)
class Fiducial:
    """The fiducial simulation: parameters that lie outside the range of the others, and its distinct patches of sky.

    `patch_of_tile` numbers the patch of every tile from 0, in the canonical order. Where it is unknown
    where the tiles lie, patches are told apart by twins alone.
    """

    sim_id: int
    outside: list[str]
    n_patches: int
    patch_of_tile: list[int]


@dataclass(frozen=True)
class Audit:
    """What was found.

    Attributes:
        n_tiles, n_sims: of the data set.
        n_twins: tiles that are the same pixels as another one.
        n_twins_across_sims: tiles that are the same pixels as one of a simulation before theirs.
        twins_across_sims: keys of such a tile and of its twin; empty if there is none.
        covered_patches: sky that a simulation's tiles cover together, in tiles; None if unknown.
        partners: for every split but the first, if it has tiles: what an earlier training has seen of it.
        n_variance_outliers: tiles with a bin beyond OUTLIER_SIGMA.
        variance_outliers: the worst of them, each in its worst bin.
        band_limit: what contradicts their lmax, in words; empty if nothing does.
        ranges: of each parameter over all simulations but the fiducial one: [minimum, maximum].
        fiducial: None if the data set does not have it.
    """

    n_tiles: int
    n_sims: int
    n_twins: int
    n_twins_across_sims: int
    twins_across_sims: list[list[int]]
    covered_patches: float | None
    partners: dict[str, Partners]
    n_variance_outliers: int
    variance_outliers: list[Outlier]
    band_limit: str
    ranges: dict[str, list[float]]
    fiducial: Fiducial | None

    def to_json(self) -> dict[str, Any]:
        """Plain JSON types."""
        return asdict(self)

    def warnings(self) -> list[str]:
        """One line for everything that a user should know before training."""
        lines = []
        if leaks := [_leak(name, p) for name, p in self.partners.items() if _worst(p) > TOLERATED_LEAK]:
            lines.append(
                f"{'; '.join(leaks)}: what is measured on them is optimistic; `--split-by sim` deals out whole "
                "simulations, `run_mock.py --geometry disjoint` makes tiles that share nothing"
            )
        if self.covered_patches is None and self.n_twins:
            lines.append(
                f"{self.n_twins} tiles are the same pixels as another, and the shards do not say where tiles lie: how "
                "much sky they share is unknown; if they are the published ones, add `--geometry published`"
            )
        if self.n_twins_across_sims:
            one, other = map(_tile, self.twins_across_sims)
            lines.append(
                f"{one} and {other} are the same pixels ({self.n_twins_across_sims} such tiles): one of them has the "
                "wrong cosmology; rebuild their shards"
            )
        if self.variance_outliers:
            worst = self.variance_outliers[0]
            lines.append(
                f"{_tile(worst.key)} has {worst.factor:.2g} times the variance of its simulation's tiles in bin "
                f"{worst.bin} ({self.n_variance_outliers} tiles lie beyond {OUTLIER_SIGMA} robust sigmas); look at "
                "them and rebuild their shards"
            )
        if self.band_limit:
            lines.append(f"the tiles are not what --lmax says: {self.band_limit}; see to --lmax and --tiles-dir")
        if self.fiducial and self.fiducial.outside:
            lines.append(
                f"the fiducial simulation {self.fiducial.sim_id} lies outside the range of the others in "
                f"{', '.join(self.fiducial.outside)}: its Figure of Merit is an extrapolation; give another "
                "--fiducial-sim-id"
            )
        return lines


def _worst(partners: Partners) -> float:
    return max(partners.twin_fraction, partners.twin_or_sky_fraction or 0.0)


def _leak(name: str, partners: Partners) -> str:
    text = f"{partners.twin_fraction:.0%} of the {partners.n_tiles} {name} tiles have a twin in an earlier split"
    if partners.twin_or_sky_fraction is not None:
        text += f", {partners.twin_or_sky_fraction:.0%} a twin or most of their sky"
    return text


def _tile(key: list[int]) -> str:
    sim, orientation, tile = key
    return f"tile (sim {sim}, orientation {orientation}, tile {tile})"


def audit_tiles(
    tiles: Tiles,
    moments: Moments,
    splits: dict[str, np.ndarray],
    fiducial_sim_id: int,
    orientations: Orientations | None,
) -> Audit:
    """Audit a data set.

    Args:
        tiles, moments: the data set.
        splits: for every split the positions in `tiles` of its tiles (data.split.split_indices), in the order in
            which they are used: compressor_train, npe_train, test, fiducial.
        fiducial_sim_id: held out of the ranges; may be absent.
        orientations: where the tiles lie; empty if they have no common sky, None if unknown.

    Raises:
        UserError: tiles that have no place in the orientations.
    """
    n, sim_ids = len(tiles.keys), tiles.keys[:, 0]
    sky = None if orientations is None else shared_sky_pairs(tiles.keys, orientations)
    twins = twin_pairs(tiles.kappa, moments)
    twin_group = groups_of(n, twins)
    patch = twin_group if sky is None else groups_of(n, np.concatenate([twins, sky]))

    across = np.flatnonzero(has_earlier(twin_group, sim_ids))
    example = [across[0], np.argmax(twin_group == twin_group[across[0]])] if len(across) else []
    outliers = variance_outliers(tiles.keys, moments.variance)
    is_fiducial = sim_ids == fiducial_sim_id
    others = tiles.params[~is_fiducial]
    ranges = {name: [float(v.min()), float(v.max())] for name, v in zip(PARAM_NAMES, others.T, strict=True)}
    return Audit(
        n_tiles=n,
        n_sims=len(np.unique(sim_ids)),
        n_twins=int((np.bincount(twin_group)[twin_group] > 1).sum()),
        n_twins_across_sims=len(across),
        twins_across_sims=tiles.keys[example].tolist(),
        covered_patches=None if orientations is None else covered_patches(orientations),
        partners=count_partners(splits, twin_group, None if sky is None else patch),
        n_variance_outliers=len(outliers),
        variance_outliers=outliers[:N_LISTED],
        band_limit="" if orientations == () else band_limit_problem(tiles.kappa, tiles.lmax),
        ranges=ranges,
        fiducial=_fiducial(fiducial_sim_id, tiles.params[is_fiducial], ranges, patch[is_fiducial]),
    )


def count_partners(
    splits: dict[str, np.ndarray], twin_group: np.ndarray, patch: np.ndarray | None
) -> dict[str, Partners]:
    """Partners of every split but the first, by groups_of twins and of twins and shared sky, (n_tiles,) each."""
    split_of = np.full(len(twin_group), len(splits))
    for number, rows in enumerate(splits.values()):
        split_of[rows] = number
    twin = has_earlier(twin_group, split_of)
    both = None if patch is None else has_earlier(patch, split_of)
    return {
        name: Partners(
            n_tiles=len(rows),
            twin=int(twin[rows].sum()),
            twin_fraction=float(twin[rows].mean()),
            twin_or_sky=None if both is None else int(both[rows].sum()),
            twin_or_sky_fraction=None if both is None else float(both[rows].mean()),
        )
        for name, rows in list(splits.items())[1:]
        if len(rows)
    }


def _fiducial(sim_id: int, params: np.ndarray, ranges: dict[str, list[float]], patch: np.ndarray) -> Fiducial | None:
    if not len(params):
        return None
    outside = [
        name for name, v in zip(PARAM_NAMES, params[0], strict=True) if not ranges[name][0] <= v <= ranges[name][1]
    ]
    distinct, label = np.unique(patch, return_inverse=True)
    return Fiducial(sim_id, outside, len(distinct), label.tolist())


# ---------------------------------------------------------------- tiles that belong together


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
    """Pairs of tiles of one simulation that share more than SHARED_SKY of their sky.

    Args:
        keys: (n, 3) sim_id, orientation_id, tile_id.
        orientations: where the tiles lie; empty if they have no common sky.

    Returns:
        int (m, 2), rows of keys.

    Raises:
        UserError: an orientation or a tile that the orientations do not have.
    """
    if not orientations:
        return np.empty((0, 2), dtype=np.int64)
    fits = ((keys[:, 1:] >= 0) & (keys[:, 1:] < (len(orientations), len(FACES)))).all(axis=1)
    if not fits.all():
        raise UserError(
            f"{_tile(keys[np.argmin(fits)].tolist())} has no place among {len(orientations)} orientations of "
            f"{len(FACES)} tiles; leave out --geometry, or rebuild its shard"
        )
    overlap = overlap_matrix(orientations)
    sims, sim = np.unique(keys[:, 0], return_inverse=True)
    row = np.full((len(sims), len(overlap)), -1)
    row[sim, keys[:, 1] * len(FACES) + keys[:, 2]] = np.arange(len(keys))
    pairs = row[:, np.argwhere(np.triu(overlap > SHARED_SKY, 1))].reshape(-1, 2)  # (n_sims, m, 2) -> (n_sims * m, 2)
    return pairs[(pairs >= 0).all(axis=1)]


# ---------------------------------------------------------------- pixels


def twin_pairs(kappa: np.ndarray, moments: Moments) -> np.ndarray:
    """Tiles that are the same pixels up to a symmetry of the square, in whatever simulation.

    Tiles are sorted by a sketch; only those whose sketches agree are compared, with the first of any
    twins only and with MAX_CANDIDATES at most, so that a thousand constant tiles take no million comparisons.

    Args:
        kappa: (n, 4, N, N).
        moments: of kappa.

    Returns:
        int (m, 2): the row of every tile that has a twin before it in that order, and of the first such.
    """
    sketch, rms = moments.sketch, moments.rms
    # By Cauchy and Schwarz the sketches of twins differ by no more than this.
    reach = 2 * TWIN_TOLERANCE * np.sqrt(np.square(rms).mean(axis=1))  # (n,)
    pairs: list[tuple[int, int]] = []
    firsts: list[int] = []
    for i in np.argsort(sketch[:, 0]):
        twin = None
        for first in islice(reversed(firsts), MAX_CANDIDATES):
            apart = np.abs(sketch[i] - sketch[first])  # (N_SKETCHES,)
            if apart[0] > reach[i]:
                break
            if (apart <= reach[i]).all() and _are_twins(kappa[i], kappa[first], rms[first]):
                twin = first
                break
        if twin is None:
            firsts.append(i)
        else:
            pairs.append((i, twin))
    return np.array(pairs, dtype=np.int64).reshape(-1, 2)


def _are_twins(tile: np.ndarray, other: np.ndarray, rms: np.ndarray) -> bool:
    """Whether two tiles (4, N, N) agree under a symmetry of the square; rms (4,) of a bin's pixels."""

    def agree(a: np.ndarray, b: np.ndarray) -> bool:
        return bool((np.abs(a - b) <= TWIN_TOLERANCE * (np.abs(b) + rms[:, None, None])).all())

    # The first row alone tells most symmetries apart.
    return any(agree(tile[:, :1], turned[:, :1]) and agree(tile, turned) for turned in square_symmetries(other))


def variance_outliers(keys: np.ndarray, variance: np.ndarray) -> list[Outlier]:
    """Tiles whose ln variance in a bin is far from the median of their simulation, the worst first.

    Simulations of fewer than MIN_TILES tiles are left out, and a data set of fewer than MIN_JUDGED tiles altogether.

    Args:
        keys: (n, 3), in the canonical order.
        variance: (n, 4) of every bin.
    """
    floor = SMALLEST_VARIANCE * np.median(variance, axis=0) + np.finfo(np.float64).tiny  # (4,)
    ln_variance = np.log(np.maximum(variance, floor))  # (n, 4)
    sims = np.split(np.arange(len(keys)), np.flatnonzero(np.diff(keys[:, 0])) + 1)
    sims = [rows for rows in sims if len(rows) >= MIN_TILES]
    if sum(map(len, sims)) < MIN_JUDGED:
        return []
    rows = np.concatenate(sims)  # (n_judged,)
    offset = np.concatenate([ln_variance[r] - np.median(ln_variance[r], axis=0) for r in sims])  # (n_judged, 4)
    steps = np.concatenate([np.diff(ln_variance[r], axis=0) for r in sims])
    sigma = MEDIAN_TO_SIGMA / np.sqrt(2) * np.median(np.abs(steps), axis=0)  # (4,)
    pull = np.divide(offset, sigma, out=np.zeros_like(offset), where=sigma > 0)
    worst_bin = np.abs(pull).argmax(axis=1)  # (n_judged,)
    in_worst_bin = np.arange(len(rows)), worst_bin
    order = np.argsort(-np.abs(pull[in_worst_bin]), kind="stable")
    return [
        Outlier(keys[rows[i]].tolist(), int(b), float(np.exp(offset[i, b])), float(pull[i, b]))
        for i, b in zip(order, worst_bin[order], strict=True)
        if abs(pull[i, b]) > OUTLIER_SIGMA
    ]


# ---------------------------------------------------------------- command


def check_tiles(config: CheckConfig, on_checkpoint: Callable[[], None] = lambda: None) -> dict[str, Any]:
    """Read the tiles of a folder, split them as stage 1 would, audit them.

    Args:
        config: all options.
        on_checkpoint: called at the end: the cache of the tiles may be new (Modal commits its Volume).

    Returns:
        what Audit.to_json gives, and warnings, folder, elapsed_s.

    Raises:
        UserError: bad shards, too few tiles to split, or a geometry that does not fit them.
    """
    start = time.monotonic()
    folder = tiles_folder(config.tiles_dir, config.results_dir, config.lmax, config.noise_level)
    tiles, moments = read_tiles_through_cache(folder, config.lmax, config.noise_level, config.nside)
    manifest = make_manifest(tiles, config.split_seed, config.split_by, config.fiducial_sim_id)
    orientations = read_orientations(folder, config.geometry)
    splits = split_indices(manifest, tiles, folder)
    audit = audit_tiles(tiles, moments, splits, config.fiducial_sim_id, orientations)
    on_checkpoint()
    return {
        **audit.to_json(),
        "warnings": audit.warnings(),
        "folder": str(folder),
        "elapsed_s": round(time.monotonic() - start, 1),
    }
