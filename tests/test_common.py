"""Schedule, early stopping, files, checkpoints, options."""

from __future__ import annotations

import inspect
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from conftest import ROOT

from common.artifacts import atomic_path, write_json
from common.checkpoint import load_checkpoint, save_checkpoint
from common.device import pick_device
from common.early_stopping import EarlyStopping
from common.errors import UserError, exit_on_user_error
from common.figures import figure
from common.interrupt import Interrupted, listening
from common.options import difference, flag_of, identity, parse_args, with_signature_of
from compress.config import CompressorConfig
from compress.model import pick_precision
from compress.schedule import lr_at
from data.config import CheckConfig, FetchConfig
from data.ingest.config import IngestConfig
from data.mock.config import MockConfig
from npe.config import NPEConfig, PredictConfig, SweepConfig

SCHEDULE = {"steps_per_epoch": 52, "peak": 8e-3, "warmup_steps": 500, "decay_factor": 0.85, "decay_epochs": 20}


def test_warm_up_is_linear_and_then_the_rate_falls_in_steps() -> None:
    assert lr_at(0, **SCHEDULE) == pytest.approx(8e-3 / 500)
    assert lr_at(249, **SCHEDULE) == pytest.approx(4e-3)
    assert lr_at(499, **SCHEDULE) == lr_at(20 * 52 - 1, **SCHEDULE) == 8e-3
    assert lr_at(20 * 52, **SCHEDULE) == pytest.approx(8e-3 * 0.85)
    assert lr_at(500 * 52 - 1, **SCHEDULE) == pytest.approx(8e-3 * 0.85**24)
    assert lr_at(0, **{**SCHEDULE, "warmup_steps": 0}) == 8e-3


def test_early_stopping_waits_its_patience_and_a_query_changes_nothing() -> None:
    stopper, losses = EarlyStopping(patience=3), [5.0, 4.0, 4.5, 4.0, 3.9, 4.1, 4.2, 4.3]
    best, stopped = [], []
    for epoch, loss in enumerate(losses):
        best.append(stopper.update(loss, epoch))
        stopped.append([stopper.should_stop() for _ in range(4)][-1])
    assert best == [True, True, False, False, True, False, False, False]  # a tie is no improvement
    assert stopped == [False] * 7 + [True]
    assert (stopper.best_epoch, stopper.best_loss) == (4, 3.9)
    with pytest.raises(ValueError, match="nan"):
        stopper.update(float("nan"), 8)


def test_a_file_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    write_json(path, {"a": 1})

    def fail() -> None:
        with atomic_path(path) as temporary:
            temporary.write_text("half")
            raise RuntimeError("killed")

    with pytest.raises(RuntimeError, match="killed"):
        fail()
    assert json.loads(path.read_text()) == {"a": 1}
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(ValueError, match="JSON"):
        write_json(path, {"a": float("nan")})
    assert json.loads(path.read_text()) == {"a": 1}


class _Bomb:
    def __reduce__(self) -> tuple[Callable, tuple[str]]:
        return print, ("a pickle ran code",)


def test_a_checkpoint_that_would_run_code_is_refused_without_running(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    path = tmp_path / "best.ckpt"
    torch.save({"format": 2, "kind": "compressor", "model": _Bomb()}, path)
    with pytest.raises(UserError, match=r"best.ckpt is not a checkpoint of this program"):
        load_checkpoint(path, "compressor", ("model",), "do this")
    assert "ran code" not in capsys.readouterr().out


def test_wrong_checkpoints_are_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "best.ckpt"
    with pytest.raises(UserError, match=r"best.ckpt does not exist, or is a folder; do this"):
        load_checkpoint(path, "compressor", ("model",), "do this")
    save_checkpoint(path, "npe", {"model": {"w": torch.ones(2)}})
    assert torch.equal(load_checkpoint(path, "npe", ("model",), "")["model"]["w"], torch.ones(2))
    with pytest.raises(UserError, match=r"not a compressor checkpoint"):
        load_checkpoint(path, "compressor", ("model",), "do this")
    with pytest.raises(UserError, match=r"lacks config"):
        load_checkpoint(path, "npe", ("model", "config"), "do this")
    content = path.read_bytes()
    path.write_bytes(content[:-100])
    with pytest.raises(UserError, match=r"is not a checkpoint"):
        load_checkpoint(path, "npe", ("model",), "do this")
    weights = torch.ones(2).numpy().tobytes()
    assert content.count(weights) == 1
    path.write_bytes(content.replace(weights, torch.tensor([1.0, 1.5]).numpy().tobytes()))
    with pytest.raises(UserError, match=r"is damaged"):
        load_checkpoint(path, "npe", ("model",), "do this")


def test_float32_means_float32_and_bf16_is_taken_where_a_gpu_computes_in_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    pick_device("cpu")
    assert not torch.backends.cudnn.allow_tf32
    assert not torch.backends.cuda.matmul.allow_tf32
    for native in (True, False):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation, native=native: native)
        expected = torch.bfloat16 if native else torch.float32
        assert pick_precision("auto", torch.device("cuda:0"), "efficientnet_v2_s") is expected


@pytest.mark.parametrize(
    ("config_class", "given"),
    [
        (MockConfig, {}),
        (CheckConfig, {}),
        (CompressorConfig, {}),
        (FetchConfig, {}),
        (SweepConfig, {}),
        (NPEConfig, {"ckpt": "x"}),
        (PredictConfig, {"run": "x", "tiles": "y"}),
        (IngestConfig, {"kappa_maps": "x", "params": "y"}),
    ],
)
def test_the_command_line_and_the_modal_signature_come_from_one_definition(
    config_class: type, given: dict[str, str]
) -> None:
    words = [word for name, value in given.items() for word in (flag_of(name), value)]
    parsed, built = parse_args(config_class, words), []
    assert parsed == config_class(**given)
    modal_main = with_signature_of(config_class, built.append)
    assert list(inspect.signature(modal_main).parameters) == list(config_class.__dataclass_fields__)
    modal_main(**{name: p.default for name, p in inspect.signature(modal_main).parameters.items()} | vars(parsed))
    assert built == [parsed]


