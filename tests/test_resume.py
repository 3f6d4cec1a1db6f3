"""Killed at any instant, the same command ends in the same bits."""

from __future__ import annotations

import json
import os
import select
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from conftest import GUARD_S, ROOT, SMALL_LMAX, SMALL_SUITE
from torchvision.models.efficientnet import EfficientNet, FusedMBConvConfig, MBConvConfig

from common import interrupt
from common.checkpoint import load_checkpoint, save_checkpoint
from common.errors import UserError
from common.resume import KIND, LastCheckpoint
from compress.config import CompressorConfig, Loss
from compress.stage import run_compressor
from data.dataset import TileDataset
from data.mock.config import MockConfig
from data.mock.suite import build_suite
from data.norm_stats import read_norm_stats
from npe.config import NPEConfig
from npe.stage import run_npe

SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
TAG = "killed"
TILES = f"--lmax {SMALL_LMAX} --noise-level noiseless"
COMMANDS = {
    "run_mock": f"{TILES} --n-sims 120 --results-dir results --workers 1",
    "run_compressor": f"{TILES} --backbone tiny --max-epochs 6 --batch-size 64 --warmup-steps 10 --ema-decay 0.9 "
    "--norm-tiles 100 "
    f"--device cpu --checkpoint-seconds 0 --results-dir results --tag {TAG}",
    "run_npe": f"--ckpt results/field_compressor_runs/{TAG}/best.ckpt --max-epochs 20 --n-members 2 --device cpu "
    "--checkpoint-seconds 0",
}
# Imports once; then every command in a fork of its own, which a timer stops.
FORKS = """
import importlib, json, os, sys, threading, time, traceback
import compress.stage, npe.stage, data.mock.suite, run_mock, run_compressor, run_npe

def run(script, options, delay, signum, folder, out, err):
    for number, path in enumerate((os.devnull, out, err)):
        os.dup2(os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC), number)
    os.chdir(folder)
    sys.argv = [script + ".py", *options]
    timer = threading.Timer(delay, os.kill, (os.getpid(), signum))
    timer.daemon = True
    if signum:
        timer.start()
    start = time.monotonic()
    importlib.import_module(script).main()
    timer.cancel()
    print("seconds", time.monotonic() - start, flush=True)

for line in sys.stdin:
    if (pid := os.fork()) == 0:
        code = 0
        try:
            run(*json.loads(line))
        except SystemExit as stop:
            code = stop.code
        except BaseException:
            traceback.print_exc()
            code = 1
        os._exit(code)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""


class Commands:
    """Runs commands as processes that need not import torch again."""

    def __init__(self, folder: Path) -> None:
        self.out, self.err = folder / "out", folder / "err"
        self.process = subprocess.Popen(
            [sys.executable, "-c", FORKS], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )  # fmt: skip

    def start(self, folder: Path, script: str, delay: float, signum: int) -> subprocess.CompletedProcess[str]:
        """One command, stopped by a signal after a delay, unless that is 0."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        arguments = [script, COMMANDS[script].split(), delay, int(signum), *map(str, (folder, self.out, self.err))]
        print(json.dumps(arguments), file=self.process.stdin, flush=True)
        assert select.select([self.process.stdout], [], [], GUARD_S)[0], "the command hangs"
        code = int(self.process.stdout.readline())
        return subprocess.CompletedProcess(arguments, code, self.out.read_text(), self.err.read_text())

    def finish(self, folder: Path, script: str) -> float:
        done = self.start(folder, script, 0, 0)
        assert done.returncode == 0, done.stderr
        return float(done.stdout.split()[-1])


@pytest.fixture(scope="module")
def commands(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Commands]:
    started = Commands(tmp_path_factory.mktemp("commands"))
    yield started
    started.process.communicate()


def without_timings(content: dict[str, Any]) -> dict[str, Any]:
    of_time = ("seconds", "elapsed_s", "sha256")  # the last is that of the whole
    return {name: value for name, value in content.items() if name not in of_time}


def same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    return len(a) == len(b) and all(map(same, a, b)) if isinstance(a, list) else a == b


