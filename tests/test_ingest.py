"""Lightcones and maps to tiles: spectra against theory, two routes to the same tiles, all that can be wrong."""

from __future__ import annotations

import http.server
import importlib
import json
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import healpy
import numpy as np
import pytest
from astropy.io import fits
from conftest import GUARD_S, ROOT, SHARED_DATA
from fake_lightcones import (
    NO_NUISANCE,
    PARTICLES_PER_VOLUME,
    lensing_cl,
    shells_of,
    write_lightcone,
    write_nz,
    write_parameters,
)

from common.artifacts import CannotWriteError
from common.errors import UserError
from data.ingest import born, lightcone
from data.ingest.born import born_weights, sources_inside, weights_with
from data.ingest.config import IngestConfig
from data.ingest.download import download
from data.ingest.lightcone import BadSimulationError, project_lightcone
from data.ingest.nz import read_nz
from data.ingest.parameters import read_parameters
from data.ingest.simulation import Job, Outcome, alm_of_kappa
from data.ingest.suite import ingest_side_by_side, plan, run_ingest
from data.mock.cosmology import FIDUCIAL, FIDUCIAL_COSMO, design, params_of
from data.mock.nz import nz_of_bins
from data.mock.theory import BIN_PAIRS
from data.nuisance import Nuisance, PriorsTooWideError
from data.read_shards import read_tiles
from data.schema import PARAM_NAMES, noise_cl
from data.shard_metadata import read_orientations
from data.sky import ORIENTATIONS
from data.sphere.harmonics import white_alm
from data.sphere.pixel_window import pixel_window

FIDUCIAL_PARAMS = params_of(FIDUCIAL_COSMO[None])[0]
NSIDE, N_SKIES = 256, 3
BANDS = (50, 80, 120, 180, 260, 360)
MOST_SIGMA = 4.5  # of 50 band powers


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> tuple[np.ndarray, np.ndarray]:
    """Redshifts and n(z), through a file."""
    path = tmp_path_factory.mktemp("nz") / "nz.txt"
    write_nz(path)
    return read_nz(path)


