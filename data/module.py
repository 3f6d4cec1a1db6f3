"""TileDataModule: the tiles of a survey, split, normalised, on the device, in batches."""

from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from common.errors import UserError
from data.audit import Audit
from data.check import read_and_split
from data.config import SplitOptions, TilesOn
from data.dataset import TileDataset, whole_dataset
from data.noiseless import read_noiseless
from data.norm_stats import NORM_STATS_NAME, NormStats, compute_norm_stats
from data.split import PERCENT, SplitManifest, fingerprint_of
from data.tiles import Tiles


@dataclass(frozen=True)
class SplitTiles:
    """Tiles that are ready to train with.

    Attributes:
        tiles_dir, tiles: folder of the shards, and the data set in physical units.
        params, theta: names of the inferred parameters, and their physical values, float64 (n, d).
        manifest, norm_stats, audit: as made or given, and what the splits share.
        fingerprints: of the tiles, and of those without noise, None if there are none.
        seen: cosmologies (n, 8) of the simulations that are not held out, in the order of PARAM_NAMES.
        compressor_train_ds, npe_train_ds, test_ds, fiducial_ds: one TileDataset per split, not augmented.
    """

    tiles_dir: Path
    tiles: Tiles
    params: tuple[str, ...]
    theta: np.ndarray
    manifest: SplitManifest
    norm_stats: NormStats
    audit: Audit
    fingerprints: dict[str, str | None]
    seen: np.ndarray
    compressor_train_ds: TileDataset
    npe_train_ds: TileDataset
    test_ds: TileDataset
    fiducial_ds: TileDataset

    @property
    def provenance(self) -> dict[str, Any]:
        """What best.ckpt says of its data.

        By the hashes of the split and the normalisation stage 2 finds out if one was exchanged; by the cosmologies
        --init-from knows whether its weights have seen the fiducial one.
        """
        hashes = {"manifest_sha256": self.manifest.sha256, "norm_stats_sha256": self.norm_stats.sha256}
        return hashes | {"seen": torch.from_numpy(self.seen)}


@dataclass(frozen=True)
class TileDataModule:
    """Reads the tiles of a folder, splits and normalises them.

    Without a manifest and norm stats, `setup()` makes them (stage 1); those of a stage-1 run it uses, and refuses tiles
    that do not fit (stage 2).

    Attributes:
        tiles_dir, options: folder of the shards; which tiles they must be, how they are split and audited.
        params, device, dtype, tiles_on: as for whole_dataset.
        reserve: bytes of the device's free memory that the network needs, given the number of bins.
        noiseless_dir: folder of the same tiles without noise, from which training makes tiles with other noise.
        manifest, norm_stats: of a stage-1 run (norm_stats alone: of the run that --init-from names).
    """

    tiles_dir: Path
    options: SplitOptions
    params: tuple[str, ...]
    _: KW_ONLY
    device: torch.device
    dtype: torch.dtype = torch.float32
    tiles_on: TilesOn = "auto"
    reserve: Callable[[int], int] = lambda n_bins: 0
    noiseless_dir: Path | None = None
    manifest: SplitManifest | None = None
    norm_stats: NormStats | None = None

    def setup(self) -> SplitTiles:
        """Read, split, audit, normalise, move to the device.

        Raises:
            UserError: bad shards, too few tiles, or tiles that do not fit the manifest or the norm stats.
        """
        data = read_and_split(self.tiles_dir, self.options, self.manifest)
        tiles, train = data.tiles, data.rows["compressor_train"]
        theta = tiles.columns(self.params)
        of_train = compute_norm_stats(theta[train], data.moments.of(train))  # refuses what is constant
        norm_stats = self.norm_stats or of_train
        found = len(norm_stats.tile_mean), len(norm_stats.theta_mean)
        if found != (tiles.n_bins, len(self.params)):
            has = f"{NORM_STATS_NAME} has {found[0]} bins and {found[1]} parameters"
            raise UserError(
                f"{has}, the tiles {tiles.n_bins} and --params {len(self.params)}; run stage 1 on these tiles, without "
                "--init-from"
            )
        # Sums of tiles are taken in float32, so where there are any, no tile is held in less.
        dtype = self.dtype if self.noiseless_dir is None else torch.float32
        place = (self.params, norm_stats, self.device, dtype, self.tiles_on, self.reserve(tiles.n_bins))
        everything = whole_dataset(tiles, *place, "tiles")
        fingerprints, signal = {"tiles": data.manifest.fingerprint, "noiseless_tiles": None}, None
        if self.noiseless_dir is not None:
            noiseless = read_noiseless(self.noiseless_dir, tiles)
            fingerprints["noiseless_tiles"] = fingerprint_of(noiseless)
            signal = whole_dataset(noiseless, *place, "noiseless tiles").source
        splits = {
            name: TileDataset(everything.source, everything.theta, rows, self.device, signal, tiles.keys)
            for name, rows in data.rows.items()
        }
        return SplitTiles(
            tiles_dir=self.tiles_dir,
            tiles=tiles,
            params=self.params,
            theta=theta,
            manifest=data.manifest,
            norm_stats=norm_stats,
            audit=data.audit,
            fingerprints=fingerprints,
            seen=np.unique(tiles.params[np.concatenate([data.rows[name] for name in PERCENT])], axis=0),
            compressor_train_ds=splits["compressor_train"],
            npe_train_ds=splits["npe_train"],
            test_ds=splits["test"],
            fiducial_ds=splits["fiducial"],
        )
