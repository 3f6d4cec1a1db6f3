"""Nuisances of a survey: spectra against pyccl, maps against both, draws, columns, and all that is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import SMALL_LMAX, SMALL_SUITE
from fake_lightcones import lensing_cl

from benchmarks.fisher import fisher_foms
from common.artifacts import tiles_folder
from common.errors import UserError
from data.cache import read_tiles_through_cache
from data.mock.config import MockConfig
from data.mock.cosmology import FIDUCIAL_COSMO, design
from data.mock.fields import transport
from data.mock.limber import spectra_ratio
from data.mock.nz import N_BINS
from data.mock.suite import build_suites
from data.mock.theory import COSMO_NAMES, cl_matrix, theory_cl_at
from data.nuisance import Nuisance, Prior, draw, growth, priors_of, read_priors
from data.read_shards import read_tiles
from data.tiles import Tiles
from npe.result import read_fom_result

ELL = np.array([10.0, 20, 50, 100, 200, 500, 1000])  # as far as the largest published lmax
ZERO = np.zeros(N_BINS)
SUITE_SIZE = 791
# DES Y3 as published: Amon et al. 2022, arXiv:2105.13543; Myles et al. 2021, arXiv:2012.08566; Secco, Samuroff et al.
# 2022, arXiv:2105.13544.
M_SIGMA, DZ_SIGMA = np.array([0.0091, 0.0078, 0.0076, 0.0076]), np.array([0.018, 0.015, 0.011, 0.017])
ALIGNMENTS = -5.0, 5.0


def parts(spectra: Callable[[Nuisance], np.ndarray], dz: np.ndarray, eta: float) -> dict[str, np.ndarray]:
    """GG, GI and II of amplitude one, as spectra are quadratic in the amplitude."""
    none, plus, minus = (spectra(Nuisance(ZERO, dz, a, eta)) for a in (0.0, 1.0, -1.0))
    return {"GG": none, "GI": (plus - minus) / 2, "II": (plus + minus) / 2 - none}


def test_the_default_priors_are_those_of_des_y3() -> None:
    priors = read_priors("")
    for kind, sigma in (("m", M_SIGMA), ("dz", DZ_SIGMA)):
        assert [priors.pop(f"{kind}_{a + 1}") for a in range(N_BINS)] == [Prior("normal", 0.0, one) for one in sigma]
    assert priors == dict.fromkeys(("A_IA", "eta_IA"), Prior("flat", *ALIGNMENTS))


# The last two are the corners of the suite's box: most and least matter.
DRAWS = [(0, 0, 0.0), (3, 2, 0.0), (5, -2, 2.0), (11, 1, -3.0), ("most", -2, 5.0), ("least", 2, -5.0)]


@pytest.mark.parametrize(("number", "shift", "eta"), DRAWS)
def test_every_spectrum_agrees_with_pyccl_at_draws_that_the_tables_were_not_made_from(
    number: int | str, shift: float, eta: float
) -> None:
    some = {0: FIDUCIAL_COSMO, **dict(enumerate(design(16, 5, None)[1][1:], 1))}
    by_matter = sorted(design(SUITE_SIZE, 42, None)[1], key=lambda cosmo: cosmo[COSMO_NAMES.index("Omega_m")])
    cosmo = (some | {"least": by_matter[0], "most": by_matter[-1]})[number]
    bare = lensing_cl(cosmo, ELL)
    expected = parts(lambda nuisance: lensing_cl(cosmo, ELL, nuisance), shift * DZ_SIGMA, eta)
    found = parts(lambda n: spectra_ratio(cosmo, [n], ELL)[0] * bare, shift * DZ_SIGMA, eta)
    for name in expected:
        worst = np.abs(found[name] / expected[name] - 1).max()
        assert worst <= 0.01, (name, worst, dict(zip(COSMO_NAMES, cosmo, strict=True)))
    assert (found["GI"] < 0).all()
    assert (found["II"] > 0).all()


def test_a_forecast_knows_the_priors(tmp_path: Path) -> None:
    table = tmp_path / "priors.txt"

    def ratio(nuisance: str, *lines: str) -> float:
        table.write_text("\n".join(lines))
        one, bare = (fisher_foms(40, "des_y3", kinds, str(table))[0] for kinds in (nuisance, "none"))
        return float(one / bare)

    still = [f"{name} normal 0 0" for name in ("dz_1", "dz_2", "dz_3", "dz_4", "A_IA", "eta_IA")]
    assert ratio("all", *(f"m_{a} normal 0 0" for a in range(1, 5)), *still) == 1
    assert ratio("ia", "A_IA normal 0 1", "eta_IA normal 0 1") < 0.999
    fixed, free = (ratio("ia", "A_IA normal 2 0", f"eta_IA normal 0 {sigma}") for sigma in (0, 1))
    assert free < 0.999 * fixed  # the redshift dependence of alignments that there are


def test_growth_agrees_with_its_integral_where_that_holds() -> None:
    """For w = -1 the growing mode is H int da / (a H)^3 (Heath 1977, MNRAS 179, 351)."""
    from scipy.integrate import quad

    def integral(z: float) -> float:
        expansion = lambda a: np.sqrt(0.3 / a**3 + 0.7)  # noqa: E731
        a = 1 / (1 + z)
        return float(expansion(a) * quad(lambda x: (x * expansion(x)) ** -3, 0, a)[0])

    z = np.array([0.1, 0.5, 1.0, 3.0])
    np.testing.assert_allclose(growth(z, 0.3, -1.0), [integral(one) / integral(0.0) for one in z], rtol=1e-6)


def test_the_sky_with_nuisances_has_their_spectra_and_moves_no_more_than_it_must() -> None:
    cl = theory_cl_at(FIDUCIAL_COSMO, ELL)[0]
    target = cl * spectra_ratio(FIDUCIAL_COSMO, [Nuisance(ZERO, DZ_SIGMA, 2.0, -1.0)], ELL)[0]
    matrix = transport(cl, target)
    np.testing.assert_allclose(matrix @ cl_matrix(cl) @ matrix, cl_matrix(target), rtol=1e-8, atol=1e-20)
    np.testing.assert_allclose(transport(cl, cl), np.broadcast_to(np.eye(N_BINS), matrix.shape), atol=1e-9)
    # Any other root is another rotation of the bins, and moves the sky more: <|T a - a|^2>.
    angle = 0.1
    turn = np.eye(N_BINS)
    turn[:2, :2] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    root = np.linalg.cholesky(cl_matrix(target)) @ turn @ np.linalg.inv(np.linalg.cholesky(cl_matrix(cl)))
    moved = [np.einsum("lij,ljk,lik->l", t - np.eye(N_BINS), cl_matrix(cl), t - np.eye(N_BINS)) for t in (matrix, root)]
    assert (moved[0] < moved[1]).all()


SUITE = ("--lmax", SMALL_LMAX, "--noise-level", "des_y3", "--n-sims", 3, "--workers", 1)


GEOMETRIES = {"disjoint": (), "flat": ("--geometry", "flat", "--field", "gaussian")}


@pytest.mark.parametrize("geometry", list(GEOMETRIES))
def test_every_orientation_has_the_sky_of_its_own_label(geometry: str, run_command: Callable, tmp_path: Path) -> None:
    """Where all are given what one orientation has, its tiles are the same."""
    suite = ("run_mock.py", *SUITE, *GEOMETRIES[geometry], "--nuisance", "all")
    assert run_command(*suite, "--results-dir", tmp_path)[0] == 0
    tiles = tiles_of(tmp_path, "des_y3", "all")
    for row in (0, 4, 8):  # first tile of each orientation
        priors = tmp_path / "priors.txt"
        priors.write_text("\n".join(f"{name} normal {v[row]:.17g} 0" for name, v in tiles.nuisances.items()))
        fixed = tmp_path / str(row)
        assert run_command(*suite, "--nuisance-priors", priors, "--results-dir", fixed)[0] == 0
        same = slice(row, row + 4)
        np.testing.assert_array_equal(tiles_of(fixed, "des_y3", "all").kappa[same], tiles.kappa[same])


@pytest.mark.parametrize("geometry", list(GEOMETRIES))
def test_zero_width_gives_the_bare_suite_to_the_bit(geometry: str, run_command: Callable, tmp_path: Path) -> None:
    priors = tmp_path / "priors.txt"
    names = [*(f"{kind}_{a}" for kind in ("m", "dz") for a in range(1, 5)), "A_IA", "eta_IA"]
    priors.write_text("\n".join(f"{name} normal 0 0  # fixed" for name in names))
    suite = ("run_mock.py", *SUITE, *GEOMETRIES[geometry], "--results-dir", tmp_path)
    assert run_command(*suite, "--nuisance", "none,all", "--nuisance-priors", priors)[0] == 0
    bare, zero = (
        read_tiles(tmp_path / f"tiles/lmax_{SMALL_LMAX}_des_y3{n}", SMALL_LMAX, "des_y3") for n in ("", "_all")
    )
    np.testing.assert_array_equal(bare.kappa, zero.kappa)
    assert not bare.nuisances
    assert sorted(zero.nuisances) == sorted(names)
    assert not any(values.any() for values in zero.nuisances.values())


def test_a_nuisance_is_drawn_alike_whatever_else_is_and_the_fiducial_has_the_centre() -> None:
    priors = read_priors("")
    every, some = (draw(priors_of(kinds, priors, 4), 42, 7, fiducial=False) for kinds in ("all", "m"))
    for name, values in some.items():
        np.testing.assert_array_equal(values, every[name])
    many = np.array([draw(priors, 42, sim, fiducial=False)["dz_1"] for sim in range(500)])
    assert abs(many.std() / DZ_SIGMA[0] - 1) < 0.1
    assert abs(np.corrcoef(many.T)[0, 1]) < 0.15  # orientations are independent
    for name in ("A_IA", "eta_IA"):  # flat: mean, and no gap at either end
        flat = np.array([draw(priors, 42, sim, fiducial=False)[name] for sim in range(500)])
        assert abs(flat.mean()) < 0.3
        np.testing.assert_allclose([flat.min(), flat.max()], ALIGNMENTS, atol=0.1)
        assert np.abs(flat).max() <= ALIGNMENTS[1]
    assert not any(values.any() for values in draw(priors, 42, 109, fiducial=True).values())


@pytest.fixture(scope="module")
def suites(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Results folder with small suites, with noise and without, bare and with all nuisances."""
    results = tmp_path_factory.mktemp("suites")
    for noise_level in ("des_y3", "noiseless"):
        options = {**SMALL_SUITE, "noise_level": noise_level, "nuisance": "none,m,all"}
        build_suites(MockConfig(results_dir=str(results), **options))
    return results