def assert_same_files(found: Path, wanted: Path) -> None:
    """Every file that a command left, by content; nothing left over."""
    names, others = (sorted(p.name for p in folder.iterdir() if p.name != "cache") for folder in (wanted, found))
    assert others == names
    for path in (wanted / name for name in names):
        other = found / path.name
        if path.suffix == ".ckpt":
            assert same(*(torch.load(p, weights_only=True) for p in (other, path))), path.name
        elif path.suffix == ".jsonl":
            lines = ([without_timings(json.loads(line)) for line in p.read_text().splitlines()] for p in (other, path))
            assert next(lines) == next(lines)
        elif path.suffix == ".json":
            assert without_timings(json.loads(other.read_text())) == without_timings(json.loads(path.read_text()))
        elif path.suffix == ".parquet":
            assert pq.read_table(other).equals(pq.read_table(path))


@pytest.fixture(scope="module")
def uninterrupted(commands: Commands, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, float]]:
    """A folder where every command has run, and the seconds that each took."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    return folder, {script: commands.finish(folder, script) for script in COMMANDS}


def result_folder(folder: Path, script: str) -> Path:
    names = {"run_mock": f"tiles/lmax_{SMALL_LMAX}_noiseless", "run_compressor": f"field_compressor_runs/{TAG}"}
    return folder / "results" / names.get(script, f"field_npe_runs/{TAG}")


def kill_and_compare(
    commands: Commands, script: str, n_kills: int, uninterrupted: tuple[Path, dict[str, float]], folder: Path, seed: int
) -> dict[int, int]:
    """Kill at random instants, go on, and compare whenever the command has finished; how often each way it ended."""
    whole, seconds = uninterrupted
    rng = np.random.default_rng(seed)
    ended: dict[int, int] = {}
    killed = 0
    while True:
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(whole / "results", folder / "results")
        shutil.rmtree(result_folder(folder, script))
        while killed < n_kills:
            signum = SIGNALS[killed % len(SIGNALS)]
            done = commands.start(folder, script, rng.uniform(0, seconds[script]), signum)
            code = 0 if "seconds" in done.stdout else done.returncode  # the signal may have come after the end
            ended[code] = ended.get(code, 0) + 1
            if code == 0:
                break
            killed += 1
            assert code == (-signum if signum == signal.SIGKILL else 128 + signum), done.stderr
            if signum != signal.SIGKILL:
                assert "the same command goes on" in done.stderr.splitlines()[-1]
                assert "Traceback" not in done.stderr
        else:
            commands.finish(folder, script)
        assert_same_files(result_folder(folder, script), result_folder(whole, script))
        if killed >= n_kills:
            return ended


@pytest.mark.parametrize("script", list(COMMANDS))
def test_killed_commands_go_on_to_the_bit(
    script: str, commands: Commands, uninterrupted: tuple[Path, dict[str, float]], tmp_path: Path
) -> None:
    ended = kill_and_compare(commands, script, 3, uninterrupted, tmp_path / "killed", seed=1)
    assert {-signal.SIGKILL, 143, 130} <= set(ended)


@pytest.mark.slow
@pytest.mark.parametrize("script", list(COMMANDS))
def test_killed_commands_go_on_to_the_bit_often(
    script: str, commands: Commands, uninterrupted: tuple[Path, dict[str, float]], tmp_path: Path
) -> None:
    ended = kill_and_compare(commands, script, 34, uninterrupted, tmp_path / "killed", seed=2)
    assert sum(count for code, count in ended.items() if code != 0) == 34
    assert min(ended[code] for code in (-signal.SIGKILL, 143, 130)) >= 10


@pytest.fixture
def stop_at(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Let a signal be heard at the so-manieth place where one can be."""

    def arm(place: int) -> None:
        calls: Iterator[int] = iter(range(1_000_000))

        def check() -> None:
            if next(calls) == place:
                raise interrupt.Interrupted(signal.SIGTERM)

        monkeypatch.setattr("data.dataset.check", check)

    return arm


def interrupt_in_the_first_epoch(config: CompressorConfig, stop_at: Callable[[int], None]) -> None:
    """Leave a last.ckpt."""
    stop_at(3)
    with pytest.raises(interrupt.Interrupted):
        run_compressor(config)
    stop_at(-1)


