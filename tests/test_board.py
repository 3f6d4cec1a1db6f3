"""--tensorboard: TensorBoard reads what the run's own files say."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import SMALL_STAGE_1

from common.interrupt import Interrupted
from common.progress import METRICS_NAME
from common.resume import LastCheckpoint

accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
STAGE_1 = [*SMALL_STAGE_1, "--max-epochs", 3]


def read_board(run: Path) -> accumulator.EventAccumulator:
    board = accumulator.EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0, "images": 0})
    return board.Reload()


def assert_curves(run: Path) -> None:
    board = read_board(run)
    lines = [json.loads(line) for line in (run / METRICS_NAME).read_text().splitlines()]
    assert lines
    for name in set(lines[0]) - {"epoch"}:
        found = [(event.step, event.value) for event in board.Scalars(name)]
        assert found == [(line["epoch"], pytest.approx(line[name], rel=1e-6)) for line in lines], name


def test_tensorboard_has_the_curves_the_pictures_and_the_options_of_both_stages(
    small_tiles_dir: Path, tmp_path: Path, run_command: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage_1 = [*STAGE_1, "--tiles-dir", small_tiles_dir, "--results-dir", tmp_path, "--tag", "t", "--tensorboard"]
    save, n_saved = LastCheckpoint.save, []

    def stop_in_the_second_epoch(self: LastCheckpoint) -> None:
        save(self)
        n_saved.append(self)
        if len(n_saved) == 8:
            raise Interrupted(2)

    with monkeypatch.context() as patch:
        patch.setattr(LastCheckpoint, "save", stop_in_the_second_epoch)
        assert run_command("run_compressor.py", *stage_1, "--checkpoint-seconds", 0)[0] == 130
    run = tmp_path / "field_compressor_runs/t"
    assert not (run / "result.json").exists()
    assert run_command("run_compressor.py", *stage_1)[0] == 0
    assert_curves(run)  # an epoch that was done twice stands there once
    npe = ["--ckpt", run / "best.ckpt", "--max-epochs", 2, "--n-members", 1, "--device", "cpu", "--tensorboard"]
    assert run_command("run_npe.py", *npe)[0] == 0
    for folder in (run, tmp_path / "field_npe_runs/t"):
        assert_curves(folder)
        board = read_board(folder)
        assert set(board.Tags()["images"]) == {picture.stem for picture in folder.glob("*.png")}
        assert "_hparams_/session_start_info" in board.summary_metadata


def test_without_the_package_the_run_says_how_to_get_it(
    small_tiles_dir: Path, tmp_path: Path, run_command: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    options = [*STAGE_1, "--tiles-dir", small_tiles_dir, "--results-dir", tmp_path, "--tensorboard"]
    code, _, err = run_command("run_compressor.py", *options)
    assert code == 2
    assert "pip install -r requirements-tensorboard.txt" in err.splitlines()[-1]
    assert not list(tmp_path.rglob("*.json"))
