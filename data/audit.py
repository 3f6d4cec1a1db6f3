"""Audit of tiles before a training: what the splits share, odd tiles, and the fiducial's place among the others."""

from dataclasses import dataclass

import numpy as np

from common.results import key
from data.band_limit import band_limit_problem
from data.duplicates import duplicate_pairs, groups_of, has_earlier, shared_sky_pairs
from data.moments import Moments
from data.schema import name_of_tile
from data.sky import Orientations, covered_patches
from data.tiles import Tiles
from data.variance_outliers import Outlier, variance_outliers

TOLERATED_LEAK = 0.01  # of a split's tiles
N_LISTED = 5  # outliers


@dataclass(frozen=True)
class Leakage:
    """What an earlier split has of the tiles of one split."""

    n_tiles: int = key("of the split")
    duplicates: int = key("tiles whose pixels an earlier split has")
    duplicates_fraction: float = key("of the split's tiles")
    duplicates_or_sky: int | None = key("tiles whose pixels, or most of whose sky, it has; null if unknown")
    duplicates_or_sky_fraction: float | None = key("of the split's tiles")

    @property
    def worst(self) -> float:
        """The larger fraction."""
        return max(self.duplicates_fraction, self.duplicates_or_sky_fraction or 0.0)

    def describe(self, split: str) -> str:
        """In words."""
        text = f"{self.duplicates_fraction:.0%} of {self.n_tiles} {split} tiles have a duplicate in an earlier split"
        if self.duplicates_or_sky_fraction is not None:
            text += f", {self.duplicates_or_sky_fraction:.0%} a duplicate or most of their sky"
        return text


@dataclass(frozen=True)
class Fiducial:
    """The fiducial simulation among the others."""

    sim_id: int = key("its number")
    outside: list[str] = key("parameters that lie outside the range of the other simulations")
    n_patches: int = key("distinct patches of sky; by duplicates alone where it is unknown where tiles lie")
    patch_of_tile: list[int] = key("number of each tile's patch, from 0, in the canonical order")


