"""The split of a data set: made once, written as split_manifest.json, loaded by stage 2."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from common import results
from common.artifacts import sha256_of_json
from common.errors import UserError
from data.config import SplitBy
from data.schema import KEY_NAMES
from data.tiles import Tiles, digests_of

# Per cent of what is left without the fiducial simulation; the test split takes the remainder of the rounding.
PERCENT = {"compressor_train": 70, "npe_train": 25, "test": 5}
MANIFEST_NAME = "split_manifest.json"


@dataclass(frozen=True)
class SplitManifest:
    """Which tile is in which split; the tiles of a split are in the canonical order."""

    split_by: SplitBy = results.key("`tile` or `sim`: what the split assigns")
    seed: int = results.key("of the split")
    percent: dict[str, int] = results.key("size of the three splits")
    fiducial_sim_id: int = results.key("simulation that is held out of all splits")
    lmax: int = results.key("of the tiles")
    noise_level: str = results.key("of the tiles")
    fingerprint: str = results.key("SHA-256 of the data set's keys, parameters and pixels")
    key: list[str] = results.key("names of the three numbers that identify a tile")
    splits: dict[str, list[list[int]]] = results.key(
        "the keys of the tiles of `compressor_train`, `npe_train`, `test` and `fiducial`"
    )

    @property
    def sim_ids(self) -> np.ndarray:
        """The simulations that it splits, the fiducial one among them, ascending."""
        return np.unique([key[0] for keys in self.splits.values() for key in keys])

    @property
    def sha256(self) -> str:
        """Hash of the manifest, which checkpoints carry: it protects from a stage 2 on another split than stage 1's."""
        return sha256_of_json(vars(self))


def fingerprint_of(tiles: Tiles) -> str:
    """SHA-256 over lmax, noise level, keys, parameters and pixels in canonical order, however the shards were cut.

    It protects from going on with another data set than the one that was split.
    """
    digest = hashlib.sha256(f"{tiles.lmax} {tiles.noise_level}".encode())
    digest.update(np.ascontiguousarray(tiles.keys, dtype="<i8").tobytes())
    digest.update(np.ascontiguousarray(tiles.params, dtype="<f8").tobytes())
    digest.update((digests_of(tiles.kappa) if tiles.digests is None else tiles.digests).tobytes())
    for name, values in tiles.nuisances.items():
        digest.update(name.encode() + np.ascontiguousarray(values, dtype="<f8").tobytes())
    return digest.hexdigest()


def split_keys(keys: np.ndarray, seed: int, split_by: SplitBy, fiducial_sim_id: int) -> dict[str, np.ndarray]:
    """Split the keys (n, 3): the fiducial simulation by itself, and of the rest 70 / 25 / 5 % of tiles or simulations.

    They are shuffled as no library update can change: into the order of SHA-256 over seed and key.

    Raises:
        UserError: too few tiles or simulations to fill every split.
    """
    rest = keys[keys[:, 0] != fiducial_sim_id]
    units = [tuple(key[: 3 if split_by == "tile" else 1]) for key in rest.tolist()]  # what each tile goes with
    shuffled = sorted(set(units), key=lambda unit: _digest(seed, *unit))
    splits, start = {}, 0
    for name, percent in PERCENT.items():
        stop = len(shuffled) if name == "test" else start + len(shuffled) * percent // 100
        chosen = set(shuffled[start:stop])
        if not chosen:
            found = f"{len(shuffled)} {split_by}s beside the fiducial simulation are too few"
            raise UserError(f"{found} for a {percent} % {name} split; more simulations are needed (--n-sims)")
        splits[name] = rest[[unit in chosen for unit in units]]
        start = stop
    return {**splits, "fiducial": keys[keys[:, 0] == fiducial_sim_id]}


def _digest(*words: object) -> bytes:
    """What puts things into an order that looks random, and that no library update can change."""
    return hashlib.sha256(":".join(map(str, words)).encode()).digest()


def subset_of(sim_ids: np.ndarray, n_sims: int, seed: int, fiducial_sim_id: int) -> np.ndarray:
    """The simulations of --n-sims: the fiducial one and the first others in a shuffled order, n_sims in all; 0: all.

    So a smaller subset lies within a larger one of the same seed. The order is not that of split_keys: the first
    simulations of that one are the compressor's own, where the split is one of simulations.

    Args:
        sim_ids: of the simulations that there are, or of their tiles.

    Raises:
        UserError: more than there are, or no fiducial simulation among them.
    """
    sims = np.unique(sim_ids)
    if not n_sims:
        return sims
    if n_sims > len(sims):
        raise UserError(f"--n-sims {n_sims}: there are {len(sims)} simulations; give no more than that, or 0 for all")
    if fiducial_sim_id not in sims:
        missing = f"the fiducial simulation {fiducial_sim_id}, which is in every subset, is not among the tiles"
        raise UserError(f"--n-sims {n_sims}: {missing}; give another --fiducial-sim-id")
    others = [sim for sim in sims.tolist() if sim != fiducial_sim_id]
    others.sort(key=lambda sim: _digest("n_sims", seed, sim))
    return np.array([fiducial_sim_id, *others[: n_sims - 1]])


def make_manifest(tiles: Tiles, seed: int, split_by: SplitBy, fiducial_sim_id: int, n_sims: int = 0) -> SplitManifest:
    """Split a data set, or the subset of n_sims of its simulations as if there were no others.

    It depends on the keys alone, but for the fingerprint, which is that of the whole data set.
    """
    chosen = np.isin(tiles.keys[:, 0], subset_of(tiles.keys[:, 0], n_sims, seed, fiducial_sim_id))
    splits = split_keys(tiles.keys[chosen], seed, split_by, fiducial_sim_id)
    of_tiles = (tiles.lmax, tiles.noise_level, fingerprint_of(tiles), list(KEY_NAMES))
    in_json = {name: keys.tolist() for name, keys in splits.items()}
    return SplitManifest(split_by, seed, PERCENT, fiducial_sim_id, *of_tiles, in_json)


def write_manifest(folder: Path, manifest: SplitManifest) -> None:
    """Write split_manifest.json."""
    results.write_result(folder / MANIFEST_NAME, manifest)


def read_manifest(folder: Path) -> SplitManifest:
    """Read split_manifest.json; UserError if it is missing, not JSON, or changed since it was written."""
    return results.read_result(folder / MANIFEST_NAME, SplitManifest, "stage 1")


def split_indices(manifest: SplitManifest, tiles: Tiles, folder: Path) -> dict[str, np.ndarray]:
    """Positions in `tiles` of every split's tiles; UserError if the manifest was made for another data set."""
    if (found := fingerprint_of(tiles)) != manifest.fingerprint:
        prints = f"fingerprint {found[:12]}, in the manifest {manifest.fingerprint[:12]}"
        problem = f"the tiles in {folder} are not those that stage 1 was trained on ({prints})"
        raise UserError(f"{problem}; give the same tiles as --tiles-dir, or run stage 1 on these")
    row = {tuple(key): i for i, key in enumerate(tiles.keys.tolist())}
    return {name: np.array([row[tuple(k)] for k in keys], int) for name, keys in manifest.splits.items()}
