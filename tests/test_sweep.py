"""The Figure of Merit against lmax, over seeds, and against the number of simulations."""

from __future__ import annotations

import json
import shlex
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from conftest import SMALL_LMAX, SMALL_SUITE

from common.command import function_named
from common.errors import UserError
from common.options import parse_args
from data.mock.config import MockConfig
from data.mock.suite import build_suite
from data.split import read_manifest, subset_of
from npe.config import SweepConfig, SweepRun
from npe.result import FomResult
from npe.sweep import run_point, sweep_side_by_side

OTHER_LMAX = 24  # 16 x 16 pixels as well
STAGE_1 = "--backbone tiny --max-epochs 2 --batch-size 64 --warmup-steps 10 --device cpu"
STAGE_2 = "--max-epochs 3 --n-members 2 --device cpu"


def test_a_sweep_draws_its_curve_skips_what_is_finished_and_survives_a_failed_point(
    tmp_path: Path, run_command: Callable
) -> None:
    build_suite(MockConfig(results_dir=str(tmp_path), **SMALL_SUITE))
    options = ["--results-dir", tmp_path, "--lmax", f"{OTHER_LMAX},{SMALL_LMAX}", "--seeds", 2, "--noise-level"]
    options += ["noiseless", "--stage-1", STAGE_1, "--stage-2", STAGE_2]
    code, out, err = run_command("run_sweep.py", *options)
    assert code == 2
    assert "2 of 4 points failed" in err.splitlines()[-1]
    folder = tmp_path / "sweeps" / "sweep"
    result = json.loads((folder / "fom_vs_lmax.json").read_text())
    assert result["failed"] == [f"sweep_lmax{OTHER_LMAX}_seed42", f"sweep_lmax{OTHER_LMAX}_seed43"]
    assert "no shard_*.parquet" in out
    assert "no shard_*.parquet" in err
    assert [row["lmax"] for row in result["curve"]] == [SMALL_LMAX]
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*result.json")}
    assert len(before) == 4

    build_suite(MockConfig(results_dir=str(tmp_path), **{**SMALL_SUITE, "lmax": OTHER_LMAX}))
    assert run_command("run_sweep.py", *options)[0] == 0
    assert {path: path.stat().st_mtime_ns for path in before} == before  # finished points are skipped
    result = json.loads((folder / "fom_vs_lmax.json").read_text())
    assert result["failed"] == []
    for row in result["curve"]:
        runs = [
            json.loads((tmp_path / f"field_npe_runs/sweep_lmax{row['lmax']}_seed{seed}/fom_result.json").read_text())
            for seed in (42, 43)
        ]
        medians = [run["fom_fiducial_median"] for run in runs]
        assert [run["lmax"] for run in runs] == [row["lmax"]] * 2
        assert row["fom"] == pytest.approx(statistics.mean(medians))
        assert row["std_over_seeds"] == pytest.approx(statistics.stdev(medians)) != 0
        assert row["std_over_tiles"] == pytest.approx(statistics.mean(run["fom_fiducial_std"] for run in runs))
    assert (folder / "fom_vs_lmax.png").stat().st_size > 10_000

    # A point that was made otherwise is not passed off as this sweep's.
    code, _, err = run_command("run_sweep.py", *options[:-1], STAGE_2.replace("3", "4"))
    assert code == 2
    assert "--max-epochs 3 there, 4 here" in err


def test_a_cluster_runs_the_points_one_by_one_and_the_last_command_draws_the_curve(
    tmp_path: Path, run_command: Callable
) -> None:
    build_suite(MockConfig(results_dir=str(tmp_path), **SMALL_SUITE))
    options = ["--results-dir", tmp_path, "--lmax", SMALL_LMAX, "--seeds", 3, "--noise-level", "noiseless"]
    options += ["--stage-1", STAGE_1, "--stage-2", STAGE_2]
    code, out, _ = run_command("run_sweep.py", *options, "--dry-run")
    assert code == 0
    assert not (tmp_path / "field_compressor_runs").exists()
    commands = [shlex.split(line) for line in out.splitlines()]
    assert len(commands) == 3
    for python, *command in commands:
        assert python == "python"
        assert run_command(*command)[0] == 0
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*result.json")}
    assert len(before) == 6
    code, out, err = run_command("run_sweep.py", *options)
    assert code == 0, err
    assert {path: path.stat().st_mtime_ns for path in before} == before
    curve = json.loads((tmp_path / "sweeps/sweep/fom_vs_lmax.json").read_text())["curve"]
    assert curve[0]["n_seeds"] == 3

    code, _, err = run_command("run_sweep.py", *options, "--point", 4)
    assert code == 2
    assert "there are 3 points" in err


