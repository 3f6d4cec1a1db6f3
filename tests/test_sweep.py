"""The Figure of Merit against lmax, over seeds."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import SMALL_LMAX, SMALL_SUITE

from common.errors import UserError
from common.options import parse_args
from data.mock.config import MockConfig
from data.mock.suite import build_suite
from npe.config import SweepConfig

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
    assert code == 0
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


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"lmax": "200;400"}, "--lmax"),
        ({"stage_1": "--learning-rate -1"}, "--learning-rate"),
        ({"stage_2": "--lmax 200"}, None),
        ({"stage_1": "--seed 3"}, "--seed is the sweep's own"),
        ({"name": "../x"}, "--name"),
        ({"name": ""}, "--name"),
        ({"stage_1": "--weight-decay inf"}, "--weight-decay is inf; it must be at least 0, and finite"),
    ],
)
def test_senseless_sweeps_are_refused_before_anything_runs(options: dict[str, str], named: str | None) -> None:
    if named is None:
        SweepConfig(**options)
        return
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
    for stage_1, stage_2, named in (
        (f"--tiles-dir {folders['other']}", "", "--tiles "),
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