# In a batch of the first epoch, its validation, a batch of the second.
@pytest.mark.parametrize(("place", "loss"), [(2, "mse"), (4, "nll"), (5, "nll")])
def test_a_network_that_draws_at_random_and_a_loss_with_weights_go_on_as_well(
    small_suite: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    stop_at: Callable[[int], None],
    place: int,
    loss: Loss,
) -> None:
    """The larger networks drop layers at random, from torch's own generator."""

    def dropping() -> EfficientNet:
        stages = [FusedMBConvConfig(1, 3, 2, 8, 8, 1), MBConvConfig(2, 3, 1, 8, 8, 3)]
        return EfficientNet(stages, dropout=0.0, stochastic_depth_prob=0.5, last_channel=32)

    monkeypatch.setattr("compress.model._tiny", dropping)
    shutil.copytree(small_suite / "tiles", tmp_path / "tiles")

    def config(tag: str) -> CompressorConfig:
        return CompressorConfig(
            results_dir=str(tmp_path), lmax=SMALL_LMAX, noise_level="noiseless", backbone="tiny",
            max_epochs=2, batch_size=200, warmup_steps=2, norm_tiles=200, device="cpu", tag=tag, loss=loss,
        )  # fmt: skip

    stop_at(-1)
    run_compressor(config("whole"))
    stop_at(place)
    with pytest.raises(interrupt.Interrupted, match=r"last.ckpt has epoch"):
        run_compressor(config("stopped"))
    torch.manual_seed(999)
    (tmp_path / "field_compressor_runs/stopped/best.ckpt").write_bytes(b"of an epoch that will not be")
    stop_at(-1)
    run_compressor(config("stopped"))
    found, wanted = (
        torch.load(tmp_path / f"field_compressor_runs/{tag}/best.ckpt", weights_only=True)["model"]
        for tag in ("stopped", "whole")
    )
    assert same(found, wanted)


def test_other_options_are_refused_with_what_differs(
    small_suite: Path, tmp_path: Path, stop_at: Callable[[int], None], run_command: Callable
) -> None:
    shutil.copytree(small_suite / "tiles", tmp_path / "tiles")
    options = ["--results-dir", tmp_path, *TILES.split(), "--backbone", "tiny", "--tag", "t", "--max-epochs", 2]
    stop_at(3)
    assert run_command("run_compressor.py", *options)[0] == 143
    stop_at(-1)
    folder = tmp_path / "field_compressor_runs" / "t"
    before = (folder / "last.ckpt").read_bytes()
    code, _, err = run_command("run_compressor.py", *options, "--learning-rate", 0.001)
    assert code == 2
    assert "--learning-rate 0.008 there, 0.001 here" in err
    assert (folder / "last.ckpt").read_bytes() == before

    other = tmp_path / "moved"  # a copied run goes on, and so does one whose command says --restart
    shutil.copytree(folder, other / "field_compressor_runs" / "t")
    shutil.copytree(tmp_path / "tiles", other / "tiles")
    options[1] = other
    code, _, err = run_command("run_compressor.py", *options, "--restart")
    assert code == 0
    assert "last.ckpt: epoch 0, batch 3" in err
    (folder / "last.ckpt").write_bytes(before[:-50])
    options[1] = tmp_path
    code, _, err = run_command("run_compressor.py", *options)
    assert code == 2
    assert "last.ckpt is not a checkpoint" in err
    assert "add --restart to start over" in err
    assert "best.ckpt" not in err
    assert run_command("run_compressor.py", *options, "--restart", "--learning-rate", 0.001)[0] == 0


def test_other_tiles_are_refused(small_suite: Path, tmp_path: Path, stop_at: Callable[[int], None]) -> None:
    shutil.copytree(small_suite / "tiles", tmp_path / "tiles")
    config = CompressorConfig(
        results_dir=str(tmp_path), lmax=SMALL_LMAX, noise_level="noiseless", backbone="tiny", max_epochs=2, tag="t"
    )
    interrupt_in_the_first_epoch(config, stop_at)
    build_suite(MockConfig(results_dir=str(tmp_path), **{**SMALL_SUITE, "seed": 43}, restart=True))
    folder = tmp_path / "field_compressor_runs" / "t"
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(UserError, match=r"--tiles [0-9a-f]{12} there, [0-9a-f]{12} here"):
        run_compressor(config)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before  # its files still fit each other
    again = run_compressor(replace(config, restart=True))
    fresh = run_compressor(replace(config, tag="fresh"))
    assert again.val_mse == fresh.val_mse


