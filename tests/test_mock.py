"""The mock suite: spectra, noise, geometry, cosmologies, reproducibility."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from pathlib import Path

import ducc0
import numpy as np
import pytest
from conftest import SHARED_DATA, SMALL_LMAX, SMALL_SUITE
from scipy.integrate import quad
from scipy.special import sph_harm_y
from scipy.stats import kstest

from common.errors import UserError
from data.mock.config import MockConfig
from data.mock.cosmology import FIDUCIAL_COSMO, S8_COUNTS, S8_EDGES, design
from data.mock.fields import gaussian_cl_of_lognormal, signal_alm
from data.mock.nz import N_BINS, nz_of_bins
from data.mock.shift import empty_convergence, hilbert_shift, lognormal_shift
from data.mock.suite import FRESH_SEED_OFFSET, build_suite
from data.mock.theory import BIN_PAIRS, COSMO_NAMES, theory_cl
from data.read_shards import read_tiles
from data.schema import FACES, FOM_PARAMS, SURVEYS, columns_of, noise_cl, nside_of
from data.sky import ORIENTATIONS, equatorial_face, rotation, tile_centres, tiles_at
from data.sphere.harmonics import ell_of_alm, noise_alm
from data.sphere.tiles import tiles_of_alm

LMAX, N_SKIES = 200, 50


def banded(cl: np.ndarray, edges: list[int]) -> np.ndarray:
    """(2 ell + 1)-weighted means of cl (..., n_ell) between edges: (..., n_bands)."""
    ell = np.arange(cl.shape[-1])
    bands = [(lo <= ell) & (ell < hi) for lo, hi in itertools.pairwise(edges)]
    return np.stack([(cl * (2 * ell + 1))[..., b].sum(axis=-1) / (2 * ell + 1)[b].sum() for b in bands], axis=-1)


def mean_spectra(draw: Callable[[int], np.ndarray]) -> np.ndarray:
    """Ten spectra averaged over N_SKIES skies, by healpy: (10, LMAX + 1)."""
    healpy = pytest.importorskip("healpy")
    skies = [draw(seed) for seed in range(N_SKIES)]
    return np.stack([np.mean([healpy.alm2cl(alm[i], alm[j]) for alm in skies], axis=0) for i, j in BIN_PAIRS])


# ---------------------------------------------------------------- theory


def test_theory_table_agrees_with_pyccl_at_cosmologies_it_was_not_made_from() -> None:
    pytest.importorskip("pyccl")
    from data.mock.make_theory_table import ELL, ccl_spectra

    _, cosmologies = design(791, 2024, 109)
    extremes = [f(cosmologies[:, k]) for k in range(3) for f in (np.argmin, np.argmax)]
    for cosmo in cosmologies[[*extremes, 108, *range(0, 700, 100)]]:
        ratio = theory_cl(cosmo, int(ELL[-1]))[0][:, ELL.astype(int)] / ccl_spectra(cosmo)
        assert np.abs(ratio[:, ELL >= 10] - 1).max() <= 0.01, dict(zip(COSMO_NAMES, cosmo, strict=True))


@pytest.mark.slow
def test_theory_table_agrees_with_pyccl_over_the_whole_prior() -> None:
    pytest.importorskip("pyccl")
    from data.mock.make_theory_table import ELL, ccl_spectra

    _, cosmologies = design(791, 7, 109)
    ratio = np.array([theory_cl(c, int(ELL[-1]))[0][:, ELL.astype(int)] / ccl_spectra(c) for c in cosmologies[::4]])
    error = np.abs(ratio[:, :, ELL >= 10] - 1)
    print(f"largest error {error.max():.4f}, rms {np.sqrt(np.square(error).mean()):.5f}")
    assert error.max() <= 0.01


def test_theory_refuses_to_extrapolate() -> None:
    far = FIDUCIAL_COSMO.copy()
    far[0] = 0.6
    with pytest.raises(UserError, match="outside the box"):
        theory_cl(far, 100)
    with pytest.raises(UserError, match="ends at ell = 4096"):
        theory_cl(FIDUCIAL_COSMO, 5000)


# ---------------------------------------------------------------- fields


def test_gaussian_skies_have_the_theory_spectra() -> None:
    edges = [2, 10, 30, 60, 100, 150, 201]
    measured = banded(
        mean_spectra(lambda s: signal_alm(FIDUCIAL_COSMO, "gaussian", LMAX, np.random.default_rng(s))), edges
    )
    cl = theory_cl(FIDUCIAL_COSMO, LMAX)[0]
    auto = np.stack([cl[BIN_PAIRS.index((i, i))] for i in range(4)])
    variance = np.stack([(cl[p] ** 2 + auto[i] * auto[j]) for p, (i, j) in enumerate(BIN_PAIRS)])
    n_modes = np.array([sum(2 * ell + 1 for ell in range(lo, hi)) for lo, hi in itertools.pairwise(edges)])
    sigma = np.sqrt(banded(variance, edges) / n_modes / N_SKIES)
    pull = (measured - banded(cl, edges)) / sigma
    assert np.abs(pull).max() < 3
    assert 0.5 < pull.std() < 1.5  # the errors themselves are right


def test_lognormal_skies_have_the_theory_spectra_within_2_per_cent_and_positive_skewness() -> None:
    skies = mean_spectra(lambda s: signal_alm(FIDUCIAL_COSMO, "lognormal", LMAX, np.random.default_rng(s)))
    edges = [30, 50, 75, 100, 150, 201]
    ratio = banded(skies, edges) / banded(theory_cl(FIDUCIAL_COSMO, LMAX)[0], edges)
    assert np.abs(ratio - 1).max() < 0.02

    alm = signal_alm(FIDUCIAL_COSMO, "lognormal", LMAX, np.random.default_rng(0))
    kappa = tiles_of_alm(alm, LMAX, nside_of(LMAX), "disjoint").transpose(1, 0, 2, 3).reshape(4, -1).astype(np.float64)
    # For a lognormal field of shift lambda and variance s^2 the skewness is 3 (s / lambda) + (s / lambda)^3; cutting
    # the multipoles at lmax lowers it, but not to nothing, and keeps the order: near sources are the more skewed.
    skewness = ((kappa / kappa.std(axis=1, keepdims=True)) ** 3).mean(axis=1)
    bound = kappa.std(axis=1) / lognormal_shift(FIDUCIAL_COSMO)
    assert (skewness > 0.5 * 3 * bound).all()
    assert (skewness < 1.2 * (3 * bound + bound**3)).all()


@pytest.mark.parametrize(("omega_m", "w"), [(0.15, -1.7), (0.25, -1.0), (0.48, -0.35)])
def test_convergence_of_an_empty_line_of_sight_agrees_with_direct_integration(omega_m: float, w: float) -> None:
    def expansion(z: float) -> float:
        return np.sqrt(omega_m * (1 + z) ** 3 + (1 - omega_m) * (1 + z) ** (3 * (1 + w)))

    def chi(z: float) -> float:
        return quad(lambda x: 1 / expansion(x), 0, z)[0]

    def efficiency(z: float, tomographic_bin: int) -> float:
        return quad(lambda s: nz_of_bins(np.array([s]))[tomographic_bin, 0] * (1 - chi(z) / chi(s)), z, 6, limit=200)[0]

    def integrand(z: float, tomographic_bin: int) -> float:
        return 1.5 * omega_m * (1 + z) * chi(z) * efficiency(z, tomographic_bin) / expansion(z)

    direct = [quad(integrand, 0, 6, args=(k,), epsrel=1e-5)[0] for k in range(N_BINS)]
    np.testing.assert_allclose(empty_convergence(omega_m, w), direct, rtol=1e-4)


def test_lognormal_shift_is_hilberts_in_his_cosmology_and_follows_the_skewness_of_perturbation_theory() -> None:
    his = FIDUCIAL_COSMO.copy()
    his[[COSMO_NAMES.index("Omega_m"), COSMO_NAMES.index("w")]] = 0.25, -1.0
    np.testing.assert_allclose(lognormal_shift(his), hilbert_shift())
    # For a small variance S3 = 3 / lambda. In perturbation theory S3 falls about as Omega_m^-0.8 (Bernardeau, van
    # Waerbeke & Mellier 1997, astro-ph/9609122), and less so for farther sources.
    denser = his.copy()
    denser[COSMO_NAMES.index("Omega_m")] = 0.35
    slope = np.log(lognormal_shift(denser) / lognormal_shift(his)) / np.log(0.35 / 0.25)
    np.testing.assert_allclose(slope, 0.8, atol=0.2)
    assert (np.diff(slope) < 0).all()


def test_lognormal_transform_is_inverted_by_its_definition() -> None:
    # Two routes: from the Gaussian spectra back through xi = lambda_i lambda_j (exp(xi_g) - 1), on another grid.
    cl, shift = theory_cl(FIDUCIAL_COSMO, 300)[0], hilbert_shift()
    g_cl = gaussian_cl_of_lognormal(cl, shift)
    node, weight = np.polynomial.legendre.leggauss(1200)
    legendre = np.polynomial.legendre.legvander(node, 300)
    xi_g = (g_cl * (2 * np.arange(301) + 1) / (4 * np.pi)) @ legendre.T
    scale = np.array([shift[i] * shift[j] for i, j in BIN_PAIRS])[:, None]
    back = 2 * np.pi * (scale * np.expm1(xi_g) * weight) @ legendre
    np.testing.assert_allclose(back[:, 2:], cl[:, 2:], rtol=5e-3)


def test_noise_spectra_are_flat_and_of_the_stated_power() -> None:
    measured = mean_spectra(lambda s: noise_alm("des_y3", N_BINS, LMAX, np.random.default_rng(s)))
    edges = [0, 50, 100, 150, 201]
    bands = banded(measured, edges)
    power = banded(np.tile(noise_cl("des_y3", N_BINS)[:, None], LMAX + 1), edges)
    n_modes = np.array([sum(2 * ell + 1 for ell in range(lo, hi)) for lo, hi in itertools.pairwise(edges)])
    for p, (i, j) in enumerate(BIN_PAIRS):
        sigma = np.sqrt((1 + (i == j)) * power[i] * power[j] / n_modes / N_SKIES)
        assert np.abs((bands[p] - (i == j) * power[i]) / sigma).max() < 3.5


@pytest.mark.parametrize("name", sorted(SURVEYS))
def test_noise_levels_state_the_noise_of_a_pixel(name: str) -> None:
    # sigma_pix^2 = sigma_e^2 / (2 n_eff A_pix) for white noise in pixels of A_pix, as the published tiles were made.
    nside = 1024
    a_pix_arcmin2 = 4 * np.pi / (12 * nside**2) * (180 * 60 / np.pi) ** 2
    survey = SURVEYS[name]
    n_bins = len(survey.n_eff)
    sigma_pix = np.array(survey.sigma_e) / np.sqrt(2 * np.array(survey.n_eff) * a_pix_arcmin2)
    np.testing.assert_allclose(noise_cl(name, n_bins), sigma_pix**2 * 4 * np.pi / (12 * nside**2), rtol=1e-12)
    np.testing.assert_allclose(noise_cl(f"{name}_survey", n_bins), 2 * noise_cl(name, n_bins), rtol=1e-15)
    for other in (1, 6):
        assert noise_cl("noiseless", other).tolist() == other * [0]
        with pytest.raises(UserError, match=f"{name} has {n_bins} bins, but the tiles have {other}"):
            noise_cl(name, other)


# ---------------------------------------------------------------- geometry


@pytest.fixture(scope="module")
def overlaps() -> dict[str, np.ndarray]:
    """For each geometry the share of tile i that tile j covers, (12, 12), by Monte Carlo over the sphere."""
    points = np.random.default_rng(0).standard_normal((300_000, 3))
    points /= np.linalg.norm(points, axis=1, keepdims=True)
    result = {}
    for geometry, orientations in ORIENTATIONS.items():
        inside = tiles_at(points, orientations).astype(np.float64)
        result[geometry] = inside.T @ inside / inside.sum(axis=0)[:, None]
        result[geometry + " sky"] = inside.any(axis=1).mean()
    return result


def test_the_closed_form_of_the_equatorial_faces_is_ducc0s() -> None:
    base = ducc0.healpix.Healpix_Base(1, "NEST")  # at nside 1 a pixel is a base face
    points = np.random.default_rng(1).standard_normal((200_000, 3))
    face = base.vec2pix(points)
    points /= np.linalg.norm(points, axis=1, keepdims=True)
    np.testing.assert_array_equal(equatorial_face(points), np.where(np.isin(face, FACES), face, -1))
    np.testing.assert_allclose(tile_centres(((0.0, 0.0, 0.0),)), base.pix2vec(np.array(FACES)), atol=1e-15)


def test_disjoint_tiles_hardly_overlap_and_cover_the_sky(overlaps: dict[str, np.ndarray]) -> None:
    share = overlaps["disjoint"] - np.eye(12)
    assert share.max() < 0.03
    assert overlaps["disjoint sky"] == pytest.approx(0.96, abs=0.005)
    centres = tile_centres(ORIENTATIONS["disjoint"])
    apart = np.degrees(np.arccos(np.clip(centres @ centres.T, -1, 1)))[~np.eye(12, dtype=bool)]
    assert apart.min() == pytest.approx(60)  # the twelve directions of a cuboctahedron


def test_published_tiles_overlap_as_they_do(overlaps: dict[str, np.ndarray]) -> None:
    share = np.triu(overlaps["published"], 1)
    assert (share > 0.999).sum() == 4  # the same pixels
    assert ((share > 0.9) & (share < 0.999)).sum() == 4  # the same sky
    assert overlaps["published sky"] == pytest.approx(0.51, abs=0.005)


def test_published_orientation_2_is_orientation_0_with_its_faces_permuted() -> None:
    alm = signal_alm(FIDUCIAL_COSMO, "gaussian", 64, np.random.default_rng(1))
    tiles = tiles_of_alm(alm, 64, 32, "published")
    permuted = tiles[[1, 2, 3, 0]]  # faces 5, 6, 7, 4
    assert np.abs(tiles[8:12] - permuted).max() < 1e-6 * tiles.std()


@pytest.mark.parametrize("geometry", sorted(ORIENTATIONS))
def test_every_pixel_shows_the_sky_where_the_geometry_says_it_lies(geometry: str) -> None:
    # By brute force: the spherical harmonics summed at the pixel's own direction on the unrotated sky.
    healpy = pytest.importorskip("healpy")
    lmax, nside = 7, 8
    rng = np.random.default_rng(3)
    ell = ell_of_alm(lmax)
    m = np.concatenate([np.full(lmax + 1 - k, k) for k in range(lmax + 1)])
    alm = rng.standard_normal((4, len(ell))) + 1j * rng.standard_normal((4, len(ell))) * (m > 0)
    tiles = tiles_of_alm(alm, lmax, nside, geometry)
    for _ in range(60):
        orientation, face, x, y = rng.integers([3, 4, nside, nside])
        vector = np.array(healpy.pix2vec(nside, healpy.xyf2pix(nside, int(x), int(y), int(face) + 4)))
        vector = vector @ rotation(np.radians(ORIENTATIONS[geometry][orientation]))  # R^T v: back to the unrotated sky
        theta, phi = np.arccos(vector[2]), np.arctan2(vector[1], vector[0])
        harmonics = sph_harm_y(ell, m, theta, phi) * np.where(m > 0, 2, 1)
        np.testing.assert_allclose(
            tiles[4 * orientation + face, :, y, x], (alm * harmonics).sum(axis=1).real, rtol=2e-5, atol=1e-5
        )
        assert tiles_at(vector[None], ORIENTATIONS[geometry])[0, 4 * orientation + face]


# ---------------------------------------------------------------- cosmologies


def test_the_design_has_the_shape_of_the_gower_street_suite() -> None:
    sim_id, cosmologies = design(791, 42, 109)
    assert sim_id.tolist() == list(range(1, 792))
    np.testing.assert_array_equal(cosmologies[108], FIDUCIAL_COSMO)
    counts, _ = np.histogram(cosmologies[:, 1], S8_EDGES)
    assert np.abs(counts - S8_COUNTS).max() <= 3
    omega_m, s8 = cosmologies[:, 0], cosmologies[:, 1]
    assert abs(np.corrcoef(omega_m, s8)[0, 1]) < 0.05


def test_the_design_agrees_with_the_published_table() -> None:
    path = SHARED_DATA / "gower_street_runs.csv"
    if not path.exists():
        pytest.skip("needs the parameter table in ../shared/data")
    rows = [line.split(",") for line in path.read_text().splitlines()[2:]]
    table = {
        name: np.array([float(row[k]) for row in rows])
        for name, k in (("Omega_m", 3), ("w", 5), ("h", 7), ("n_s", 8), ("m_nu", 9))
    }
    table["S8"] = np.array([float(row[4]) for row in rows]) * np.sqrt(table["Omega_m"] / 0.3)
    _, cosmologies = design(791, 42, 109)
    for name, published in table.items():
        ours = cosmologies[:, COSMO_NAMES.index(name)]
        assert abs(ours.mean() - published.mean()) < 0.1 * published.std(), name
        assert 0.9 < ours.std() / published.std() < 1.1, name
        assert kstest(ours, published).statistic < 0.08, name


def test_a_fresh_suite_has_the_same_prior_and_no_simulation_in_common() -> None:
    _, ours = design(791, 42, 109)
    _, fresh = design(791, 42 + FRESH_SEED_OFFSET, None)
    assert not set(ours[:, 0].tolist()) & set(fresh[:, 0].tolist())
    for k, name in enumerate(COSMO_NAMES):
        assert kstest(ours[:, k], fresh[:, k]).pvalue > 0.5, name  # two low-discrepancy draws from one distribution


def test_a_small_suite_is_part_of_a_large_one_and_has_the_fiducial() -> None:
    ids_small, small = design(20, 42, 109)
    _, large = design(791, 42, 109)
    assert ids_small.tolist() == [*range(1, 20), 109]
    np.testing.assert_array_equal(small, large[ids_small - 1])


# ---------------------------------------------------------------- suite


def shard_bytes(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("shard_*.parquet")}


def test_the_tiles_do_not_depend_on_workers_and_an_interrupted_suite_is_completed(
    tmp_path: Path, small_tiles_dir: Path
) -> None:
    config = MockConfig(results_dir=str(tmp_path), workers=1, **SMALL_SUITE)
    build_suite(config)
    ours = tmp_path / "tiles" / small_tiles_dir.name
    assert shard_bytes(ours) == shard_bytes(small_tiles_dir)

    kept = ours / "shard_0000.parquet"
    stamp = kept.stat().st_mtime_ns
    (ours / "shard_0001.parquet").unlink()
    with pytest.raises(UserError, match="50 of the 60 simulations of its suite; give its run_mock"):
        read_tiles(ours, SMALL_LMAX, "noiseless")
    (ours / "shard_0001.parquet.tmp").write_bytes(b"half a shard")
    build_suite(config)
    assert shard_bytes(ours) == shard_bytes(small_tiles_dir)
    assert kept.stat().st_mtime_ns == stamp


def test_another_suite_in_the_same_folder_is_refused(tmp_path: Path, small_tiles_dir: Path) -> None:
    folder = tmp_path / "tiles"
    folder.mkdir()
    for name, content in shard_bytes(small_tiles_dir).items():
        (folder / name).write_bytes(content)
    config = MockConfig(tiles_dir=str(folder), **SMALL_SUITE)
    with pytest.raises(UserError, match=r"--seed 42 there, 43 here.*--restart"):
        build_suite(dataclasses.replace(config, seed=43))
    smaller = dataclasses.replace(config, n_sims=10)
    with pytest.raises(UserError, match=r"--n-sims 60 there, 10 here"):
        build_suite(smaller)
    build_suite(dataclasses.replace(smaller, restart=True))
    assert len(read_tiles(folder, SMALL_LMAX, "noiseless").keys) == 120  # nothing of the larger suite is left


def test_shards_of_others_are_never_deleted(tmp_path: Path) -> None:
    (tmp_path / "shard_0000.parquet").write_bytes(b"somebody's download")
    for restart in (False, True):
        with pytest.raises(UserError, match=r"was not made by this command"):
            build_suite(MockConfig(tiles_dir=str(tmp_path), restart=restart, **SMALL_SUITE))
    assert (tmp_path / "shard_0000.parquet").read_bytes() == b"somebody's download"


def test_labels_are_those_of_the_design(small_tiles_dir: Path) -> None:
    tiles = read_tiles(small_tiles_dir, SMALL_LMAX, "noiseless")
    _, cosmologies = design(60, 42, 109)
    np.testing.assert_array_equal(columns_of(tiles.params, FOM_PARAMS)[::12], cosmologies[:, :2])
    # And the pixels are of that cosmology: their variance is the sum over the theory spectrum.
    ell = np.arange(SMALL_LMAX + 1)
    cl = theory_cl(cosmologies, SMALL_LMAX)[:, [BIN_PAIRS.index((i, i)) for i in range(4)]]  # (60, 4, n_ell)
    expected = (cl * (2 * ell + 1) / (4 * np.pi)).sum(axis=-1)  # (60, 4)
    ratio = np.square(tiles.kappa.astype(np.float64)).reshape(60, 12, 4, -1).mean(axis=(1, 3)) / expected
    assert abs(ratio.mean() - 1) < 0.03
    assert ratio.std() < 0.15  # cosmic variance of some thousand modes; a suite with labels swapped has 0.6
