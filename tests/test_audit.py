"""The audit: duplicates by content, shared sky by geometry, odd tiles, the fiducial; each by another route."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
from conftest import SMALL_LMAX, SMALL_SUITE, make_tiles, write_tiles

import data.duplicates
from common.errors import UserError
from data.audit import Audit, audit_tiles, leakage_of
from data.check import check_tiles
from data.config import CheckConfig
from data.duplicates import duplicate_pairs, groups_of, shared_sky_pairs
from data.mock.config import MockConfig
from data.mock.suite import build_suite
from data.moments import moments_of
from data.read_shards import read_tiles
from data.schema import PARAM_NAMES
from data.shard_metadata import METADATA_KEY, ORIENTATIONS_KEY, read_orientations
from data.sky import ORIENTATIONS, Orientations, covered_patches, overlap_matrix
from data.sphere.harmonics import noise_alm
from data.sphere.tiles import tiles_of_alm
from data.split import make_manifest, split_indices, split_keys
from data.tiles import Tiles
from data.variance_outliers import SMALLEST_VARIANCE, Outlier, variance_outliers
from data.write_shards import open_shard
from npe.fom import bootstrap_median

FIDUCIAL = 109
SMALL = ["--lmax", SMALL_LMAX, "--noise-level", "noiseless"]
# On the published sky, as (orientation, tile): the equatorial faces of orientation 2 are those of orientation 0, a
# quarter turn on; faces 1 and 3 of orientation 1 lie on those of orientation 0, turned by 90 degrees in themselves.
PATCHES = [[(0, t), (2, (t - 1) % 4)] + ([(1, t)] if t % 2 else []) for t in range(4)] + [[(1, 0)], [(1, 2)]]


@pytest.fixture(scope="module")
def published_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with the shards of a suite of the published geometry."""
    folder = tmp_path_factory.mktemp("published")
    build_suite(MockConfig(tiles_dir=str(folder), geometry="published", **SMALL_SUITE))
    return folder


@pytest.fixture(scope="module")
def larger_tiles(tmp_path_factory: pytest.TempPathFactory) -> Tiles:
    """A suite at lmax 64, from where on a factor of 1.5 shows."""
    folder = tmp_path_factory.mktemp("larger")
    build_suite(MockConfig(tiles_dir=str(folder), lmax=64, n_sims=60))
    return read_tiles(folder, 64, "des_y3")


def audited(
    tiles: Tiles, splits: dict[str, np.ndarray], fiducial_sim_id: int, orientations: Orientations | None
) -> Audit:
    return audit_tiles(tiles, moments_of(tiles.kappa), splits, fiducial_sim_id, orientations)


def splits_of(tiles: Tiles) -> dict[str, np.ndarray]:
    return split_indices(make_manifest(tiles, 42, "tile", FIDUCIAL), tiles, Path())


