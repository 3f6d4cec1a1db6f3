"""Read a folder of tiles, split it, audit it: how a training begins, and all that run_check.py does."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from common.artifacts import tiles_folder
from data.audit import Audit, audit_tiles
from data.cache import read_tiles_through_cache
from data.config import CheckConfig, SplitOptions
from data.moments import Moments
from data.nuisance import check_varied
from data.shard_metadata import read_orientations
from data.split import SplitManifest, make_manifest, split_indices
from data.tiles import Tiles


@dataclass(frozen=True)
class AuditedTiles:
    """A data set, its split and its audit; `rows` has the positions in `tiles` of every split's tiles."""

    tiles: Tiles
    moments: Moments
    manifest: SplitManifest
    rows: dict[str, np.ndarray]
    audit: Audit


@dataclass(frozen=True)
class CheckResult:
    """What run_check.py prints."""

    audit: Audit
    folder: str
    elapsed_s: float


def read_and_split(folder: Path, options: SplitOptions, manifest: SplitManifest | None = None) -> AuditedTiles:
    """Read the tiles of a folder, split them as the manifest says, or anew if there is none, and audit them.

    Raises:
        UserError: bad shards, too few tiles to split, or a manifest or geometry that does not fit them.
    """
    tiles, moments = read_tiles_through_cache(folder, options.lmax, options.noise_level, options.nside)
    check_varied(tiles.nuisances, tiles.n_bins, options.nuisance, folder)
    if manifest is None:
        how = (options.split_seed, options.split_by, options.fiducial_sim_id, options.n_sims)
        manifest = make_manifest(tiles, *how)
    rows = split_indices(manifest, tiles, folder)
    orientations = read_orientations(folder, options.geometry)
    audit = audit_tiles(tiles, moments, rows, options.fiducial_sim_id, orientations)
    return AuditedTiles(tiles, moments, manifest, rows, audit)


def check_tiles(config: CheckConfig, on_checkpoint: Callable[[], None] = lambda: None) -> CheckResult:
    """Read the tiles of a folder, split them as stage 1 would, audit them; errors as those of read_and_split.

    At the end it calls `on_checkpoint`, since the cache of the tiles may be new (Modal commits its Volume).
    """
    start = time.monotonic()
    folder = tiles_folder(config.tiles_dir, config.results_dir, config.lmax, config.noise_level, config.nuisance)
    audit = read_and_split(folder, config).audit
    on_checkpoint()
    return CheckResult(audit, str(folder), round(time.monotonic() - start, 1))
