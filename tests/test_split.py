"""The split: exact counts, held-out fiducial, a hash that no library update may change."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from conftest import make_tiles

from common.artifacts import sha256_of_json
from common.errors import UserError
from data.split import make_manifest, read_manifest, split_indices, split_keys, subset_of, write_manifest

# SHA-256 over the keys of every split of 791 simulations at seed 42. A change means that every
# published manifest and every run that shares one would no longer be reproduced: do not edit.
GOLDEN = {
    "tile": "5968e32028a16180a737b0dd5a76211267bcad00b944044295fdc382b47db0d7",
    "sim": "e96a9148a36bfd7a902783e9042a35410668f31863a649d95ce6fe07bbc6c4c7",
}


def all_keys(n_sims: int = 791) -> np.ndarray:
    sim, orientation, tile = np.meshgrid(np.arange(1, n_sims + 1), np.arange(3), np.arange(4), indexing="ij")
    return np.stack([sim.ravel(), orientation.ravel(), tile.ravel()], axis=1)


@pytest.mark.parametrize(
    ("split_by", "counts"), [("tile", (6636, 2370, 474, 12)), ("sim", (553 * 12, 197 * 12, 40 * 12, 12))]
)
def test_791_simulations_split_as_promised_and_forever(split_by: str, counts: tuple[int, ...]) -> None:
    splits = split_keys(all_keys(), 42, split_by, 109)  # type: ignore[arg-type]
    assert tuple(len(keys) for keys in splits.values()) == counts
    together = np.concatenate(list(splits.values()))
    assert len(np.unique(together, axis=0)) == 791 * 12  # every tile once
    for name, keys in splits.items():
        assert (keys[:, 0] == 109).all() if name == "fiducial" else not (keys[:, 0] == 109).any()
    assert sha256_of_json({name: keys.tolist() for name, keys in splits.items()}) == GOLDEN[split_by]


def test_whole_simulations_stay_together() -> None:
    splits = split_keys(all_keys(40), 42, "sim", 109)
    sims = [set(keys[:, 0].tolist()) for keys in splits.values()]
    assert sum(len(s) for s in sims) == len(set.union(*sims)) == 40


def test_each_split_is_a_fair_sample_of_tiles() -> None:
    # Of 9480 tiles a third has each orientation; a split that preferred one would be no random split.
    for keys in list(split_keys(all_keys(), 42, "tile", 109).values())[:3]:
        share = np.bincount(keys[:, 1], minlength=3) / len(keys)
        assert np.abs(share - 1 / 3).max() < 4 * np.sqrt(2 / 9 / len(keys))


def test_another_seed_is_another_split() -> None:
    a, b = (split_keys(all_keys(100), seed, "tile", 109)["test"].tolist() for seed in (42, 43))
    assert a != b


def test_too_few_tiles_are_refused() -> None:
    with pytest.raises(UserError, match=r"too few for a 5 % test split|too few for a 25 % npe_train"):
        split_keys(all_keys(2)[:3], 42, "tile", 109)


def test_subsets_of_the_simulations_nest_and_have_the_fiducial_one() -> None:
    subsets = [set(subset_of(all_keys()[:, 0], n, 42, 109).tolist()) for n in (1, 100, 200, 400, 791)]
    assert [len(subset) for subset in subsets] == [1, 100, 200, 400, 791]
    assert subsets[0] == {109}
    for smaller, larger in pairwise(subsets):
        assert smaller < larger
    assert subsets[1] != set(subset_of(all_keys()[:, 0], 100, 43, 109).tolist())
    # A subset has its share of every split of the whole, also where whole simulations are split.
    for split_by in ("tile", "sim"):
        for name, keys in split_keys(all_keys(), 42, split_by, 109).items():  # type: ignore[arg-type]
            sims = np.unique(keys[:, 0])
            share = np.isin(sims, list(subsets[3])).mean()
            assert share == pytest.approx(400 / 791, abs=0.2) or name == "fiducial"


@pytest.mark.parametrize("split_by", ["tile", "sim"])
def test_a_subset_is_split_as_a_suite_of_these_simulations_and_the_whole_as_ever(split_by: str) -> None:
    tiles = make_tiles(60, 2, 4)
    manifest = make_manifest(tiles, 42, split_by, 109, 40)  # type: ignore[arg-type]
    assert len(manifest.sim_ids) == 40
    rows = np.isin(tiles.keys[:, 0], subset_of(tiles.keys[:, 0], 40, 42, 109))
    alone = replace(tiles, kappa=tiles.kappa[rows], keys=tiles.keys[rows], params=tiles.params[rows])
    assert replace(make_manifest(alone, 42, split_by, 109), fingerprint=manifest.fingerprint) == manifest  # type: ignore[arg-type]
    whole = make_manifest(tiles, 42, split_by, 109)  # type: ignore[arg-type]
    assert make_manifest(tiles, 42, split_by, 109, 60).sha256 == whole.sha256  # type: ignore[arg-type]


def test_subsets_without_sense_are_refused() -> None:
    tiles = make_tiles(60, 2, 4)
    for n_sims, fiducial, message in (
        (61, 109, "--n-sims 61: there are 60 simulations"),
        (20, 999, "--n-sims 20: the fiducial simulation 999, which is in every subset, is not among the tiles"),
        (1, 109, "0 tiles beside the fiducial simulation are too few"),
    ):
        with pytest.raises(UserError, match=message):
            make_manifest(tiles, 42, "tile", fiducial, n_sims)


def test_manifest_survives_the_disk_and_refuses_edits(tmp_path: Path) -> None:
    tiles = make_tiles(8, 2, 4)
    manifest = make_manifest(tiles, 42, "tile", 109)
    write_manifest(tmp_path, manifest)
    again = read_manifest(tmp_path)
    assert again.sha256 == manifest.sha256
    indices = split_indices(again, tiles, tmp_path)
    for name, keys in manifest.splits.items():
        assert np.array_equal(tiles.keys[indices[name]], keys)

    path = tmp_path / "split_manifest.json"
    content = json.loads(path.read_text())
    content["splits"]["test"].append(content["splits"]["compressor_train"].pop())
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"changed after it was written"):
        read_manifest(tmp_path)


def test_a_data_set_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    tiles = make_tiles(8, 2, 4)
    manifest = make_manifest(tiles, 42, "tile", 109)
    other_cosmology = tiles.params.copy()
    other_cosmology[5] *= 1.0 + 1e-12
    for changed in (
        replace(tiles, params=other_cosmology),
        replace(tiles, keys=tiles.keys[:-1], params=tiles.params[:-1]),
        replace(tiles, lmax=6),
    ):
        with pytest.raises(UserError, match=r"not those that stage 1 was trained on"):
            split_indices(manifest, changed, tmp_path)