def test_restart_starts_over_from_a_training_of_another_version(
    small_suite: Path, tmp_path: Path, stop_at: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whose options are the same, but not its parts: what was put back before that was seen must not stay."""
    shutil.copytree(small_suite / "tiles", tmp_path / "tiles")
    config = CompressorConfig(
        results_dir=str(tmp_path), lmax=SMALL_LMAX, noise_level="noiseless", backbone="tiny", max_epochs=2, tag="t",
        batch_size=100,
    )  # fmt: skip
    interrupt_in_the_first_epoch(config, stop_at)
    path = tmp_path / "field_compressor_runs" / "t" / "last.ckpt"
    content = load_checkpoint(path, KIND, (), "")
    del content["state"]["generators"]["theta noise"]  # after the model and the optimiser
    save_checkpoint(path, KIND, content)
    with pytest.raises(UserError, match=r"does not fit this version's training; add --restart"):
        run_compressor(config)
    again = run_compressor(replace(config, restart=True))
    fresh = run_compressor(replace(config, tag="fresh"))
    assert again.val_mse == fresh.val_mse


def test_what_lies_beside_an_interrupted_or_a_finished_training_is_not_trusted(
    small_suite: Path, tmp_path: Path, stop_at: Callable[[int], None]
) -> None:
    """The manifest is written again on resuming; --restart on a finished run ignores a last.ckpt left by a kill."""
    shutil.copytree(small_suite / "tiles", tmp_path / "tiles")
    config = CompressorConfig(
        results_dir=str(tmp_path), lmax=SMALL_LMAX, noise_level="noiseless", backbone="tiny", max_epochs=2, tag="t"
    )
    interrupt_in_the_first_epoch(config, stop_at)
    folder = tmp_path / "field_compressor_runs" / "t"
    last = (folder / "last.ckpt").read_bytes()
    manifest = (folder / "split_manifest.json").read_bytes()
    (folder / "split_manifest.json").unlink()
    (folder / "norm_stats.json").write_text("{}")
    run_compressor(config)
    assert (folder / "split_manifest.json").read_bytes() == manifest
    read_norm_stats(folder)

    (folder / "last.ckpt").write_bytes(last)
    stop_at(1)  # before the batch that last.ckpt is at
    with pytest.raises(interrupt.Interrupted, match="epoch 0, batch 1"):
        run_compressor(replace(config, restart=True))


@pytest.mark.parametrize("stage", [1, 2])
def test_tiles_without_noise_that_are_left_out_or_added_on_resuming_are_refused(
    stage: int, small_suite: Path, tmp_path: Path, stop_at: Callable[[int], None]
) -> None:
    shutil.copytree(small_suite / "tiles", tmp_path / "tiles")
    first = CompressorConfig(
        results_dir=str(tmp_path), lmax=SMALL_LMAX, noise_level="noiseless", backbone="tiny", max_epochs=2, tag="t",
        batch_size=100,
    )  # fmt: skip
    if stage == 2:
        run_compressor(first)
    second = NPEConfig(ckpt=str(tmp_path / "field_compressor_runs/t/best.ckpt"), max_epochs=2, batch_size=50)
    config, train = (first, run_compressor) if stage == 1 else (second, run_npe)
    with_signal = replace(config, noiseless_tiles=str(tmp_path / "tiles" / f"lmax_{SMALL_LMAX}_noiseless"))
    for begun, resumed in ((config, with_signal), (with_signal, config)):
        stop_at(3)
        with pytest.raises(interrupt.Interrupted):
            train(replace(begun, restart=True))  # type: ignore[arg-type]
        stop_at(-1)
        with pytest.raises(UserError, match=r"--noiseless-tiles (None|[0-9a-f]{12}) there, (None|[0-9a-f]{12}) here"):
            train(resumed)  # type: ignore[arg-type]


def test_stage_2_stopped_while_it_is_evaluated_resumes(
    small_suite: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What follows the training is repeated, not the training."""
    shutil.copytree(small_suite / "tiles", tmp_path / "tiles")
    run_compressor(
        CompressorConfig(
            results_dir=str(tmp_path), lmax=SMALL_LMAX, noise_level="noiseless", backbone="tiny", max_epochs=1, tag="t"
        )
    )
    config = NPEConfig(ckpt=str(tmp_path / "field_compressor_runs/t/best.ckpt"), max_epochs=3, checkpoint_seconds=0)
    with monkeypatch.context() as patch:
        patch.setattr("npe.stage.draw_fom", lambda *_: (_ for _ in ()).throw(interrupt.Interrupted(signal.SIGINT)))
        with pytest.raises(interrupt.Interrupted):
            run_npe(config)
    monkeypatch.setattr("common.resume.append_metrics", None)  # the loop must not run again
    result = run_npe(config)
    assert result.npe.epochs == 3


@pytest.mark.parametrize("stage", [1, 2])
def test_a_loss_that_is_not_finite_names_its_tiles_and_keeps_what_was_good(
    small_suite: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: int
) -> None:
    shutil.copytree(small_suite / "tiles", tmp_path / "tiles")
    first = CompressorConfig(
        results_dir=str(tmp_path), lmax=SMALL_LMAX, noise_level="noiseless", backbone="tiny", max_epochs=2,
        batch_size=64, warmup_steps=10, tag="t", checkpoint_seconds=0, device="cpu",
    )  # fmt: skip
    ckpt = tmp_path / "field_compressor_runs" / "t" / "best.ckpt"
    second = NPEConfig(ckpt=str(ckpt), max_epochs=3, batch_size=50, checkpoint_seconds=0, device="cpu")
    if stage == 2:
        run_compressor(first)
    run = (lambda: run_compressor(first)) if stage == 1 else (lambda: run_npe(second))
    folder = ckpt.parent if stage == 1 else tmp_path / "field_npe_runs" / "t"
    split = "compressor_train" if stage == 1 else "npe_train"
    original, culprit = TileDataset.in_parts, []

    def spoiled(dataset: TileDataset, positions: Any, size: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        bad = dataset.augment is not None and 7 in positions  # tile number 7 of the training split
        if bad:
            culprit[:] = dataset.rows[positions].tolist()
        for kappa, theta in original(dataset, positions, size):
            yield kappa, theta * float("nan") if bad else theta

    with monkeypatch.context() as patch:
        patch.setattr(TileDataset, "in_parts", spoiled)
        with pytest.raises(UserError, match=r"epoch 0, batch \d") as refused:
            run()
    named = str(refused.value).split("): ")[1].split()
    manifest = json.loads((ckpt.parent / "split_manifest.json").read_text())
    assert "/".join(map(str, manifest["splits"][split][7])) in named
    keys = [key for name in manifest["splits"] for key in manifest["splits"][name]]
    assert {tuple(map(int, name.split("/"))) for name in named} == {tuple(sorted(keys)[row]) for row in culprit}
    last = folder / "last.ckpt"
    if last.exists():  # the spoiled batch may have been the first
        weights = torch.load(last, weights_only=True)["state"]["parts"]["model" if stage == 1 else "member 0"]
        flat = weights if stage == 1 else weights["npe"]
        assert all(tensor.isfinite().all() for tensor in flat.values())
    assert not list(folder.glob("*result.json"))
    run()  # mended, the same command goes on


def test_the_best_weights_go_back_to_those_of_the_saving(tmp_path: Path) -> None:
    """The file in the folder may be of an epoch that, on a GPU, would not come again just so."""

    def last() -> LastCheckpoint:
        return LastCheckpoint(tmp_path, CompressorConfig(), {}, "best.ckpt", torch.device("cpu"))

    best = tmp_path / "best.ckpt"
    for kept in (None, b"the best so far"):
        if kept is not None:
            best.write_bytes(kept)
        last().save()
        best.write_bytes(b"of a later epoch")
        last().restore({}, {})
        assert (best.read_bytes() if best.exists() else None) == kept


def test_a_suite_that_was_begun_with_restart_goes_on(tmp_path: Path) -> None:
    config = MockConfig(results_dir=str(tmp_path), **SMALL_SUITE, restart=True, workers=1)
    build_suite(config)
    folder = tmp_path / "tiles" / f"lmax_{SMALL_LMAX}_noiseless"
    first, second = sorted(folder.glob("shard_*.parquet"))
    before = first.stat().st_mtime_ns

    def die() -> None:
        if first.exists() and not second.exists():
            raise RuntimeError("killed")

    with pytest.raises(RuntimeError, match="killed"):
        build_suite(config, die)
    anew = first.stat().st_mtime_ns
    assert anew > before  # --restart has deleted it
    build_suite(config)
    assert first.stat().st_mtime_ns == anew  # and does not again
    assert second.exists()
    build_suite(config)
    assert first.stat().st_mtime_ns > anew  # once it has finished, it does