@pytest.fixture(scope="module")
def skies(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Lightcones of the fiducial cosmology at nside 256."""
    folder = tmp_path_factory.mktemp("skies")
    for k in range(N_SKIES):
        write_lightcone(folder / f"sim{k:05d}", FIDUCIAL_COSMO, NSIDE, np.random.default_rng(k))
    return sorted(folder.iterdir())


SOME = Nuisance(np.array([0.02, -0.03, 0.01, 0.04]), np.array([0.03, -0.02, 0.02, -0.03]), 0.7, 0.5)


def deviations(
    skies: list[Path],
    sources: tuple[np.ndarray, np.ndarray],
    nuisance: Nuisance = NO_NUISANCE,
    expected: Nuisance = NO_NUISANCE,
    order: tuple[int, ...] = (0, 1, 2, 3),
) -> np.ndarray:
    """Band powers (10, n_bands) of the mean spectra against pyccl, in standard errors of Gaussian skies.

    The skies are projected with a nuisance, and their bins taken in an order; pyccl has what is expected.
    """
    lmax = BANDS[-1]
    ell = np.arange(BANDS[0], lmax)
    theory = lensing_cl(FIDUCIAL_COSMO, ell, expected)  # (10, n_ell)
    shells, scale = shells_of(FIDUCIAL_COSMO), 1 + nuisance.m[:, None]
    weights = scale * weights_with(nuisance, shells, *sources, FIDUCIAL["Omega_m"], FIDUCIAL["w"])
    weights = weights[list(order)]
    counted = shells.step != shells.step[-1]
    shot = 4 * np.pi / (PARTICLES_PER_VOLUME * shells.volume[counted])  # C_ell of the counts' own noise
    shot_of = np.einsum("ak,bk,k->ab", weights[:, counted], weights[:, counted], shot)
    found = np.zeros((len(BIN_PAIRS), len(ell)))
    for sky in skies:
        kappa, _ = project_lightcone(sky, FIDUCIAL_PARAMS, *sources, [] if nuisance is NO_NUISANCE else [nuisance])
        alm = scale * alm_of_kappa(kappa[-4:], lmax, divide_window=True)
        alm = alm[list(order)]
        for n, (i, j) in enumerate(BIN_PAIRS):
            found[n] += healpy.alm2cl(alm[i], alm[j])[BANDS[0] : lmax] / len(skies)
    found -= np.array([shot_of[i, j] for i, j in BIN_PAIRS])[:, None] / pixel_window(NSIDE, lmax)[BANDS[0] : lmax] ** 2
    auto = {i: theory[n] for n, (i, j) in enumerate(BIN_PAIRS) if i == j}
    sigma = np.empty((len(BIN_PAIRS), len(BANDS) - 1))
    mean = np.empty_like(sigma)
    for n, (i, j) in enumerate(BIN_PAIRS):
        variance = (auto[i] * auto[j] + theory[n] ** 2) / (2 * ell + 1) / len(skies)
        for band, (low, high) in enumerate(pairwise(BANDS)):
            inside = (ell >= low) & (ell < high)
            mean[n, band] = np.mean(found[n, inside] / theory[n, inside]) - 1
            sigma[n, band] = np.sqrt(np.sum(variance[inside] / theory[n, inside] ** 2)) / inside.sum()
    return mean / sigma


def test_spectra_of_a_lightcone_agree_with_theory_in_all_ten_pairs(
    skies: list[Path], sources: tuple[np.ndarray, np.ndarray]
) -> None:
    assert np.abs(deviations(skies, sources)).max() < MOST_SIGMA


def test_spectra_with_nuisances_agree_with_pyccls_and_tell_each_of_them(
    skies: list[Path], sources: tuple[np.ndarray, np.ndarray]
) -> None:
    """All three together; and the test would see the sign of an alignment turned, bins exchanged, another scale."""
    assert np.abs(deviations(skies, sources, SOME, SOME)).max() < MOST_SIGMA
    assert np.abs(deviations(skies, sources, SOME, SOME, order=(0, 1, 3, 2))).max() > MOST_SIGMA
    for wrong in (replace(SOME, a_ia=-SOME.a_ia), replace(SOME, dz=-SOME.dz), replace(SOME, m=-3 * SOME.m)):
        assert np.abs(deviations(skies, sources, wrong, SOME)).max() > MOST_SIGMA


def swap(folder: Path) -> None:
    near, far = (folder / f"run.{step:05d}.lightcone.npy" for step in (50, 14))
    near.rename(folder / "aside")
    far.rename(near)
    (folder / "aside").rename(far)


def in_mpc(folder: Path) -> None:
    path = folder / "z_values.txt"
    header, *rows = path.read_text().splitlines()
    cells = [row.split(",") for row in rows]
    for row in cells:
        row[4:7] = [str(float(cell) / FIDUCIAL["h"]) for cell in row[4:7]]
    path.write_text("\n".join([header, *map(",".join, cells)]) + "\n")


def without_row(folder: Path) -> None:
    path = folder / "z_values.txt"
    path.write_text("\n".join(line for line in path.read_text().splitlines() if not line.startswith("18,")) + "\n")


SPOILED: dict[str, tuple[Callable[[Path], None], str]] = {
    "gap": (lambda folder: (folder / "run.00018.lightcone.npy").unlink(), r"lacks run.00018.lightcone.npy"),
    "swapped": (swap, r"times the density of the others"),
    "Mpc": (in_mpc, r"not in Mpc/h"),
}


@pytest.mark.parametrize("kind", list(SPOILED))
def test_a_spoiled_shell_list_is_refused_and_would_fail_the_spectra(
    kind: str,
    skies: list[Path],
    sources: tuple[np.ndarray, np.ndarray],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Refused by name; and with every check off, the spectra tell."""
    spoil, message = SPOILED[kind]
    spoiled = []
    for sky in skies:
        spoiled.append(tmp_path / sky.name)
        shutil.copytree(sky, spoiled[-1])
        spoil(spoiled[-1])
    with pytest.raises(BadSimulationError, match=message):
        project_lightcone(spoiled[0], FIDUCIAL_PARAMS, *sources)
    for module, name in (
        (born, "DISTANCE_TOLERANCE"),
        (lightcone, "IRRELEVANT_SHARE"),
        (lightcone, "MAX_LOST_SHARE"),
        (lightcone, "DENSITY_TOLERANCE"),
    ):
        monkeypatch.setattr(module, name, np.inf)
    assert np.abs(deviations(spoiled, sources)).max() > MOST_SIGMA


def test_alignments_need_the_shells_that_hold_the_sources(
    skies: list[Path], sources: tuple[np.ndarray, np.ndarray], tmp_path: Path
) -> None:
    shells = shells_of(FIDUCIAL_COSMO)
    lensing = born_weights(shells, *sources, FIDUCIAL["Omega_m"])
    share = (lensing / lensing.sum(axis=1, keepdims=True)).max(axis=0)  # (n_shells,)
    k = np.argmax(np.where(share < lightcone.MAX_LOST_SHARE, sources_inside(shells, *sources).max(axis=0), 0))
    shutil.copytree(skies[0], tmp_path / "sim")
    np.save(tmp_path / "sim" / f"run.{shells.step[k]:05d}.incomplete.npy", np.zeros(1))
    _, incomplete = project_lightcone(tmp_path / "sim", FIDUCIAL_PARAMS, *sources)
    assert shells.step[k] in incomplete
    with pytest.raises(BadSimulationError, match="or of its sources"):
        project_lightcone(tmp_path / "sim", FIDUCIAL_PARAMS, *sources, [SOME])
    # A prior that leads out of the shells is no fault of a simulation, which would be left out.
    far = replace(SOME, dz=np.array([0.0, 0.0, 0.0, 2.5]))
    with pytest.raises(PriorsTooWideError, match=r"dz_4 = 2.500 moves .* of the sources of bin 4 beyond z = 4"):
        project_lightcone(skies[0], FIDUCIAL_PARAMS, *sources, [far])


def test_a_missing_row_of_z_values_is_refused(
    skies: list[Path], sources: tuple[np.ndarray, np.ndarray], tmp_path: Path
) -> None:
    shutil.copytree(skies[0], tmp_path / "sim")
    without_row(tmp_path / "sim")
    with pytest.raises(BadSimulationError, match="where the shell before it does not end"):
        project_lightcone(tmp_path / "sim", FIDUCIAL_PARAMS, *sources)


def test_pixel_window_is_what_averaging_over_pixels_does() -> None:
    """A map with few multipoles, averaged over the pixels of a coarser one."""
    coarse, fine, lmax = 32, 256, 64
    rng = np.random.default_rng(0)
    ratio = []
    for _ in range(10):
        for one in white_alm(4, lmax, rng):
            averaged = healpy.ud_grade(healpy.alm2map(one, fine, lmax=lmax), coarse)
            back = healpy.map2alm(averaged, lmax=lmax, iter=3)
            ratio.append(healpy.alm2cl(back, one) / healpy.alm2cl(one))
    smooth = np.convolve(np.mean(ratio, axis=0), np.ones(9) / 9, mode="valid")  # ell 4 ... lmax - 4
    expected = pixel_window(coarse, lmax)[4:-4]
    assert np.abs(smooth / expected - 1).max() < 0.003
    assert expected[-1] < 0.87


# ---------------------------------------------------------------- a small suite

SMALL_NSIDE, SMALL_LMAX = 32, 40


@pytest.fixture(scope="module")
def suite(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """sims/, params.csv and nz.txt of six small simulations with the fiducial one among them."""
    folder = tmp_path_factory.mktemp("suite")
    sim_ids, cosmologies = design(6, 1, 109)
    write_parameters(folder / "params.csv", sim_ids, cosmologies)
    write_nz(folder / "nz.txt")
    for sim_id, cosmo in zip(sim_ids, cosmologies, strict=True):
        rng = np.random.default_rng(int(sim_id))
        write_lightcone(folder / "sims" / f"sim{sim_id:05d}", cosmo, SMALL_NSIDE, rng)
    return folder


def config_of(suite: Path, results: Path, **options: Any) -> IngestConfig:
    given = {"lightcones": suite / "sims", "params": suite / "params.csv", "nz": suite / "nz.txt", "workers": 1}
    given |= {"results_dir": results, "lmax": str(SMALL_LMAX), "noise_level": "noiseless"} | options
    return IngestConfig(**{name: str(value) if isinstance(value, Path) else value for name, value in given.items()})


def made(config: IngestConfig) -> dict[str, Any]:
    return run_ingest(plan(config))


def tiles_in(results: Path, lmax: int = SMALL_LMAX, level: str = "noiseless") -> np.ndarray:
    return read_tiles(results / "tiles" / f"lmax_{lmax}_{level}", lmax, level).kappa


@pytest.fixture(scope="module")
def noiseless(suite: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Results folder with the noiseless tiles of the small suite."""
    results = tmp_path_factory.mktemp("noiseless")
    assert made(config_of(suite, results, workers=2))["n_sims"] == 6  # what else is compared is made by one
    return results


def packed(folder: Path, path: Path, order: Callable[[str], Any]) -> None:
    """A simulation as the site serves it, with its files in some order."""
    with tarfile.open(path, "w:gz", compresslevel=1) as archive:
        for name in sorted((path.name for path in folder.iterdir()), key=order):
            archive.add(folder / name, f"some/where/{name}")


@pytest.mark.parametrize("last", ["none", "z_values", "incomplete"])
def test_an_archive_gives_the_same_tiles_in_whatever_order_its_files_come(
    suite: Path, noiseless: Path, tmp_path: Path, last: str
) -> None:
    (tmp_path / "sims").mkdir()
    packed(suite / "sims/sim00109", tmp_path / "sims/sim00109.tar.gz", lambda name: (last in name, name))
    for name in ("params.csv", "nz.txt"):
        shutil.copy(suite / name, tmp_path)
    made(config_of(tmp_path, tmp_path))
    assert np.array_equal(tiles_in(tmp_path), tiles_in(noiseless)[-12:])


def test_tiles_carry_the_table_and_say_where_they_lie(suite: Path, noiseless: Path) -> None:
    folder = noiseless / "tiles" / f"lmax_{SMALL_LMAX}_noiseless"
    tiles = read_tiles(folder, SMALL_LMAX, "noiseless")
    table = read_parameters(suite / "params.csv")
    assert sorted({int(sim_id) for sim_id in tiles.keys[:, 0]}) == sorted(table)
    for key, params in zip(tiles.keys, tiles.params, strict=True):
        assert np.array_equal(params, table[int(key[0])])
    assert read_orientations(folder) == ORIENTATIONS["disjoint"]


def test_one_realisation_of_noise_serves_every_level_and_lmax(suite: Path, noiseless: Path, tmp_path: Path) -> None:
    together = config_of(
        suite, tmp_path / "together", lmax="20,40", noise_level="des_y3,lsst_y10,noiseless", sims="109"
    )
    made(together)
    for lmax in (20, 40):
        clean = tiles_in(tmp_path / "together", lmax, "noiseless").astype(np.float64)
        noise = {
            level: (tiles_in(tmp_path / "together", lmax, level) - clean) / np.sqrt(noise_cl(level, 4))[:, None, None]
            for level in ("des_y3", "lsst_y10")
        }
        assert np.abs(noise["des_y3"] - noise["lsst_y10"]).max() < 1e-4 * noise["des_y3"].std()
        alone = config_of(suite, tmp_path / f"alone{lmax}", lmax=str(lmax), noise_level="lsst_y10", sims="109")
        made(alone)
        difference = tiles_in(tmp_path / f"alone{lmax}", lmax, "lsst_y10") - tiles_in(
            tmp_path / "together", lmax, "lsst_y10"
        )
        assert not difference.any()


def test_nuisances_come_out_of_one_pass_and_zero_width_changes_nothing(
    suite: Path, noiseless: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []
    counts_of = lightcone.read_counts
    monkeypatch.setattr(lightcone, "read_counts", lambda file, name: read.append(name) or counts_of(file, name))
    together = config_of(suite, tmp_path, nuisance="none,m,dz,all", noise_level="des_y3,noiseless", sims="1,109")
    made(together)
    assert len(read) == len(set(read))  # no shell twice
    names = {one: tmp_path / f"tiles/lmax_{SMALL_LMAX}_noiseless{one}" for one in ("", "_m", "_dz", "_all")}
    tiles = {one: read_tiles(folder, SMALL_LMAX, "noiseless") for one, folder in names.items()}
    bare = tiles[""].kappa
    assert np.array_equal(bare, np.concatenate([tiles_in(noiseless)[:12], tiles_in(noiseless)[-12:]]))
    for one, found in tiles.items():
        assert np.array_equal(found.kappa[12:], bare[12:])  # the fiducial has the centres of the priors
        assert one == "" or np.abs(found.kappa[:12] - bare[:12]).max() > 1e-5
        noisy = read_tiles(Path(str(names[one]).replace("noiseless", "des_y3")), SMALL_LMAX, "des_y3").kappa
        noise = noisy - found.kappa
        np.testing.assert_allclose(noise[:12], (tiles_in(tmp_path, level="des_y3") - bare)[:12], atol=1e-7)
    m = tiles["_m"].columns([f"m_{a + 1}" for a in range(4)])[:, :, None, None]
    np.testing.assert_allclose(tiles["_m"].kappa, (1 + m) * bare, rtol=1e-4, atol=1e-7)
    assert tiles["_all"].nuisances["dz_2"][0] == tiles["_dz"].nuisances["dz_2"][0] != tiles["_dz"].nuisances["dz_2"][4]

    # Where all orientations are given what one has, its tiles are the same: each has the sky of its own label.
    for row in (0, 4, 8):
        fixed = "\n".join(f"{name} normal {v[row]:.17g} 0" for name, v in tiles["_all"].nuisances.items())
        (tmp_path / "priors.txt").write_text(fixed)
        folder = tmp_path / str(row)
        made(config_of(suite, folder, nuisance="all", nuisance_priors=tmp_path / "priors.txt", sims="1"))
        again = read_tiles(folder / f"tiles/lmax_{SMALL_LMAX}_noiseless_all", SMALL_LMAX, "noiseless").kappa
        assert np.array_equal(again[row : row + 4], tiles["_all"].kappa[row : row + 4])

    zero = "\n".join(f"{name} normal 0 0" for name in tiles["_all"].nuisances)
    (tmp_path / "priors.txt").write_text(zero)
    both = {"noise_level": "des_y3,noiseless", "sims": "1,109"}
    made(config_of(suite, tmp_path / "zero", nuisance="all", nuisance_priors=tmp_path / "priors.txt", **both))
    made(config_of(suite, tmp_path / "bare", **both))  # another command: noise does not depend on what varies
    for level in ("des_y3", "noiseless"):
        unmoved = read_tiles(tmp_path / f"zero/tiles/lmax_{SMALL_LMAX}_{level}_all", SMALL_LMAX, level).kappa
        assert np.array_equal(unmoved, tiles_in(tmp_path / "bare", level=level))


def test_published_geometry_repeats_its_faces(suite: Path, tmp_path: Path) -> None:
    made(config_of(suite, tmp_path, geometry="published", noise_level="des_y3", sims="109"))
    tiles = tiles_in(tmp_path, level="des_y3").reshape(3, 4, 4, 32, 32)  # orientations, faces 4 ... 7, bins
    assert np.abs(tiles[2] - tiles[0][[1, 2, 3, 0]]).max() < 1e-5 * tiles[0].std()
    assert (tiles[1] - tiles[0]).std() > tiles[0].std()


def test_an_interrupted_ingest_goes_on_and_a_finished_one_stays(
    suite: Path, noiseless: Path, tmp_path: Path, run_command: Callable
) -> None:
    config = config_of(suite, tmp_path, noise_level="noiseless,des_y3")
    made(replace(config, sims="2,109"))
    shards = sorted((tmp_path / "tiles").rglob("*.parquet"))
    assert len(shards) == 4
    shards[0].unlink()  # killed between two noise levels
    times = [path.stat().st_mtime_ns for path in shards[1:]]
    assert made(config)["n_sims"] == 6
    assert [path.stat().st_mtime_ns for path in shards[1:]] == times
    assert np.array_equal(tiles_in(tmp_path), tiles_in(noiseless))
    with pytest.raises(UserError, match="--seed 42 there, 7 here"):
        made(replace(config, seed=7))
    made(replace(config, seed=7, restart=True, noise_level="noiseless"))
    assert "des_y3" in str(shards[1])  # it was not named
    assert [path.stat().st_mtime_ns > before for path, before in zip(shards[1:], times, strict=True)] == [
        "noiseless" in str(path) for path in shards[1:]
    ]


@pytest.fixture
def spoiled_suite(suite: Path, tmp_path: Path) -> Path:
    shutil.copytree(suite, tmp_path / "spoiled")
    return tmp_path / "spoiled"


def truncate(path: Path, share: float) -> None:
    os.truncate(path, int(share * path.stat().st_size))


def save(folder: Path, counts: np.ndarray) -> None:
    np.save(folder / "run.00040.lightcone.npy", counts)


N_PIXELS = 12 * SMALL_NSIDE**2
WRONG: dict[str, tuple[Callable[[Path], Any], str]] = {
    "short": (lambda f: truncate(f / "run.00040.lightcone.npy", 0.6), "ends after [0-9]+ of 12288 pixels"),
    "no header": (lambda f: truncate(f / "run.00040.lightcone.npy", 0.0), "run.00040.lightcone.npy is truncated"),
    "object": (lambda f: save(f, np.array([None] * N_PIXELS)), "run.00040.lightcone.npy is truncated or damaged"),
    "no map": (lambda f: save(f, np.ones(1000)), "is not a HEALPix map"),
    "another nside": (lambda f: save(f, np.ones(12 * 16**2)), "has 3072 pixels, the shells before it 12288"),
    "NaN": (lambda f: save(f, np.full(N_PIXELS, np.nan)), "no particles, or negative ones"),
    "negative": (lambda f: save(f, np.full(N_PIXELS, -1)), "no particles, or negative ones"),
    "empty": (lambda f: save(f, np.zeros(N_PIXELS)), "no particles"),
    "too many": (lambda f: (f / "run.00040.incomplete.npy").touch(), "carry [0-9.]+ % of a bin's lensing weight"),
    "no z_values": (lambda f: (f / "z_values.txt").unlink(), "has no z_values.txt"),
    "binary z_values": (lambda f: (f / "z_values.txt").write_bytes(os.urandom(500)), "instead of"),
    "unknown step": (
        lambda f: shutil.copy(f / "run.00040.lightcone.npy", f / "run.00900.lightcone.npy"),
        "no step 900",
    ),
}


@pytest.mark.parametrize("kind", list(WRONG))
def test_what_is_wrong_with_a_simulation_is_named_and_the_others_go_on(
    kind: str, spoiled_suite: Path, tmp_path: Path, run_command: Callable
) -> None:
    spoil, message = WRONG[kind]
    spoil(spoiled_suite / "sims" / "sim00002")
    result = made(config_of(spoiled_suite, tmp_path, sims="2-3"))
    assert result["n_sims"] == 1
    assert list(result["left_out"]) == ["2"]
    reason = result["left_out"]["2"]
    assert len(reason.splitlines()) == 1
    assert re.search(message, reason), reason
    assert "sim00002" in reason
    assert json.loads((tmp_path / f"tiles/lmax_{SMALL_LMAX}_noiseless/ingest.json").read_text()) == result
    with pytest.raises(UserError, match="without --strict it is left out"):
        made(config_of(spoiled_suite, tmp_path, sims="2-3", strict=True))


@pytest.mark.parametrize("damage", ["truncated", "bits", "checksum", "no tar"])
def test_a_damaged_archive_is_named(damage: str, suite: Path, sources: Any, tmp_path: Path) -> None:
    path = tmp_path / "sim00109.tar.gz"
    packed(suite / "sims/sim00109", path, str)
    content = bytearray(path.read_bytes())
    if damage == "truncated":
        content = content[: len(content) // 2]
    elif damage == "bits":
        for place in range(len(content) // 2, len(content), 997):
            content[place] ^= 1
    elif damage == "checksum":  # as if a count were another that compresses to as many bits
        content[-8] ^= 1
    else:
        content = bytearray(b"<html>404</html>" * 100)
    path.write_bytes(content)
    said = r"sim00109.tar.gz" if damage == "bits" else r"sim00109.tar.gz.* is truncated or damaged"
    with pytest.raises(BadSimulationError, match=said):
        project_lightcone(path, FIDUCIAL_PARAMS, *sources)


def test_a_table_of_another_suite_is_found_out(suite: Path, tmp_path: Path) -> None:
    """The distances in z_values.txt are not those of its cosmology."""
    lines = (suite / "params.csv").read_text().splitlines()
    rows = [line.split(",") for line in lines[2:]]
    for row, sim_id in zip(rows, np.roll([row[0] for row in rows], 1), strict=True):
        row[0] = sim_id
    (tmp_path / "params.csv").write_text("\n".join([*lines[:2], *map(",".join, rows)]) + "\n")
    result = made(config_of(suite, tmp_path, params=tmp_path / "params.csv"))
    assert result["n_sims"] < 2
    assert all("another simulation under this number" in reason for reason in result["left_out"].values())


# ---------------------------------------------------------------- maps


@pytest.fixture(scope="module")
def kappa(suite: Path, sources: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
    """Four maps (4, n_pixels)."""
    return project_lightcone(suite / "sims/sim00109", FIDUCIAL_PARAMS, *sources)[0]


def map_config(suite: Path, results: Path, pattern: Path, **options: Any) -> IngestConfig:
    return config_of(suite, results, lightcones="", nz="", kappa_maps=str(pattern), **options)


@pytest.mark.parametrize("form", ["one file", "folder", "nested", "nested without a word"])
def test_maps_give_the_tiles_of_their_lightcone(
    form: str, suite: Path, noiseless: Path, kappa: np.ndarray, tmp_path: Path
) -> None:
    maps, options = tmp_path / "maps", {"pixel_window": "divide"}
    maps.mkdir()
    if form == "folder":
        (maps / "sim109").mkdir()
        for number, one in enumerate(kappa):
            healpy.write_map(maps / f"sim109/bin{number}.fits", one, dtype=np.float32)
    else:
        nested = "nested" in form
        stored = healpy.reorder(kappa, r2n=True) if nested else kappa
        healpy.write_map(maps / "kappa_sim109.fits", stored, nest=nested, dtype=np.float32)
    if form == "nested without a word":
        with fits.open(maps / "kappa_sim109.fits", mode="update") as file:
            del file[1].header["ORDERING"]
        with pytest.raises(UserError, match="add --ordering RING or NEST"):
            made(map_config(suite, tmp_path, maps / "*", strict=True, **options))
        options["ordering"] = "NEST"
    made(map_config(suite, tmp_path, maps / "*", strict=True, **options))
    assert np.array_equal(tiles_in(tmp_path), tiles_in(noiseless)[-12:])


def zeros(kappa: np.ndarray) -> np.ndarray:
    kappa[:, : N_PIXELS // 3] = 0
    return kappa


def unseen(kappa: np.ndarray) -> np.ndarray:
    kappa[2, 17] = healpy.UNSEEN
    return kappa


def not_a_number(kappa: np.ndarray) -> np.ndarray:
    kappa[2, 17] = np.nan
    return kappa


MASKED: dict[str, tuple[Callable[[np.ndarray], np.ndarray], dict[str, Any], str]] = {
    "unseen": (unseen, {}, "has 1 masked pixels; tiles cover the whole sky"),
    "NaN": (not_a_number, {}, "has 1 masked pixels"),
    "zeros": (zeros, {}, "is exactly zero in 33.3 % of its pixels"),
    "partial": (unseen, {"partial": True}, "covers only part of the sky"),
    "coarse": (lambda kappa: healpy.ud_grade(kappa, 16), {}, "has nside 16: --lmax can be at most 32"),
}


@pytest.mark.parametrize("kind", list(MASKED))
def test_maps_that_are_not_whole_are_refused_with_the_reason(
    kind: str, suite: Path, kappa: np.ndarray, tmp_path: Path
) -> None:
    change, options, message = MASKED[kind]
    healpy.write_map(tmp_path / "sim109.fits", np.asarray(change(kappa.copy())), dtype=np.float32, **options)
    with pytest.raises(UserError, match=message):
        made(map_config(suite, tmp_path, tmp_path / "*.fits", strict=True))


# ---------------------------------------------------------------- other numbers of bins


def write_bins(path: Path, n_bins: int) -> np.ndarray:
    """An n(z) table (n_z, 1 + n_bins): the bins of the mock suite, then mixtures of them."""
    z = np.linspace(0, 3, 301)
    four = nz_of_bins(z)
    table = np.column_stack([z, np.concatenate([four, four[:2] + four[2:]])[:n_bins].T])
    np.savetxt(path, table)
    return table


def channels_in(results: Path) -> np.ndarray:
    return tiles_in(results).transpose(1, 0, 2, 3)  # (n_bins, 12, N, N)


def test_six_bins_projected_together_equal_each_on_its_own(suite: Path, tmp_path: Path) -> None:
    write_bins(tmp_path / "nz.txt", 6)
    z, nz = read_nz(tmp_path / "nz.txt")
    sky = suite / "sims/sim00109"
    together, _ = project_lightcone(sky, FIDUCIAL_PARAMS, z, nz)
    for i in range(6):
        alone, _ = project_lightcone(sky, FIDUCIAL_PARAMS, z, nz[i : i + 1])
        assert np.array_equal(alone, together[i : i + 1])


@pytest.mark.parametrize("n_bins", [1, 6])
def test_lightcones_give_as_many_channels_as_there_are_bins(
    n_bins: int, suite: Path, noiseless: Path, tmp_path: Path
) -> None:
    write_bins(tmp_path / "nz.txt", n_bins)
    made(config_of(suite, tmp_path, nz=tmp_path / "nz.txt", sims="109"))
    four, found = channels_in(noiseless)[:, -12:], channels_in(tmp_path)
    common = min(n_bins, 4)
    assert len(found) == n_bins
    np.testing.assert_allclose(found[:common], four[:common], rtol=0, atol=1e-6 * four.std())
    for i in range(4, n_bins):  # lensing is linear in n(z)
        mixture = (four[i - 4] + four[i - 2]) / 2
        np.testing.assert_allclose(found[i], mixture, rtol=0, atol=1e-5 * four.std())


def test_one_and_six_maps_become_as_many_channels(suite: Path, kappa: np.ndarray, tmp_path: Path) -> None:
    six = kappa[[0, 1, 2, 3, 1, 0]]
    healpy.write_map(tmp_path / "six_sim109.fits", six, dtype=np.float32)
    (tmp_path / "folder_sim109").mkdir()
    for number, one in enumerate(six):
        healpy.write_map(tmp_path / f"folder_sim109/bin{number}.fits", one, dtype=np.float32)
        healpy.write_map(tmp_path / f"one{number}_sim109.fits", one, dtype=np.float32)
    names = ["six_sim109.fits", "folder_sim109", *(f"one{i}_sim109.fits" for i in range(6))]
    for name in names:
        assert made(map_config(suite, tmp_path / name[:6], tmp_path / name))["n_sims"] == 1
    together, folder, *alone = (channels_in(tmp_path / name[:6]) for name in names)
    assert np.array_equal(together, np.concatenate(alone))
    assert np.array_equal(together, folder)


def test_a_survey_with_other_bins_is_refused_in_one_line(
    suite: Path, kappa: np.ndarray, tmp_path: Path, run_command: Callable
) -> None:
    write_bins(tmp_path / "nz.txt", 6)
    healpy.write_map(tmp_path / "sim109.fits", kappa[[0, 1, 2, 3, 1, 0]], dtype=np.float32)
    lightcones = ["--lightcones", suite / "sims", "--nz", tmp_path / "nz.txt"]
    for source in (lightcones, ["--kappa-maps", tmp_path / "*.fits", "--strict"]):
        options = ["--params", suite / "params.csv", "--lmax", SMALL_LMAX, "--workers", 1]
        options += ["--noise-level", "noiseless,des_y3", "--results-dir", tmp_path / "results"]
        code, _, err = run_command("run_ingest.py", *source, *options)
        assert code == 2
        assert len(err.splitlines()) == 1
        assert "--noise-level des_y3 has 4 bins, but the tiles have 6" in err
        assert not list((tmp_path / "results").rglob("*.parquet"))
        assert source is not lightcones or not (tmp_path / "results").exists()


def test_maps_with_more_bins_than_the_others_are_left_out(suite: Path, kappa: np.ndarray, tmp_path: Path) -> None:
    (tmp_path / "maps").mkdir()
    healpy.write_map(tmp_path / "maps/sim1.fits", kappa, dtype=np.float32)
    healpy.write_map(tmp_path / "maps/sim109.fits", kappa[:3], dtype=np.float32)
    result = made(map_config(suite, tmp_path, tmp_path / "maps/*"))
    assert "has 3 bins, but the tiles in" in result["left_out"]["109"]
    assert result["n_sims"] == 1


@pytest.mark.parametrize(("sizes", "message"), [([16, 32], "all bins need the same nside"), ([], "holds no FITS file")])
def test_a_folder_that_is_not_a_map_per_bin_is_refused(
    sizes: list[int], message: str, suite: Path, kappa: np.ndarray, tmp_path: Path
) -> None:
    (tmp_path / "sim109").mkdir()
    for number, nside in enumerate(sizes):
        one = healpy.ud_grade(kappa[number], nside)
        healpy.write_map(tmp_path / f"sim109/bin{number}.fits", one, dtype=np.float32)
    with pytest.raises(UserError, match=message):
        made(map_config(suite, tmp_path, tmp_path / "sim109", strict=True))


# ---------------------------------------------------------------- n(z), table, download


@pytest.mark.parametrize("n_bins", [1, 4, 6])
def test_nz_from_fits_and_from_text_agree(n_bins: int, tmp_path: Path) -> None:
    table = write_bins(tmp_path / "nz.txt", n_bins)
    columns = [fits.Column("Z_MID", "D", array=table[:, 0])]
    columns += [fits.Column(f"BIN{i}", "D", array=7 * table[:, i]) for i in range(1, n_bins + 1)]
    hdu = fits.BinTableHDU.from_columns(columns, name="nz_source")
    fits.HDUList([fits.PrimaryHDU(), hdu]).writeto(tmp_path / "2pt.fits")
    (tmp_path / "nz.csv").write_text("# z, n\n" + "\n".join(", ".join(map(str, row)) for row in table))
    z, nz = read_nz(tmp_path / "nz.txt")
    for name in ("2pt.fits", "nz.csv"):
        other_z, other = read_nz(tmp_path / name)
        assert np.array_equal(z, other_z)
        assert np.abs(other - nz).max() < 1e-12 * nz.max()
    assert np.trapezoid(nz, z, axis=1) == pytest.approx(n_bins * [1])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0\n1\n", "columns: z, n_1"),
        ("z n n n n\n", "not a table of numbers"),
        ("1 1 1 1 1\n0 1 1 1 1\n", "must increase"),
        ("0 1 1 1 1\n1 1 -1 1 1\n", "negative"),
        ("0 1 0 1 1\n1 1 0 1 1\n", "zero everywhere"),
        ("0 1 nan 1 1\n1 1 1 1 1\n", "finite"),
        ("SIMPLE  = T", "cannot be read|no table NZ_SOURCE"),
        ("0 1 1 1 1\n9 1 1 1 1\n", "beyond z ="),
    ],
)
@pytest.mark.filterwarnings("ignore::astropy.io.fits.verify.VerifyWarning")  # of what is no FITS file
def test_a_senseless_nz_is_refused(text: str, message: str, suite: Path, tmp_path: Path) -> None:
    (tmp_path / "nz.txt").write_text(text)
    with pytest.raises(UserError, match=message):
        made(config_of(suite, tmp_path, nz=tmp_path / "nz.txt", strict=True, sims="109"))


def test_the_published_table_is_read() -> None:
    if not (path := SHARED_DATA / "gower_street_runs.csv").exists():
        pytest.skip("the published table is not here")
    table = read_parameters(path)
    assert sorted(table) == list(range(1, 792))
    fiducial = dict(zip(PARAM_NAMES, table[109], strict=True))
    for name, value in FIDUCIAL.items():  # as the design document has it
        assert fiducial[name] == pytest.approx(value, rel=1e-3), name


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text.replace("sigma_8", "sigma8"), "'sigma_8' .* does not exist"),
        (lambda text: text.split("\n", 1)[1], "'Serial Number' .* does not exist"),
        (lambda text: text + text.splitlines()[-1] + "\n", "is in the table twice"),
        (lambda text: text + "7,C,1,,,,\n", "Row #9: .* got 7"),
        (lambda text: re.sub(r"\n1,([^,]*),([^,]*),[^,]*", r"\n1,\1,\2,", text), "Row #3: .* invalid value ''"),
        (lambda text: re.sub(r"\n1,([^,]*),([^,]*),[^,]*", r"\n1,\1,\2,inf", text), "simulation 1 has .* infinity"),
        (lambda text: "\n".join(text.splitlines()[:2]) + "\n\n", "has no simulation in it"),
    ],
)
def test_a_senseless_table_is_refused(change: Callable[[str], str], message: str, suite: Path, tmp_path: Path) -> None:
    (tmp_path / "params.csv").write_text(change((suite / "params.csv").read_text()))
    with pytest.raises(UserError, match=message):
        read_parameters(tmp_path / "params.csv")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lightcones": ""}, "either --lightcones or --kappa-maps"),
        ({"nz": ""}, "--nz"),
        ({"sims": "a-b"}, "--sims"),
        ({"sims": "5-3"}, "names no simulation"),
        ({"lmax": "200,x"}, "--lmax"),
        ({"noise_level": "des_y3,des_y9"}, "'des_y9' is not in"),
        ({"lightcones": "nowhere"}, "no sim00001"),
        ({"sims": "1-3,900"}, None),
    ],
)
def test_options_that_make_no_sense(
    options: dict[str, str], message: str | None, suite: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if message is None:
        made(config_of(suite, tmp_path, **options))
        assert "simulation 900 is not in" in capsys.readouterr().err
        return
    with pytest.raises(UserError, match=message):
        made(config_of(suite, tmp_path, **options))
    assert not list(tmp_path.iterdir())


class Server(http.server.BaseHTTPRequestHandler):
    """Serves files, knows ranges, and hangs up after some bytes."""

    files: dict[str, bytes] = {}  # noqa: RUF012
    most = 1 << 60
    requests: list[str] = []  # noqa: RUF012

    def do_GET(self) -> None:
        self.requests.append(self.headers.get("Range", ""))
        content = self.files.get(self.path)
        if content is None:
            self.send_error(404)
            return
        first = int(self.headers["Range"].split("=")[1].rstrip("-")) if "Range" in self.headers else 0
        if first >= len(content):
            self.send_error(416)
            return
        self.send_response(206 if first else 200)
        self.send_header("Content-Length", str(len(content) - first))
        self.end_headers()
        self.wfile.write(content[first : first + self.most])

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, type[Server]]]:
    monkeypatch.setattr("data.ingest.download.SECONDS_BEFORE_RETRY", 0.01)
    Server.files, Server.requests, Server.most = {}, [], 1 << 60
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server) as running:
        thread = threading.Thread(target=running.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{running.server_address[1]}", Server
        running.shutdown()


def test_simulations_are_downloaded_and_go_on_when_the_server_hangs_up(
    server: tuple[str, type[Server]], suite: Path, noiseless: Path, tmp_path: Path
) -> None:
    url, serving = server
    packed(suite / "sims/sim00109", tmp_path / "archive", str)
    serving.files["/lightcones/sim00109.tar.gz"] = (tmp_path / "archive").read_bytes()
    result = made(config_of(suite, tmp_path, lightcones=f"{url}/lightcones", sims="2,109"))
    assert "404" in result["left_out"]["2"]
    assert np.array_equal(tiles_in(tmp_path), tiles_in(noiseless)[-12:])
    assert not list((tmp_path / "downloads").iterdir())

    whole = serving.files["/lightcones/sim00109.tar.gz"]
    for share in (0.5, 1.0):  # of an archive that was downloaded before the command was killed
        (tmp_path / "downloads" / "sim00109.tar.gz").write_bytes(whole[: int(share * len(whole))])
        serving.requests.clear()
        made(config_of(suite, tmp_path, lightcones=f"{url}/lightcones", sims="109", restart=True))
        assert serving.requests == [f"bytes={int(share * len(whole))}-"]
        assert np.array_equal(tiles_in(tmp_path), tiles_in(noiseless)[-12:])
    serving.files["/lightcones/sim00109.tar.gz"] = whole[:1000]
    damaged = config_of(suite, tmp_path, lightcones=f"{url}/lightcones", sims="109", restart=True)
    assert f"{url}/lightcones/sim00109.tar.gz is truncated" in made(damaged)["left_out"]["109"]
    assert not list((tmp_path / "downloads").iterdir())

    serving.files["/lightcones/sim00109.tar.gz"] = whole
    serving.requests.clear()
    serving.most = len(serving.files["/lightcones/sim00109.tar.gz"]) // 3 + 1
    download(f"{url}/lightcones/sim00109.tar.gz", tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == (tmp_path / "archive").read_bytes()
    assert serving.requests == ["", f"bytes={serving.most}-", f"bytes={2 * serving.most}-"]
    serving.most = 0
    with pytest.raises(BadSimulationError, match="could not be downloaded"):
        download(f"{url}/lightcones/sim00109.tar.gz", tmp_path / "never")


def test_an_error_of_writing_comes_out_of_a_worker() -> None:
    error = CannotWriteError(Path("there"), OSError(28, "No space left on device"))
    assert str(pickle.loads(pickle.dumps(error))) == str(error)


def test_lightcones_go_to_a_figure_of_merit_in_three_commands(
    suite: Path, tmp_path: Path, run_command: Callable
) -> None:
    tiles = ["--lmax", SMALL_LMAX, "--noise-level", "des_y3"]
    where = ["--results-dir", tmp_path]
    ingest = ["--lightcones", suite / "sims", "--params", suite / "params.csv", "--nz", suite / "nz.txt"]
    assert run_command("run_ingest.py", *ingest, *tiles, *where)[0] == 0
    stage_1 = ["--backbone", "tiny", "--max-epochs", 2, "--warmup-steps", 2, "--tag", "t"]
    assert run_command("run_compressor.py", *tiles, *where, *stage_1)[0] == 0
    code, out, _ = run_command(
        "run_npe.py", "--ckpt", tmp_path / "field_compressor_runs/t/best.ckpt", "--max-epochs", 2
    )
    assert code == 0
    assert "12 patches of sky" in out


def test_an_ingest_that_is_stopped_says_so_at_once_and_goes_on(suite: Path, noiseless: Path, tmp_path: Path) -> None:
    """While its workers are in the midst of a simulation."""
    given = {"lightcones": suite / "sims", "params": suite / "params.csv", "nz": suite / "nz.txt", "lmax": SMALL_LMAX}
    given |= {"noise-level": "noiseless", "results-dir": tmp_path, "workers": 2}
    command = [sys.executable, "run_ingest.py", *(str(word) for name, v in given.items() for word in (f"--{name}", v))]
    held = tmp_path / "sitecustomize.py"  # every worker waits in its second simulation
    held.write_text(
        "import data.ingest.simulation as s, time\nbefore, calls = s.alm_of_kappa, []\n"
        "def wait(*a, **k):\n    calls.append(1)\n    time.sleep(600 * (len(calls) > 1))\n    return before(*a, **k)\n"
        "s.alm_of_kappa = wait\n"
    )
    path = f"{tmp_path}{os.pathsep}{ROOT}"
    running = subprocess.Popen(
        command, cwd=ROOT, env={**os.environ, "PYTHONPATH": path}, stderr=subprocess.PIPE, text=True
    )
    folder = tmp_path / f"tiles/lmax_{SMALL_LMAX}_noiseless"
    deadline = time.monotonic() + GUARD_S
    while len(list(folder.glob("shard_*.parquet"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.1)
    running.send_signal(signal.SIGTERM)
    _, err = running.communicate(timeout=GUARD_S)
    assert running.returncode == 143
    assert "the same command goes on from there" in err.splitlines()[-1]
    held.unlink()
    assert len(list(folder.glob("shard_*.parquet"))) == 2
    assert subprocess.run(command, cwd=ROOT).returncode == 0
    assert np.array_equal(tiles_in(tmp_path), tiles_in(noiseless))


def test_a_command_that_could_use_nothing_fails(suite: Path, tmp_path: Path, run_command: Callable) -> None:
    options = ["--lightcones", suite / "sims", "--params", suite / "params.csv", "--nz", suite / "nz.txt"]
    code, _, err = run_command("run_ingest.py", *options, "--lmax", 100, "--results-dir", tmp_path, "--workers", 1)
    assert code == 2
    assert err.count("is left out: ") == 6
    assert "no simulation could be used" in err.splitlines()[-1]


def test_containers_give_the_tiles_that_this_machine_gives(
    server: tuple[str, type[Server]], suite: Path, noiseless: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One leads and the others ingest; here they are called one after another, and one is lost."""
    url, serving = server
    for sim_id in (1, 109):
        packed(suite / f"sims/sim{sim_id:05d}", tmp_path / "archive", str)
        serving.files[f"/sim{sim_id:05d}.tar.gz"] = (tmp_path / "archive").read_bytes()
    monkeypatch.setattr("data.ingest.suite.LOCAL_DISK", str(tmp_path / "disk"))
    config = config_of(suite, tmp_path / "results", lightcones=url, sims="1,2,109")
    sent: list[int] = []
    calls: list[str] = []

    def run_all(function: str, jobs: list[Job]) -> Iterator[Outcome | Exception]:
        module, name = function.rsplit(".", 1)
        assert not list(tmp_path.rglob("*.lock"))  # the Volume could not be reloaded
        for job in reversed(pickle.loads(pickle.dumps(jobs))):
            sent.append(job.sim_id)
            yield getattr(importlib.import_module(module), name)(job, lambda: calls.append("commit"))
        calls.append("reload")

    result = ingest_side_by_side(plan(config), lambda: calls.append("commit of the leader"), run_all)
    assert sent == [109, 2, 1]
    assert calls == [*3 * ["commit"], "reload", "commit of the leader"]
    assert (result["n_sims"], list(result["left_out"])) == (2, ["2"])
    assert not list((tmp_path / "disk").iterdir())
    assert not (tmp_path / "results/downloads").exists()
    wanted = tiles_in(noiseless)
    assert np.array_equal(tiles_in(tmp_path / "results"), np.concatenate([wanted[:12], wanted[-12:]]))

    ingest_side_by_side(plan(config), lambda: None, run_all)
    assert sent[3:] == [2]  # what is finished is not done again
    with pytest.raises(UserError, match="simulation 2; without --strict it is left out"):
        ingest_side_by_side(plan(replace(config, strict=True)), lambda: None, run_all)
    with pytest.raises(RuntimeError, match="the container was lost"):
        ingest_side_by_side(plan(config), lambda: None, lambda *_: iter([RuntimeError("the container was lost")]))
    with pytest.raises(UserError, match="give the URL"):
        ingest_side_by_side(plan(config_of(suite, tmp_path)), lambda: None, run_all)