def tiles_of(results: Path, noise_level: str, nuisance: str = "none") -> Tiles:
    return read_tiles(tiles_folder("", results, SMALL_LMAX, noise_level, nuisance), SMALL_LMAX, noise_level)


def test_shear_bias_scales_the_signal_and_noise_stays_what_it_is(suites: Path) -> None:
    bare, signal = tiles_of(suites, "des_y3"), tiles_of(suites, "noiseless")
    for nuisance in ("m", "all"):
        noise = tiles_of(suites, "des_y3", nuisance).kappa - tiles_of(suites, "noiseless", nuisance).kappa
        np.testing.assert_allclose(noise, bare.kappa - signal.kappa, atol=1e-7)
    biased = tiles_of(suites, "noiseless", "m")
    m = biased.columns([f"m_{a + 1}" for a in range(N_BINS)])  # (n, 4)
    np.testing.assert_allclose(biased.kappa, (1 + m[:, :, None, None]) * signal.kappa, rtol=1e-4, atol=1e-8)


def test_nuisances_are_columns_that_differ_by_orientation_and_can_be_inferred(
    suites: Path, run_command: Callable
) -> None:
    folder = tiles_folder("", suites, SMALL_LMAX, "des_y3", "all")
    tiles = read_tiles(folder, SMALL_LMAX, "des_y3")
    again, _ = read_tiles_through_cache(folder, SMALL_LMAX, "des_y3")
    cached, _ = read_tiles_through_cache(folder, SMALL_LMAX, "des_y3")
    for name, values in tiles.nuisances.items():
        np.testing.assert_array_equal(again.nuisances[name], values)
        np.testing.assert_array_equal(cached.nuisances[name], values)
        by_orientation = values.reshape(-1, 3, 4)
        assert (by_orientation == by_orientation[..., :1]).all()
        assert len(np.unique(values)) == 3 * (SMALL_SUITE["n_sims"] - 1) + 1  # the fiducial has one
    options = ("--lmax", SMALL_LMAX, "--noise-level", "des_y3", "--nuisance", "all", "--results-dir", suites)
    training = (*options, "--backbone", "tiny", "--max-epochs", 1)
    lost = "the tiles vary A_IA, of which the summaries will say nothing"
    assert lost in run_command("run_compressor.py", *training, "--tag", "lost")[2]
    code, _, err = run_command("run_compressor.py", *training, "--params", "Omega_m,S8,A_IA,dz_1", "--tag", "nuisances")
    assert code == 0, err
    assert lost not in err
    run = suites / "field_compressor_runs/nuisances"
    code, _, err = run_command("run_npe.py", "--ckpt", run / "best.ckpt", "--max-epochs", 1, "--n-members", 1)
    assert code == 0, err
    result = read_fom_result(suites / "field_npe_runs/nuisances")
    assert result.params == ("Omega_m", "S8", "A_IA", "dz_1")
    assert result.fiducial.theta_true[2:] == [0, 0]
    report = (suites / "field_npe_runs/nuisances/report.html").read_text()
    assert "The suite varies intrinsic alignments" in report

    shard = folder / "shard_0000.parquet"
    npe_run = suites / "field_npe_runs/nuisances"
    assert run_command("run_predict.py", "--run", npe_run, "--tiles", shard, "--n-samples", 5)[0] == 0
    assert "A_IA\t" in next(suites.rglob("tile_0000.paramnames")).read_text()