def leakage_by_name(split_by: str, n_sims: int) -> tuple[dict, dict[str, tuple[int, int]]]:
    """For the published geometry: what leakage_of says, and (duplicates, duplicates or sky) by looking the keys up."""
    sim, place = np.divmod(np.arange(n_sims * 12), 12)
    sim = np.where(sim == n_sims - 1, max(FIDUCIAL, n_sims), sim + 1)
    keys = np.stack([sim, place // 4, place % 4], axis=1)
    keys_of = split_keys(keys, 42, split_by, FIDUCIAL)  # type: ignore[arg-type]
    row = {tuple(key): i for i, key in enumerate(keys.tolist())}
    splits = {name: np.array([row[tuple(key)] for key in part.tolist()]) for name, part in keys_of.items()}
    sky = shared_sky_pairs(keys, ORIENTATIONS["published"])
    duplicates = np.array([[row[s, *p[0]], row[s, *p[1]]] for s in set(sim.tolist()) for p in PATCHES if len(p) > 1])
    group, patch = (groups_of(len(keys), pairs) for pairs in (duplicates, np.concatenate([duplicates, sky])))
    found = leakage_of(splits, group, patch)

    patch_of = {place: patch for patch in PATCHES for place in patch}
    seen, expected = {tuple(key) for key in keys_of["compressor_train"].tolist()}, {}
    for name in ("npe_train", "test", "fiducial"):
        mates = [[(s, *p) for p in patch_of[o, t] if p != (o, t)] for s, o, t in keys_of[name].tolist()]
        same = [m in seen for k, ms in zip(keys_of[name], mates, strict=True) for m in ms if {k[1], m[1]} == {0, 2}]
        expected[name] = (sum(same), sum(any(m in seen for m in ms) for ms in mates))
        seen |= {tuple(key) for key in keys_of[name].tolist()}
    return found, expected


# ---------------------------------------------------------------- geometry


def test_tiles_are_of_one_size_and_published_ones_cover_half_of_the_sky() -> None:
    for orientations in ORIENTATIONS.values():
        overlap = overlap_matrix(orientations)
        np.testing.assert_allclose(np.diag(overlap), 1, atol=2e-3)  # HEALPix faces are of equal area
        np.testing.assert_array_equal(overlap, overlap.T)
    assert covered_patches(ORIENTATIONS["published"]) == pytest.approx(6.12, abs=0.01)
    assert covered_patches(ORIENTATIONS["disjoint"]) == pytest.approx(11.54, abs=0.01)
    # Tiles without a common sky: the limit in which nothing is shared.
    np.testing.assert_array_equal(overlap_matrix(()), np.eye(12))
    assert covered_patches(()) == 12


def test_leakage_on_the_published_sky_is_what_the_keys_say() -> None:
    for split_by in ("tile", "sim"):
        found, expected = leakage_by_name(split_by, 791)
        assert {name: (leak.duplicates, leak.duplicates_or_sky) for name, leak in found.items()} == expected
        if split_by == "sim":
            assert set(expected.values()) == {(0, 0)}
            continue
        # 8 of 12 tiles have one duplicate, 4 of 12 one mate and 6 of 12 two; 70 % of the mates are in compressor_train.
        assert found["npe_train"].duplicates_fraction == pytest.approx(8 / 12 * 0.7, abs=0.03)
        assert found["npe_train"].duplicates_or_sky_fraction == pytest.approx(
            (4 * 0.7 + 6 * (1 - 0.3**2)) / 12, abs=0.03
        )


def test_disjoint_tiles_share_nothing_and_a_geometry_that_does_not_fit_is_refused() -> None:
    keys = make_tiles(3, 2, 4).keys
    assert len(shared_sky_pairs(keys, ORIENTATIONS["disjoint"])) == len(shared_sky_pairs(keys, ())) == 0
    keys[-1] = (FIDUCIAL, 3, 0)
    assert len(shared_sky_pairs(keys, ())) == 0
    with pytest.raises(UserError, match=r"tile \(sim 109, orientation 3, tile 0\) has no place .* --geometry"):
        shared_sky_pairs(keys, ORIENTATIONS["published"])


# ---------------------------------------------------------------- pixels


def test_the_suite_has_the_duplicates_and_patches_of_its_geometry(published_dir: Path, small_tiles_dir: Path) -> None:
    tiles = read_tiles(published_dir, SMALL_LMAX, "noiseless")
    audit = audited(tiles, splits_of(tiles), FIDUCIAL, read_orientations(published_dir))
    _, expected = leakage_by_name("tile", 60)
    assert {name: (leak.duplicates, leak.duplicates_or_sky) for name, leak in audit.leakage.items()} == expected
    assert (audit.n_duplicates, audit.n_duplicates_across_sims) == (60 * 8, 0)
    patch = {place: number for number, places in enumerate(PATCHES) for place in places}
    ours = [patch[o, t] for o, t in tiles.keys[-12:, 1:].tolist()]
    assert audit.fiducial is not None
    assert len(set(zip(ours, audit.fiducial.patch_of_tile, strict=True))) == audit.fiducial.n_patches == 6
    assert json.loads(json.dumps(asdict(audit), allow_nan=False)) == asdict(audit)

    disjoint = read_tiles(small_tiles_dir, SMALL_LMAX, "noiseless")
    audit = audited(disjoint, splits_of(disjoint), FIDUCIAL, read_orientations(small_tiles_dir))
    assert audit.n_duplicates == 0
    assert all((leak.duplicates, leak.duplicates_or_sky) == (0, 0) for leak in audit.leakage.values())
    assert audit.fiducial is not None
    assert audit.fiducial.patch_of_tile == list(range(12))
    assert audit.warnings() == []


@pytest.mark.parametrize("n_bins", [1, 4, 6])
def test_duplicates_are_found_under_every_symmetry_and_near_duplicates_are_not(n_bins: int) -> None:
    tiles, rng = make_tiles(20, 8, 16, n_bins=n_bins), np.random.default_rng(1)
    splits = splits_of(tiles)
    first, second = splits["compressor_train"][:17], splits["npe_train"][:-18:-1]  # from other simulations
    for k in range(17):
        turned = np.rot90(tiles.kappa[first[k]], k % 4, axes=(1, 2))
        turned = np.flip(turned, axis=1) if k % 8 >= 4 else turned
        if k < 8:  # a duplicate but for the last digit of float32
            turned = np.nextafter(turned, rng.choice([-np.inf, np.inf], turned.shape), dtype=np.float32)
        else:
            turned = turned + 1e-3 * rng.standard_normal(turned.shape, dtype=np.float32)
        tiles.kappa[second[k]] = turned
    tiles.kappa[second[16]] = tiles.kappa[first[16]]
    tiles.kappa[second[16], -1] *= 1 + 1e-5  # one bin is enough to make a difference
    planted = list(zip(first[:8].tolist(), second[:8].tolist(), strict=True))
    audit = audited(tiles, splits, FIDUCIAL, None)
    pairs = duplicate_pairs(tiles.kappa, moments_of(tiles.kappa))
    assert {frozenset(pair) for pair in pairs.tolist()} == set(map(frozenset, planted))
    assert audit.leakage["npe_train"].duplicates == audit.n_duplicates_across_sims == 8
    assert audit.leakage["npe_train"].duplicates_or_sky is None
    assert audited(tiles, splits, FIDUCIAL, ()).leakage["npe_train"].duplicates_or_sky == 8
    assert audit.duplicates_across_sims in [tiles.keys[[b, a]].tolist() for a, b in planted]
    assert any("(8 such tiles), so one has the wrong cosmology" in line for line in audit.warnings())


@pytest.mark.parametrize("noise", [0.0, 1e-6])
def test_many_constant_tiles_need_no_comparison_of_all_with_all(monkeypatch: pytest.MonkeyPatch, noise: float) -> None:
    tiles, compared = make_tiles(25, 8, 16), []
    tiles.kappa[:200] = 0.1 * (1 + noise * tiles.kappa[:200])
    are_duplicates = data.duplicates._are_duplicates
    monkeypatch.setattr(data.duplicates, "_are_duplicates", lambda *a: compared.append(1) or are_duplicates(*a))
    groups = groups_of(300, duplicate_pairs(tiles.kappa, moments_of(tiles.kappa)))
    assert len(np.unique(groups)) == (300 if noise else 101)
    assert len(compared) <= 200 * 20  # of 19,900 pairs


def test_a_scaled_a_noise_only_and_a_constant_tile_stand_out_and_no_other(larger_tiles: Tiles) -> None:
    tiles = replace(larger_tiles, kappa=larger_tiles.kappa.copy())

    def outliers() -> list[Outlier]:
        return variance_outliers(tiles.keys, moments_of(tiles.kappa).variance)

    assert outliers() == []
    tiles.kappa[100] *= 1.5
    tiles.kappa[200] = tiles_of_alm(noise_alm("des_y3", 4, 64, np.random.default_rng(0)), 64, 32, "disjoint")[0]
    tiles.kappa[300, 2] = 0.0
    found = outliers()
    assert [o.key for o in found] == tiles.keys[[300, 200, 100]].tolist()
    assert (found[0].bin, found[0].factor) == (2, pytest.approx(SMALLEST_VARIANCE, rel=0.5, abs=0))
    median = np.median([larger_tiles.kappa[i, found[2].bin].var() for i in range(96, 108)])
    assert found[2].factor == pytest.approx(2.25 * larger_tiles.kappa[100, found[2].bin].var() / median, rel=0.05)

    # With nuisances a whole orientation may differ; then a tile stands out from the others of its orientation alone.
    larger = replace(larger_tiles, kappa=larger_tiles.kappa.copy())
    larger.kappa[96:100] *= 2.0
    variance = moments_of(larger.kappa).variance
    assert variance_outliers(larger.keys, variance)
    assert variance_outliers(larger.keys, variance, ["dz_1"]) == []
    for nuisances, some in (({}, True), ({"dz_1": np.zeros(len(larger.keys))}, False)):
        with_them = replace(larger, nuisances=nuisances)
        audit = audited(with_them, splits_of(with_them), FIDUCIAL, ())
        assert bool(audit.n_variance_outliers) == some
    larger.kappa[98] *= 1.7
    found = variance_outliers(larger.keys, moments_of(larger.kappa).variance, ["A_IA"])
    assert [o.key for o in found] == larger.keys[[98]].tolist()

    variance = moments_of(tiles.kappa).variance
    for tile_ids, n_outliers in ((3, 3), (2, 0)):  # 9 or 6 tiles of a simulation: too few for a median to be far from
        some = tiles.keys[:, 2] < tile_ids
        assert len(variance_outliers(tiles.keys[some], variance[some])) == n_outliers
    assert variance_outliers(tiles.keys, np.zeros_like(variance)) == []


# ---------------------------------------------------------------- parameters


def test_the_fiducial_is_inside_up_to_the_edge_and_named_where_it_is_not() -> None:
    tiles = make_tiles(12, 4, 8)
    splits, is_fiducial = splits_of(tiles), tiles.keys[:, 0] == FIDUCIAL
    edge = tiles.params[~is_fiducial].min(axis=0)
    tiles.params[is_fiducial] = edge
    fiducial = audited(tiles, splits, FIDUCIAL, ()).fiducial
    assert fiducial is not None
    assert fiducial.outside == []
    for column in (3, 7):
        tiles.params[is_fiducial, column] = edge[column] - 1e-6
    audit = audited(tiles, splits, FIDUCIAL, ())
    assert audit.ranges["m_nu"][0] == edge[7]
    assert any(f"{FIDUCIAL} lies outside the range of the others in w, m_nu" in line for line in audit.warnings())
    absent = audited(tiles, splits, 5000, ())
    assert absent.fiducial is None
    assert {name: absent.ranges[name][0] for name in ("w", "m_nu")} == {
        name: tiles.params[:, PARAM_NAMES.index(name)].min() for name in ("w", "m_nu")
    }


# ---------------------------------------------------------------- command


def test_the_command_reports_and_warns_and_leaves_the_cache_that_training_reads(
    run_command: Callable, published_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.rmtree(published_dir / "cache", ignore_errors=True)
    before = sorted(published_dir.rglob("*"))
    code, out, err = run_command("run_check.py", *SMALL, "--tiles-dir", published_dir)
    leak = leakage_by_name("tile", 60)[0]["npe_train"]
    assert code == 0
    assert f"{leak.duplicates} ({leak.duplicates_fraction:.1%}) have a duplicate in an earlier split" in out
    assert f"{leak.duplicates_or_sky} ({leak.duplicates_or_sky_fraction:.1%}) a duplicate or most of their sky" in out
    assert "12 tiles, 6 patches of sky" in out
    [warning] = [line for line in err.splitlines() if line.startswith("warning")]
    for text in (f"{leak.duplicates_or_sky_fraction:.0%}", "--split-by sim", "--geometry disjoint"):
        assert text in warning
    assert sorted(path for path in published_dir.rglob("*") if "cache" not in path.parts) == before
    monkeypatch.setattr("data.cache.read_index", None)  # the tiles are mapped now: a large suite stays on the disk
    assert run_command("run_check.py", *SMALL, "--tiles-dir", published_dir)[0] == 0
    code, _, err = run_command("run_check.py", *SMALL, "--tiles-dir", published_dir, "--split-by", "sim")
    assert code == 0
    assert "warning" not in err


def test_shards_that_do_not_say_where_they_lie(run_command: Callable, published_dir: Path, tmp_path: Path) -> None:
    tiles = read_tiles(published_dir, SMALL_LMAX, "noiseless")
    write_tiles(tmp_path, tiles, 400)
    assert read_orientations(tmp_path) is None
    code, out, err = run_command("run_check.py", *SMALL, "--tiles-dir", tmp_path)
    assert code == 0
    assert "most of their sky" not in out + err
    assert "--geometry published" in err
    code, out, err = run_command("run_check.py", *SMALL, "--tiles-dir", tmp_path, "--geometry", "published")
    assert code == 0
    assert "unknown" not in out + err
    told = check_tiles(CheckConfig(tiles_dir=str(published_dir), lmax=SMALL_LMAX, noise_level="noiseless"))
    for name, leak in told.audit.leakage.items():
        assert f"{name:10}  of {leak.n_tiles} tiles {leak.duplicates} " in out
        assert f" {leak.duplicates_or_sky} ({leak.duplicates_or_sky_fraction:.1%}) a duplicate or" in out

    # Null is not unknown: such tiles have no common sky.
    description = json.dumps({ORIENTATIONS_KEY: None})
    with open_shard(tmp_path / "shard_0000.parquet", {METADATA_KEY: description}) as shard:
        shard.write(tiles.kappa[:400], tiles.keys[:400], tiles.params[:400], "noiseless")
    assert read_orientations(tmp_path) == ()


def test_both_stages_are_told_where_published_tiles_lie(
    tmp_path: Path, run_command: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shards without a word on the geometry, as published: --geometry in stage 1 is enough for both results."""
    build_suite(
        MockConfig(results_dir=str(tmp_path), lmax=16, n_sims=60, noise_level="noiseless", geometry="published")
    )
    folder = tmp_path / "tiles" / "lmax_16_noiseless"
    tiles = read_tiles(folder, 16, "noiseless")
    for path in folder.glob("*.parquet"):
        path.unlink()
    write_tiles(folder, tiles, 600)
    options = ["--lmax", 16, "--noise-level", "noiseless", "--backbone", "tiny", "--max-epochs", 1, "--tag", "t"]
    code, _, err = run_command("run_compressor.py", "--results-dir", tmp_path, *options, "--geometry", "published")
    assert code == 0, err
    assert "most of their sky" in err  # the warning, from a training that was not asked to check anything
    ckpt = tmp_path / "field_compressor_runs" / "t" / "best.ckpt"
    groups: list[list[int]] = []  # that medians are bootstrapped over: simulations of the test split, then patches

    def remember(values: np.ndarray, group: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        groups.append(group.tolist())
        return bootstrap_median(values, group, rng)

    monkeypatch.setattr("npe.evaluate.bootstrap_median", remember)
    code, out, err = run_command("run_npe.py", "--ckpt", ckpt, "--max-epochs", 1)
    assert code == 0, err
    assert "6 patches of sky" in out
    audits = [
        json.loads(p.read_text())["audit"] for p in (ckpt.with_name("result.json"), *tmp_path.rglob("fom_result.json"))
    ]
    assert audits[0] == audits[1]
    checked = check_tiles(
        CheckConfig(results_dir=str(tmp_path), lmax=16, noise_level="noiseless", geometry="published")
    )
    assert audits[0] == json.loads(json.dumps(asdict(checked.audit)))
    assert groups[1] == audits[0]["fiducial"]["patch_of_tile"]
    tile_of = {tile: i for i, tile in enumerate(np.ndindex(3, 4))}
    for patch in PATCHES:
        assert len({groups[1][tile_of[tile]] for tile in patch}) == 1