@dataclass(frozen=True)
class Audit:
    """What was found."""

    n_tiles: int = key("of the data set")
    n_sims: int = key("of the data set")
    n_duplicates: int = key("tiles that are the same pixels as another one")
    n_duplicates_across_sims: int = key("tiles that are the same pixels as one of a simulation before theirs")
    duplicates_across_sims: list[list[int]] = key("keys of such a tile and of its duplicate; empty if there is none")
    covered_patches: float | None = key("sky that a simulation's tiles cover together, in tiles; null if unknown")
    leakage: dict[str, Leakage] = key("for every split but the first, if it has tiles: what an earlier split has of it")
    n_variance_outliers: int = key("tiles whose variance in a bin is far from the rest of their simulation")
    variance_outliers: list[Outlier] = key("the worst of them, each in its worst bin")
    band_limit: str = key("what contradicts their lmax, in words; empty if nothing does")
    ranges: dict[str, list[float]] = key(
        "minimum and maximum of each parameter in the splits, without the fiducial simulation"
    )
    fiducial: Fiducial | None = key("the fiducial simulation; null if the data set does not have it")

    def warnings(self) -> list[str]:
        """One line for everything that a user should know before training: what is wrong, and what to do."""
        lines = []
        if leaks := [leak.describe(split) for split, leak in self.leakage.items() if leak.worst > TOLERATED_LEAK]:
            cure = "split whole simulations (--split-by sim), or make other tiles (`run_mock.py --geometry disjoint`)"
            lines.append(f"{'; '.join(leaks)}: what is measured on them is optimistic; {cure}")
        if self.covered_patches is None and self.n_duplicates:
            found = (
                f"{self.n_duplicates} tiles are the same pixels as another, and the shards do not say where they lie"
            )
            lines.append(f"{found}; if they are the published ones, add --geometry published")
        if self.n_duplicates_across_sims:
            one, other = map(name_of_tile, self.duplicates_across_sims)
            found = f"{one} and {other} are the same pixels ({self.n_duplicates_across_sims} such tiles)"
            lines.append(f"{found}, so one has the wrong cosmology; rebuild their shards")
        if self.variance_outliers:
            worst = self.variance_outliers[0]
            found = f"{name_of_tile(worst.key)} has {worst.factor:.2g} times the variance of its simulation's tiles"
            far = f"{worst.sigma:.0f} robust sigmas away; {self.n_variance_outliers} such tiles"
            lines.append(f"{found} in bin {worst.bin} ({far}); rebuild their shards")
        if self.band_limit:
            lines.append(f"the tiles are not what --lmax says: {self.band_limit}; check --lmax and --tiles-dir")
        if self.fiducial and self.fiducial.outside:
            found = f"the fiducial simulation {self.fiducial.sim_id} lies outside the range of the others"
            cure = "its Figure of Merit is an extrapolation, give another --fiducial-sim-id"
            lines.append(f"{found} in {', '.join(self.fiducial.outside)}; {cure}")
        return lines


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
        splits: positions in `tiles` of every split's tiles, in the order in which the splits are used.
        fiducial_sim_id: held out of the ranges, which are those of the other tiles that are split; may be absent.
        orientations: where the tiles lie; empty if they have no common sky, None if unknown.

    Raises:
        UserError: tiles that have no place in the orientations.
    """
    n, sim_ids = len(tiles.keys), tiles.keys[:, 0]
    sky = None if orientations is None else shared_sky_pairs(tiles.keys, orientations)
    duplicates = duplicate_pairs(tiles.kappa, moments)
    group = groups_of(n, duplicates)
    patch = group if sky is None else groups_of(n, np.concatenate([duplicates, sky]))

    across = np.flatnonzero(has_earlier(group, sim_ids))
    example = [across[0], np.argmax(group == group[across[0]])] if len(across) else []
    outliers = variance_outliers(tiles.keys, moments.variance, tiles.nuisances)
    is_fiducial = sim_ids == fiducial_sim_id
    others = np.isin(np.arange(n), np.concatenate(list(splits.values()))) & ~is_fiducial
    ranges = {name: [float(v[others].min()), float(v[others].max())] for name, v in tiles.labels.items()}
    return Audit(
        n_tiles=n,
        n_sims=len(np.unique(sim_ids)),
        n_duplicates=int((np.bincount(group)[group] > 1).sum()),
        n_duplicates_across_sims=len(across),
        duplicates_across_sims=tiles.keys[example].tolist(),
        covered_patches=None if orientations is None else covered_patches(orientations),
        leakage=leakage_of(splits, group, None if sky is None else patch),
        n_variance_outliers=len(outliers),
        variance_outliers=outliers[:N_LISTED],
        band_limit="" if orientations == () else band_limit_problem(tiles.kappa, tiles.lmax),
        ranges=ranges,
        fiducial=_fiducial(
            fiducial_sim_id, {k: v[is_fiducial] for k, v in tiles.labels.items()}, ranges, patch[is_fiducial]
        ),
    )


def leakage_of(splits: dict[str, np.ndarray], group: np.ndarray, patch: np.ndarray | None) -> dict[str, Leakage]:
    """Leakage of every split but the first, from groups_of duplicates, and of duplicates and sky, (n_tiles,) each."""
    split_of = np.full(len(group), len(splits))
    for number, rows in enumerate(splits.values()):
        split_of[rows] = number
    duplicates = has_earlier(group, split_of)
    both = None if patch is None else has_earlier(patch, split_of)
    return {
        name: Leakage(
            n_tiles=len(rows),
            duplicates=int(duplicates[rows].sum()),
            duplicates_fraction=float(duplicates[rows].mean()),
            duplicates_or_sky=None if both is None else int(both[rows].sum()),
            duplicates_or_sky_fraction=None if both is None else float(both[rows].mean()),
        )
        for name, rows in list(splits.items())[1:]
        if len(rows)
    }


def _fiducial(
    sim_id: int, labels: dict[str, np.ndarray], ranges: dict[str, list[float]], patch: np.ndarray
) -> Fiducial | None:
    if not len(patch):
        return None
    outside = [name for name, v in labels.items() if v.min() < ranges[name][0] or v.max() > ranges[name][1]]
    distinct, label = np.unique(patch, return_inverse=True)
    return Fiducial(sim_id, outside, len(distinct), label.tolist())