def test_options_say_what_makes_a_run_another() -> None:
    one = CompressorConfig()
    three = parse_args(CompressorConfig, ["--params", "Omega_m,S8,w"])
    assert one.run_tag == "field_mse_lmax200_des_y3_efficientnet_v2_s"
    assert three.run_tag == f"{one.run_tag}_params_Omega_m-S8-w"  # another folder
    assert three.theta_names == ("Omega_m", "S8", "w")
    here = identity(CompressorConfig, asdict(one))
    assert not {"tiles_dir", "noiseless_tiles", "tiles_on", "restart", "recipe", "tag", "results_dir"} & set(here)
    stored = {name: value for name, value in asdict(one).items() if name != "params"}  # by a version without it
    assert difference(identity(CompressorConfig, stored), here) == ""
    assert difference(identity(CompressorConfig, stored), identity(CompressorConfig, asdict(three))) == (
        "--params Omega_m,S8 there, Omega_m,S8,w here"
    )


@pytest.mark.parametrize(
    ("given", "message"),
    [("S8,w", "lacks Omega_m"), ("Omega_m,S8,w_a", "'w_a' is none of"), ("Omega_m,S8,S8", "names a parameter twice")],
)
def test_parameters_without_sense_are_refused(given: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        CompressorConfig(params=given)


@pytest.mark.parametrize(
    ("script", "options", "named"),
    [
        ("run_mock.py", ["--n-sims", "0"], "--n-sims"),
        ("run_mock.py", ["--geometry", "flatish"], "--geometry"),
        ("run_mock.py", ["--lmax", "5000"], "lmax"),
        ("run_check.py", ["--split-seed", "-1"], "--split-seed"),
        ("run_compressor.py", ["--lmax", "many"], "--lmax"),
        ("run_compressor.py", ["--batch-size", "-3"], "--batch-size"),
        ("run_compressor.py", ["--tag", "../elsewhere"], "--tag"),
        ("run_compressor.py", ["--device", "cuda"], "--device cuda"),
        ("run_npe.py", [], "--ckpt"),
        ("run_npe.py", ["--ckpt", "x", "--max-epohs", "3"], "--max-epohs"),
        ("run_sweep.py", ["--stage-1", "--max-epohs 3"], "run_sweep.py --stage-1 --help lists the options"),
        ("run_npe.py", ["--ckpt", "nowhere/best.ckpt"], "nowhere/best.ckpt does not exist"),
    ],
)
def test_a_senseless_option_is_refused_with_code_2_and_one_line(
    run_command: Callable, tmp_path: Path, script: str, options: list[str], named: str
) -> None:
    if named == "--device cuda" and torch.cuda.is_available():
        pytest.skip("a CUDA device is here")
    code, _, err = run_command(script, "--results-dir", tmp_path, *options)
    assert code == 2
    (line,) = err.splitlines()
    assert named in line
    assert list(tmp_path.rglob("*.*")) == []


def test_help_and_refusals_need_neither_torch_nor_modal_nor_ducc0(tmp_path: Path) -> None:
    for name in ("torch", "torchvision", "modal", "ducc0"):
        (tmp_path / f"{name}.py").write_text(f"raise ModuleNotFoundError('no module {name}', name='{name}')\n")
    for script in ("run_mock.py", "run_compressor.py", "run_npe.py"):
        needed = ["--ckpt", "x"] if script == "run_npe.py" else []
        for options, code in (["--help"], 0), ([*needed, "--seed", "-1"], 2):
            done = subprocess.run(
                [sys.executable, script, *options],
                cwd=ROOT,
                env={**os.environ, "PYTHONPATH": str(tmp_path)},
                capture_output=True,
                text=True,
            )
            assert done.returncode == code, done.stderr
            assert "Traceback" not in done.stderr


def test_a_signal_waits_until_a_picture_is_drawn(tmp_path: Path) -> None:
    def draw() -> None:
        with listening(), figure(tmp_path / "x.png", 2, 2) as drawn:
            os.kill(os.getpid(), signal.SIGTERM)
            drawn.subplots().set_title("drawn $x^2$")

    with pytest.raises(Interrupted):
        draw()
    assert (tmp_path / "x.png").stat().st_size > 1000


def test_a_full_gpu_is_one_line_with_a_cure(capsys: pytest.CaptureFixture[str]) -> None:
    @exit_on_user_error
    def full() -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 52 GiB.")

    with pytest.raises(SystemExit) as left:
        full()
    assert left.value.code == 2
    assert capsys.readouterr().err == (
        "error: the GPU's memory is full; give a smaller --batch-size, or --tiles-on disk\n"
    )


SWALLOWED = """
import os, signal, time
from common.errors import exit_on_user_error
from common.progress import Progress
class Deleted:
    def __del__(self):  # Python prints what is raised here, and goes on
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.1)
@exit_on_user_error
def main():
    del [Deleted()][0]
    print("went on")
    with Progress("counting", 3, "steps") as progress:
        progress.advance()
    print("was not stopped")
main()
"""


def test_a_signal_is_heard_again_where_python_swallowed_it() -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", SWALLOWED], env=environment, capture_output=True, text=True)
    assert done.stdout == "went on\n"
    assert "Exception ignored" in done.stderr
    assert done.returncode == 143
    assert done.stderr.splitlines()[-1].startswith("stopped by SIGTERM")