def test_hugging_face_opens_the_columns(suites: Path) -> None:
    datasets = pytest.importorskip("datasets")
    shard = str(tiles_folder("", suites, SMALL_LMAX, "des_y3", "all") / "shard_0000.parquet")
    loaded = datasets.Dataset.from_parquet(shard, cache_dir=str(suites / "hf"))
    tiles = tiles_of(suites, "des_y3", "all")
    np.testing.assert_array_equal(loaded["A_IA"][:12], tiles.nuisances["A_IA"][:12])


def test_tiles_with_other_nuisances_than_said_are_refused(suites: Path, run_command: Callable, tmp_path: Path) -> None:
    shared = ("--lmax", SMALL_LMAX, "--noise-level", "des_y3", "--results-dir", suites)
    with_all, bare = (tiles_folder("", suites, SMALL_LMAX, "des_y3", one) for one in ("all", "none"))
    code, _, err = run_command("run_check.py", *shared, "--tiles-dir", with_all)
    assert code == 2
    assert "which is not --nuisance none" in err
    code, _, err = run_command("run_check.py", *shared, "--nuisance", "ia", "--tiles-dir", bare)
    assert code == 2
    assert "vary no nuisances" in err
    code, _, err = run_command("run_compressor.py", *shared, "--params", "Omega_m,S8,A_IA", "--backbone", "tiny")
    assert code == 2
    assert "has A_IA, which these tiles do not vary" in err
    for number, folder in enumerate((with_all, bare)):
        (tmp_path / f"shard_{number:04d}.parquet").symlink_to(folder / f"shard_{number:04d}.parquet")
    with pytest.raises(UserError, match="mixes two suites"):
        read_tiles(tmp_path, SMALL_LMAX, "des_y3")
    (tmp_path / "wide.txt").write_text("\n".join(f"m_{a} normal 0 0.1" for a in range(1, 5)))
    wide = {**SMALL_SUITE, "n_sims": 3, "noise_level": "des_y3", "nuisance_priors": str(tmp_path / "wide.txt")}
    build_suites(MockConfig(**wide, results_dir=str(tmp_path), nuisance="m"))
    folder = tiles_folder("", tmp_path, SMALL_LMAX, "des_y3", "m")
    narrow = tiles_folder("", suites, SMALL_LMAX, "des_y3", "m")
    (folder / "shard_0001.parquet").symlink_to(narrow / "shard_0001.parquet")
    with pytest.raises(UserError, match=r"shard_0001\.parquet has its nuisances from other priors"):
        read_tiles(folder, SMALL_LMAX, "des_y3")