def test_a_learning_curve_trains_every_point_once_and_says_what_twice_as_many_would_give(
    tmp_path: Path, run_command: Callable
) -> None:
    for fresh in (False, True):
        build_suite(MockConfig(results_dir=str(tmp_path), fresh=fresh, **SMALL_SUITE))
    options = ["--results-dir", tmp_path, "--lmax", SMALL_LMAX, "--seeds", 1, "--noise-level", "noiseless"]
    options += [
        "--stage-1",
        STAGE_1,
        "--stage-2",
        f"{STAGE_2} --calibration-tiles {tmp_path}/fresh_tiles/lmax_{{lmax}}",
    ]
    options[-1] += "_{noise_level}"

    def sweep(*numbers: int) -> tuple[str, dict[str, Any]]:
        code, out, err = run_command("run_sweep.py", *options, "--n-sims", ",".join(map(str, numbers)))
        assert code == 0, err
        return out, json.loads((tmp_path / "sweeps/sweep/learning_curve.json").read_text())

    # One simulation more than there are, or a mistyped folder: nothing is trained.
    elsewhere = options[-1].replace("fresh_tiles", "fresh")
    for stage_2, last, found in ((options[-1], 61, "there are 60 simulations"), (elsewhere, 60, "no shard")):
        code, _, err = run_command("run_sweep.py", *options[:-1], stage_2, "--n-sims", f"12,20,40,{last}")
        assert code == 2
        assert found in err.splitlines()[-1]
        assert list(tmp_path.rglob("*result.json")) == []

    name = f"sweep_lmax{SMALL_LMAX}_seed42"
    config = parse_args(SweepConfig, [*map(str, options), "--n-sims", "12,20,40,60"])
    assert f"it needs stage 1 of {name}_n60, which has not finished or failed" in str(run_point(config.rounds[1][0]))

    out, result = sweep(12, 20, 40, 60)
    made = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*result.json")}
    assert len(made) == 4 + 4 + 3
    assert result["failed"] == []
    both, alone = result["curves"]
    assert (sorted(both["n_sims"]), sorted(alone["n_sims"])) == ([12, 20, 40, 60], [12, 20, 40, 60])
    for n, of_compressor in [(n, n) for n in (12, 20, 40, 60)] + [(n, 60) for n in (12, 20, 40)]:
        tag = f"{name}_n{of_compressor}" + (f"_npe{n}" if n != of_compressor else "")
        run = json.loads((tmp_path / "field_npe_runs" / tag / "fom_result.json").read_text())
        assert run["compressor_checkpoint"] == f"{name}_n{of_compressor}/best.ckpt"
        manifest = read_manifest(tmp_path / "field_compressor_runs" / f"{name}_n{of_compressor}")
        assert len(manifest.sim_ids) == of_compressor
        sims = subset_of(manifest.sim_ids, n, 42, 109)  # every seed has a split of its own: the first is 42
        splits = [sum(key[0] in sims for key in manifest.splits[split]) for split in ("npe_train", "test")]
        assert [run["npe"]["n_train_tiles"], run["npe"]["n_test_tiles"]] == splits
        curve = both if n == of_compressor else alone
        assert curve["nll_of_runs"][curve["n_sims"].index(n)] == run["calibration"]["nll"]
        assert curve["fom_of_runs"][curve["n_sims"].index(n)] == run["fom_fiducial_median"]
    assert both["nll_of_runs"][both["n_sims"].index(60)] == alone["nll_of_runs"][alone["n_sims"].index(60)]
    for curve in (both, alone):
        fom = curve["fom"]
        line = f"{curve['stages']}: twice as many simulations (120): FoM {fom['at_twice']:.0f} +- "
        assert line + f"{fom['at_twice_err']:.0f} instead of {fom['at_largest']:.0f} +- " in out
    assert (tmp_path / "sweeps/sweep/learning_curve.png").stat().st_size > 10_000

    again, same = sweep(12, 20, 40, 60)
    assert (again, same) == (out, result)
    assert {path: path.stat().st_mtime_ns for path in made} == made

    # Side by side, the points of a round in any order, and a round after the other.
    rounds: list[list[str]] = []

    def run_all(function: str, runs: Sequence[SweepRun]) -> Iterator[FomResult | Exception]:
        rounds.append([run.tag for run in runs])
        found = {run.tag: function_named(function)(run) for run in reversed(runs)}
        return (found[run.tag] for run in runs)

    assert asdict(sweep_side_by_side(config, lambda: None, run_all)) == result
    assert [len(tags) for tags in rounds] == [4, 3]


