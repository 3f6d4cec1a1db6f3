"""The split of a data set: made once, written as split_manifest.json, loaded by stage 2."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from common.artifacts import read_sealed, sealed, write_json
from common.errors import UserError
from data.config import SplitBy
from data.schema import KEY_NAMES
from data.tiles import Tiles, digests_of

# Per cent of what is left without the fiducial simulation; the test split takes the remainder of the rounding.
PERCENT = {"compressor_train": 70, "npe_train": 25, "test": 5}
SPLIT_NAMES = (*PERCENT, "fiducial")
MANIFEST_NAME = "split_manifest.json"


@dataclass(frozen=True)
class SplitManifest:
    """Which tile is in which split.

    Attributes:
        split_by, seed: single tiles or whole simulations, shuffled by this seed.
        fiducial_sim_id: the simulation held out of all splits but "fiducial".
        lmax, noise_level, fingerprint: of the whole data set.
        splits: for each of SPLIT_NAMES the keys (n, 3) of its tiles, in the canonical order.
    """

    split_by: SplitBy
    seed: int
    fiducial_sim_id: int
    lmax: int
    noise_level: str
    fingerprint: str
    splits: dict[str, np.ndarray]

    def to_json(self) -> dict[str, Any]:
        """JSON content, with `sha256` over all the rest."""
        content = {
            "split_by": self.split_by,
            "seed": self.seed,
            "percent": PERCENT,
            "fiducial_sim_id": self.fiducial_sim_id,
            "lmax": self.lmax,
            "noise_level": self.noise_level,
            "fingerprint": self.fingerprint,
            "key": list(KEY_NAMES),
            "splits": {name: keys.tolist() for name, keys in self.splits.items()},
        }
        return sealed(content)

    @property
    def sha256(self) -> str:
        """Hash of the manifest, which checkpoints carry: it protects from a stage 2 on another split than stage 1's."""
        return str(self.to_json()["sha256"])


def fingerprint_of(tiles: Tiles) -> str:
    """SHA-256 over lmax, noise level, keys, parameters and pixels in canonical order, however the shards were cut.

    It protects from going on with another data set than the one that was split.
    """
    digest = hashlib.sha256(f"{tiles.lmax} {tiles.noise_level}".encode())
    digest.update(np.ascontiguousarray(tiles.keys, dtype="<i8").tobytes())
    digest.update(np.ascontiguousarray(tiles.params, dtype="<f8").tobytes())
    digest.update((digests_of(tiles.kappa) if tiles.digests is None else tiles.digests).tobytes())
    return digest.hexdigest()


def split_keys(keys: np.ndarray, seed: int, split_by: SplitBy, fiducial_sim_id: int) -> dict[str, np.ndarray]:
    """Split the keys (n, 3): the fiducial simulation by itself, and of the rest 70 / 25 / 5 % of tiles or simulations.

    They are shuffled as no library update can change: into the order of SHA-256 over seed and key.

    Raises:
        UserError: too few tiles or simulations to fill every split.
    """
    rest = keys[keys[:, 0] != fiducial_sim_id]
    units = [tuple(key[: 3 if split_by == "tile" else 1]) for key in rest.tolist()]  # what each tile goes with
    shuffled = sorted(set(units), key=lambda unit: hashlib.sha256(":".join(map(str, (seed, *unit))).encode()).digest())
    splits, start = {}, 0
    for name, percent in PERCENT.items():
        stop = len(shuffled) if name == "test" else start + len(shuffled) * percent // 100
        chosen = set(shuffled[start:stop])
        if not chosen:
            found = f"{len(shuffled)} {split_by}s beside the fiducial simulation are too few"
            raise UserError(f"{found} for a {percent} % {name} split; add simulations (run_mock.py --n-sims)")
        splits[name] = rest[[unit in chosen for unit in units]]
        start = stop
    return {**splits, "fiducial": keys[keys[:, 0] == fiducial_sim_id]}


def make_manifest(tiles: Tiles, seed: int, split_by: SplitBy, fiducial_sim_id: int) -> SplitManifest:
    """Split a data set; depends on its keys alone."""
    splits = split_keys(tiles.keys, seed, split_by, fiducial_sim_id)
    return SplitManifest(split_by, seed, fiducial_sim_id, tiles.lmax, tiles.noise_level, fingerprint_of(tiles), splits)


def write_manifest(folder: Path, manifest: SplitManifest) -> None:
    """Write split_manifest.json."""
    write_json(folder / MANIFEST_NAME, manifest.to_json())


def read_manifest(folder: Path) -> SplitManifest:
    """Read split_manifest.json; UserError if it is missing, not JSON, or changed since it was written."""
    path = folder / MANIFEST_NAME
    content = read_sealed(path, "stage 1")
    try:
        splits = {name: np.array(content["splits"][name], dtype=np.int64).reshape(-1, 3) for name in SPLIT_NAMES}
        names = ("split_by", "seed", "fiducial_sim_id", "lmax", "noise_level", "fingerprint")
        return SplitManifest(**{name: content[name] for name in names}, splits=splits)
    except (KeyError, TypeError, ValueError):
        raise UserError(f"{path} is not what this version writes; run stage 1 again") from None


def split_indices(manifest: SplitManifest, tiles: Tiles, folder: Path) -> dict[str, np.ndarray]:
    """Positions in `tiles` of every split's tiles; UserError if the manifest was made for another data set."""
    if (found := fingerprint_of(tiles)) != manifest.fingerprint:
        prints = f"fingerprint {found[:12]}, in the manifest {manifest.fingerprint[:12]}"
        problem = f"the tiles in {folder} are not those that stage 1 was trained on ({prints})"
        raise UserError(f"{problem}; give the same tiles as --tiles-dir, or run stage 1 on these")
    row = {tuple(key): i for i, key in enumerate(tiles.keys.tolist())}
    return {name: np.array([row[tuple(k)] for k in keys.tolist()], int) for name, keys in manifest.splits.items()}