def test_a_sweep_has_each_nuisance_beside_the_bare_run(suites: Path, run_command: Callable) -> None:
    for priors in ("", "wide"):
        fresh = {
            **SMALL_SUITE,
            "noise_level": "des_y3",
            "fresh": True,
            "n_sims": 6,
            "results_dir": str(suites / priors),
        }
        if priors:
            (suites / "wide.txt").write_text("\n".join(f"m_{a} normal 0 0.1" for a in range(1, 5)))
            fresh["nuisance_priors"] = str(suites / "wide.txt")
        build_suites(MockConfig(**fresh, nuisance="m" if priors else "none,m"))

    def sweep(calibration: str, *more: object) -> tuple[int, str, str]:
        stage_2 = f"--max-epochs 2 --n-members 1 --calibration-tiles {suites}/{calibration}"
        options = ("--lmax", SMALL_LMAX, "--noise-level", "des_y3", "--seeds", 2, "--results-dir", suites)
        return run_command(
            "run_sweep.py", *options, "--stage-1", "--backbone tiny --max-epochs 1", "--stage-2", stage_2, *more
        )

    for calibration, said in (
        (f"fresh_tiles/lmax_{SMALL_LMAX}_des_y3", "varies no nuisances, the run's tiles vary m_1"),
        (f"wide/fresh_tiles/lmax_{SMALL_LMAX}_des_y3_m", "other --nuisance-priors"),
    ):
        code, _, err = sweep(calibration, "--nuisance", "m", "--name", "refused")
        assert code == 2
        assert said in err
        assert not list(suites.glob("field_compressor_runs/refused*"))  # before stage 1
    folders = "fresh_tiles/lmax_{lmax}_{noise_level}{nuisance}"
    code, _, err = sweep(folders, "--nuisance", "none,m", "--n-sims", "8,9,10,12")
    assert code == 2
    assert "one --nuisance at a time" in err
    code, out, err = sweep(folders, "--nuisance", "none,m")
    assert code == 0, err
    bare, m = json.loads((suites / "sweeps/sweep/fom_vs_lmax.json").read_text())["curve"]
    runs = [
        [read_fom_result(suites / f"field_npe_runs/sweep_lmax{SMALL_LMAX}{n}_seed{seed}") for seed in (42, 43)]
        for n in ("", "_m")
    ]
    assert (bare["to_bare"], bare["recalibrated_to_bare"]) == (1, 1)
    for figure, of in (
        ("to_bare", lambda result: result),
        ("recalibrated_to_bare", lambda result: result.recalibrated),
    ):
        theirs, ours = (np.array([of(result).fom_fiducial_median for result in results]) for results in runs)
        assert m[figure] == pytest.approx((ours / theirs).mean())
        assert f"{(ours / theirs).mean():.3f} +- " in out
    assert m["fom_recalibrated"] == pytest.approx(ours.mean())
    assert m["chi2_per_dof_of_fom"] == pytest.approx(np.mean([result.recalibrated.scale for result in runs[1]]))

    assert "no bare run; add none" in sweep(folders, "--nuisance", "m")[1]
    bare_folder = tiles_folder("", suites, SMALL_LMAX, "des_y3", "none")
    kept = bare_folder.rename(suites / "kept")
    build_suites(MockConfig(**{**SMALL_SUITE, "noise_level": "des_y3", "seed": 7}, results_dir=str(suites)))
    code, _, err = sweep(folders, "--nuisance", "none,m", "--name", "strange")
    assert code == 2
    assert "has other simulations than" in err
    assert not list(suites.glob("field_compressor_runs/strange*_m_*"))  # before stage 1
    shutil.rmtree(bare_folder)
    kept.rename(bare_folder)
    shutil.rmtree(suites / f"fresh_tiles/lmax_{SMALL_LMAX}_des_y3_m")
    code, out, err = sweep(folders, "--nuisance", "none,m")
    assert code == 2
    assert "--nuisance m --fresh" in err  # the cure
    assert "2 of 4 points failed" in err