def test_the_seeds_of_a_learning_curve_have_their_own_subsets_and_its_rounds_can_run_side_by_side() -> None:
    config = SweepConfig(lmax="200", n_sims="400,100,200,791", seeds=2, stage_2="--calibration-tiles fresh")
    both, alone = config.rounds
    assert [run.n_sims for run in both] == [791, 100, 200, 400] * 2
    assert [run.compressor().split_seed for run in both] == [42] * 4 + [43] * 4
    assert len({run.compressor_tag for run in both}) == len({run.tag for run in config.runs[:8]}) == 8
    assert {run.compressor_tag for run in alone} <= {run.compressor_tag for run in both}  # nothing that is not there
    assert [run.npe("x").n_sims for run in config.runs] == [0] * 8 + [100, 200, 400] * 2
    assert {run.compressor().n_sims for run in alone} == {791}
    (plain,) = SweepConfig(lmax="200", seeds=1, stage_1="--n-sims 100 --split-seed 1").rounds[0]
    assert (plain.compressor().n_sims, plain.npe("x").n_sims, plain.tag) == (100, 0, "sweep_lmax200_seed42")


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"lmax": "200;400"}, "--lmax"),
        ({"stage_1": "--learning-rate -1"}, "--learning-rate"),
        ({"stage_2": "--lmax 200"}, "--lmax is the sweep's own"),
        ({"stage_1": "--seed 3"}, "--seed is the sweep's own"),
        ({"name": "../x"}, "--name"),
        ({"name": ""}, "--name"),
        ({"stage_1": "--weight-decay inf"}, "--weight-decay is inf; it must be at least 0, and finite"),
        ({"n_sims": "100,200,many"}, "--n-sims '100,200,many' is not a list"),
        ({"n_sims": "0,100,200,400"}, "--n-sims is 0; it must be positive"),
        ({"n_sims": "100,200,400,400"}, "--n-sims '100,200,400,400': a learning curve needs 4 numbers"),
        ({"n_sims": "1,2,3,4"}, r"--calibration-tiles in the quotes of --stage-2 \(python run_mock.py --fresh"),
        ({"n_sims": "1,2,3,4", "stage_1": "--n-sims 3"}, "--n-sims is the sweep's own"),
        ({"n_sims": "1,2,3,4", "stage_1": "--split-seed 3"}, "--split-seed is the sweep's own"),
        ({"n_sims": "1,2,3,4", "stage_2": "--n-sims 3"}, "--n-sims is the sweep's own"),
    ],
)
def test_senseless_sweeps_are_refused_before_anything_runs(options: dict[str, str], named: str) -> None:
    with pytest.raises(UserError, match=named):
        SweepConfig(**options)