@pytest.mark.parametrize(
    ("text", "nuisance", "said"),
    [
        ("m_1 normal 0 0.01\nm_2 normal 0 0.01\nm_4 normal 0 0.01", "m", "no prior of m_3"),
        ("m_1 normal -1.5 0\nm_2 normal 0 0\nm_3 normal 0 0\nm_4 normal 0 0", "m", "m_1 = -1.50 turns the signal's"),
        ("m_1 normal 0 -0.01", "m", "in the prior of m_1, the sigma is negative"),
        ("A_IA flat 5 -5", "ia", "in the prior of A_IA, the lower end is above its upper end"),
        ("A_IA gauss 0 1", "ia", "line 1 is 'A_IA gauss 0 1'"),
        ("m_0 normal 0 1", "m", "line 1 is 'm_0 normal 0 1'"),
        ("m_1 normal 0", "m", "a line is like"),
        ("A_IA flat 0 nan", "ia", "a line is like"),
        ("A_IA flat -1e6 1e6", "ia", "a line is like"),
        ("A_IA flat 0 1\nA_IA flat 0 1", "ia", "is there twice"),
        ("\n".join(f"dz_{a} normal -0.3 0.01" for a in range(1, 5)), "dz", "of the sources of bin 1 below z = 0"),
        ("m_1 normal 0 0.01", "none,m", "no prior of m_2"),
        ("\n".join(f"dz_{a} normal 3.8 0.01" for a in range(1, 5)), "none,dz", "of bin 1 beyond z = 4"),
        (None, "m", "cannot be read"),
        ("", "none", "of which none varies"),
        ("", "shear", "'shear' is none of"),
        ("", "dz+m", "'dz+m' is written m+dz"),  # it would be the suite m+dz in another folder
        ("", "m+dz+ia", "'m+dz+ia' is written all"),
    ],
)
def test_senseless_priors_are_refused_before_anything_is_made(
    text: str | None, nuisance: str, said: str, run_command: Callable, tmp_path: Path
) -> None:
    priors = tmp_path / "priors.txt"
    if text is not None:
        priors.write_text(text)
    code, _, err = run_command(
        "run_mock.py", *SUITE, "--nuisance", nuisance, "--nuisance-priors", priors, "--results-dir", tmp_path
    )
    assert code == 2
    assert said in err
    assert "Traceback" not in err
    assert not (tmp_path / "tiles").exists()