def test_a_point_is_finished_only_for_the_same_data_and_compressor_and_without_restart(
    tmp_path: Path, run_command: Callable
) -> None:
    folders = {
        name: build_suite(MockConfig(**SMALL_SUITE, tiles_dir=str(tmp_path / name), seed=seed))["folder"]
        for name, seed in (("one", 1), ("other", 2), ("fresh", 3))
    }
    options = ["--results-dir", tmp_path, "--lmax", SMALL_LMAX, "--seeds", 1, "--noise-level", "noiseless"]

    def sweep(stage_1: str, stage_2: str = "") -> tuple[int, str]:
        code, _, err = run_command(
            "run_sweep.py", *options, "--stage-1", f"{STAGE_1} {stage_1}", "--stage-2", f"{STAGE_2} {stage_2}"
        )
        return code, err

    def result() -> dict[str, Any]:
        return json.loads((tmp_path / f"field_npe_runs/sweep_lmax{SMALL_LMAX}_seed42/fom_result.json").read_text())

    assert sweep(f"--tiles-dir {folders['one']}")[0] == 0
    first = result()
    assert sweep(f"--tiles-dir {folders['one']}")[0] == 0
    assert result() == first
    start = tmp_path / f"field_compressor_runs/sweep_lmax{SMALL_LMAX}_seed42/best.ckpt"
    for stage_1, stage_2, named in (
        (f"--tiles-dir {folders['other']}", "", "--tiles "),
        (f"--tiles-dir {folders['one']} --init-from {start}", "", "--init-from None there"),
        (f"--tiles-dir {folders['one']} --noiseless-tiles {folders['one']}", "", "--noiseless-tiles None there"),
        (f"--tiles-dir {folders['one']}", f"--noiseless-tiles {folders['one']}", "--noiseless-tiles None there"),
        (f"--tiles-dir {folders['one']}", f"--calibration-tiles {folders['fresh']}", "--calibration-tiles None there"),
    ):
        code, err = sweep(stage_1, stage_2)
        assert code == 2
        assert "was made from others" in err
        assert named in err
    build_suite(MockConfig(**SMALL_SUITE, tiles_dir=folders["one"], seed=4, restart=True))
    code, err = sweep(f"--tiles-dir {folders['one']}")
    assert code == 2
    assert "--tiles " in err  # made anew at the same path
    assert result() == first

    assert sweep(f"--tiles-dir {folders['one']} --restart")[0] == 0  # and stage 2 after it, for its new compressor
    second = result()
    assert sweep(f"--tiles-dir {folders['one']} --restart")[0] == 0  # the same command goes on, and has nothing to do
    assert result() == second
    assert second["fingerprints"]["tiles"] != first["fingerprints"]["tiles"]
    assert second["compressor"]["sha256"] != first["compressor"]["sha256"]
    assert second["fom_fiducial_median"] != first["fom_fiducial_median"]

    # A damaged file is named, and --restart in the quotes replaces it, also where that is all there is in them.
    best, fom = (
        tmp_path / f"field_{stage}_runs/sweep_lmax{SMALL_LMAX}_seed42/{name}"
        for stage, name in (("compressor", "best.ckpt"), ("npe", "fom_result.json"))
    )
    best.write_bytes(best.read_bytes()[:-100])
    code, err = sweep(f"--tiles-dir {folders['one']}")
    assert code == 2
    assert "best.ckpt is not a checkpoint" in err
    assert sweep(f"--tiles-dir {folders['one']} --restart")[0] == 0
    fom.write_text("")
    code, err = sweep(f"--tiles-dir {folders['one']}")
    assert code == 2
    assert "run stage 2 again, with --restart" in err
    assert sweep(f"--tiles-dir {folders['one']}", "--restart")[0] == 0
    assert result()["fom_fiducial_median"] == second["fom_fiducial_median"]


def test_quotes_may_hold_one_option_alone() -> None:
    config = parse_args(SweepConfig, ["--stage-1", "--restart", "--lmax", "200", "--stage-2=--n-members 2"])
    assert config.runs[0].compressor().restart
    assert config.runs[0].npe("x").n_members == 2


def test_a_nuisance_is_inferred_at_the_points_whose_tiles_vary_it() -> None:
    def inferred(nuisance: str) -> list[str]:
        config = SweepConfig(nuisance=nuisance, seeds=1, stage_1="--params Omega_m,S8,A_IA,m_2")
        return [run.compressor().params for run in config.runs]

    bare, both = "Omega_m,S8", "Omega_m,S8,A_IA,m_2"
    assert inferred("none,m,dz,ia,all") == [bare, f"{bare},m_2", bare, f"{bare},A_IA", both] * 3
    assert inferred("dz") == [bare] * 3  # a shorter list has the same points
