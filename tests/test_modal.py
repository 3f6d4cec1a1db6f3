"""The Modal wrappers, without an account: what they ask for, and that they run the same functions."""

from __future__ import annotations

import importlib
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable
from dataclasses import asdict, fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import GUARD_S, ROOT, SMALL_LMAX

from common import command
from common.errors import UserError
from common.options import parse_args, with_signature_of
from compress.config import RECIPES, CompressorConfig
from compress.result import CompressorResult
from data.config import CheckConfig, FetchConfig
from data.ingest.config import IngestConfig
from npe.config import NPEConfig, PredictConfig, SweepConfig
from npe.result import read_fom_result

pytest.importorskip("modal")
pytestmark = pytest.mark.modal

FUNCTIONS = {
    "run_compressor": command.on_gpu,
    "run_npe": command.on_gpu,
    "run_mock": command.on_cpu,
    "run_check": command.on_cpu,
    "run_sweep": command.on_gpu,
    "run_ingest": command.on_small,
    "run_predict": command.on_cpu,
    "run_fetch": command.on_cpu,
}


@pytest.fixture(autouse=True)
def no_account(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in list(os.environ):
        if name.startswith("MODAL_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("MODAL_CONFIG_PATH", str(tmp_path / "no_such_config.toml"))


@pytest.mark.parametrize("script", sorted(FUNCTIONS))
def test_functions_ask_for_what_a_long_run_needs(script: str) -> None:
    module = importlib.import_module(script)
    assert command.CONTAINERS[module.COMMAND.machine] is FUNCTIONS[script]
    command.function_named(module.COMMAND.function)  # is there
    info = FUNCTIONS[script].info()
    gpus = ["H100", "A100-80GB"] if script in ("run_compressor", "run_npe", "run_sweep") else []
    assert [name for name, _ in info.gpus or []] == gpus
    assert info.timeout == 24 * 3600
    assert info.max_retries == 10
    assert info.single_use_containers
    assert list(info.volumes) == ["/results"]


def modal_run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "modal", "run", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=GUARD_S
    )


@pytest.mark.parametrize(
    ("script", "config"),
    [
        ("run_compressor", CompressorConfig),
        ("run_npe", NPEConfig),
        ("run_check", CheckConfig),
        ("run_sweep", SweepConfig),
        ("run_ingest", IngestConfig),
        ("run_predict", PredictConfig),
        ("run_fetch", FetchConfig),
    ],
)
def test_modal_run_help_lists_every_option(script: str, config: type) -> None:
    done = modal_run(f"{script}.py", "--help")
    assert done.returncode == 0, done.stderr
    for name in config.__dataclass_fields__:
        assert "--" + name.replace("_", "-") in done.stdout


def test_modal_run_refuses_a_bad_value_and_then_asks_for_a_token() -> None:
    bad = modal_run("run_compressor.py", "--lmax", "many")
    assert bad.returncode == 2
    assert "--lmax" in bad.stderr + bad.stdout
    no_choice = modal_run("run_compressor.py", "--backbone", "resnet")
    assert no_choice.returncode == 2
    good = modal_run("run_compressor.py", "--lmax", "200")
    assert "Token missing" in good.stderr + good.stdout  # imported and parsed; only the account is missing


def test_both_stages_run_inside_their_functions(small_suite: Path) -> None:
    import run_compressor
    import run_npe

    stage_1 = CompressorConfig(
        results_dir=str(small_suite),
        lmax=SMALL_LMAX,
        noise_level="noiseless",
        backbone="tiny",
        max_epochs=2,
        tag="modal",
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # .local() says that it is not what one usually wants
        result = command.on_gpu.local(run_compressor.COMMAND.function, stage_1)
        stage_2 = NPEConfig(ckpt=f"{result.folder}/best.ckpt", max_epochs=3)
        fom = command.on_gpu.local(run_npe.COMMAND.function, stage_2)
        again = command.on_gpu.local(run_npe.COMMAND.function, stage_2)
    assert read_fom_result(small_suite / "field_npe_runs" / "modal") == pickle.loads(pickle.dumps(fom))
    assert "holds a finished run" in str(again)  # a value: raised, Modal would retry it ten times
    with pytest.raises(UserError, match="holds a finished run"):
        command.raised(pickle.loads(pickle.dumps(again)))


def test_several_gpus_of_a_container_train_one_network(small_tiles_dir: Path, tmp_path: Path) -> None:
    config = CompressorConfig(
        results_dir=str(tmp_path), tiles_dir=str(small_tiles_dir), lmax=SMALL_LMAX, noise_level="noiseless",
        backbone="tiny", max_epochs=1, warmup_steps=10, device="cpu", gpus=2,
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = command.on_gpu.local("compress.stage.run_compressor", config)
        again = command.on_gpu.local("compress.stage.run_compressor", config)
    assert isinstance(result, CompressorResult)
    assert isinstance(again, UserError)
    assert "add --restart" in str(again)


@pytest.mark.parametrize(
    "path",
    [
        "results/field_compressor_runs/t/best.ckpt",
        "/results/field_compressor_runs/t/best.ckpt",
        "field_compressor_runs/t/best.ckpt",
    ],
)
def test_paths_mean_the_volume_in_a_container(path: str) -> None:
    config = command.on_volume(NPEConfig(ckpt=path, tiles_dir=path, calibration_tiles=path, noiseless_tiles=path))
    for moved in (config.ckpt, config.tiles_dir, config.calibration_tiles, config.noiseless_tiles):
        assert moved == "/results/field_compressor_runs/t/best.ckpt"
    assert config.results_dir == "/results"


class FakeVolume:
    """Keeps what was committed; `reload` puts it back, as in a container that starts after another has died."""

    def __init__(self, mount: Path) -> None:
        self.mount, self.kept = mount, mount.with_name("kept")
        self.calls: list[str] = []

    def commit(self) -> None:
        self.calls.append("commit")
        shutil.rmtree(self.kept, ignore_errors=True)
        shutil.copytree(self.mount, self.kept)

    def reload(self) -> None:
        self.calls.append("reload")
        shutil.rmtree(self.mount)
        shutil.copytree(self.kept, self.mount)


def test_a_container_that_dies_goes_on_in_the_next_one(
    small_suite: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import run_compressor

    mount = tmp_path / "results"
    shutil.copytree(small_suite / "tiles", mount / "tiles")
    volume = FakeVolume(mount)
    volume.commit()
    monkeypatch.setattr(command.modal, "is_local", lambda: False)
    monkeypatch.setattr(command, "volume", volume)
    monkeypatch.setattr(command, "RESULTS", str(mount))
    config = CompressorConfig(
        lmax=SMALL_LMAX, noise_level="noiseless", backbone="tiny", max_epochs=3, batch_size=64, checkpoint_seconds=0
    )

    def start(tag: str) -> CompressorResult:
        volume.calls.clear()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return command.on_gpu.local(run_compressor.COMMAND.function, replace(config, tag=tag))

    start("whole")
    assert volume.calls[0] == "reload"
    n_commits = volume.calls.count("commit")
    with monkeypatch.context() as patch:
        places = iter(range(1_000))

        def die() -> None:
            if next(places) == 20:
                raise RuntimeError("the container is gone")

        patch.setattr("data.dataset.check", die)
        with pytest.raises(RuntimeError):
            start("died")
    before = volume.calls.count("commit")
    assert before > 0
    (mount / "field_compressor_runs/died/last.ckpt").write_bytes(b"never committed")
    start("died")
    assert "resuming from" in capsys.readouterr().err
    assert volume.calls[0] == "reload"
    assert before + volume.calls.count("commit") <= n_commits + 1
    tensors = [
        torch.load(mount / f"field_compressor_runs/{tag}/best.ckpt", weights_only=True)["model"]
        for tag in ("whole", "died")
    ]
    assert all(torch.equal(tensor, tensors[1][name]) for name, tensor in tensors[0].items())

    volume.calls.clear()  # with the usual interval a short run commits at its end alone
    config = replace(config, checkpoint_seconds=60.0)
    start("short")
    assert volume.calls == ["reload", "commit"]


def test_a_preempted_container_saves_and_is_retried(
    small_suite: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGINT comes back to Modal as a KeyboardInterrupt, after the saving."""

    def stop(_: NPEConfig, on_checkpoint: Callable[[], None]) -> dict[str, Any]:
        os.kill(os.getpid(), signal.SIGINT)
        raise AssertionError("the signal was not heard")

    monkeypatch.setattr("npe.stage.run_npe", stop)
    with pytest.warns(UserWarning, match="local"), pytest.raises(KeyboardInterrupt):
        command.on_gpu.local("npe.stage.run_npe", NPEConfig(ckpt="x"))


def test_paths_inside_quotes_mean_the_volume_as_well() -> None:
    config = SweepConfig(
        stage_1="--backbone tiny --tiles-dir 'results/my tiles/lmax_{lmax}' --noiseless-tiles=results/clean",
        stage_2="--calibration-tiles /results/fresh",
    )
    run = command.on_volume(config).runs[0]
    assert run.compressor().tiles_dir == "/results/my tiles/lmax_{lmax}"
    assert run.compressor().noiseless_tiles == "/results/clean"
    assert run.npe("x").calibration_tiles == "/results/fresh"
    assert run.compressor().results_dir == "/results"


@pytest.mark.parametrize("version", [1, 2])
def test_a_volume_that_is_there_is_taken_whatever_its_version(version: int) -> None:
    """`modal volume create` without --version makes version 1."""
    import asyncio

    from modal._load_context import LoadContext
    from modal._utils.async_utils import synchronizer
    from modal_proto import api_pb2

    class Stub:
        async def VolumeGetOrCreate(self, request: Any) -> Any:
            metadata = api_pb2.VolumeMetadata(name=command.VOLUME_NAME, version=version)
            return api_pb2.VolumeGetOrCreateResponse(volume_id="vo-1", metadata=metadata)

    client: Any = type("Client", (), {"_stub": Stub()})()
    volume: Any = synchronizer._translate_in(command.volume)  # type: ignore[attr-defined]
    asyncio.run(volume._load(volume, None, LoadContext(client=client, environment_name="main"), None))
    assert volume.object_id == "vo-1"


def test_a_sweep_is_led_and_its_curve_written_in_a_container(
    small_suite: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The client may be gone by then."""
    import run_sweep

    called: list[str] = []

    def side_by_side(inputs: list[tuple[str, Any]], return_exceptions: bool) -> list[Any]:
        assert return_exceptions
        called.extend(function for function, _ in inputs)
        found: list[Any] = [command.on_gpu.local(*arguments) for arguments in inputs[:-1]]
        return [*found, RuntimeError("the container was lost")]

    monkeypatch.setitem(command.CONTAINERS, "gpu", SimpleNamespace(starmap=side_by_side))
    config = SweepConfig(
        results_dir=str(tmp_path), lmax=str(SMALL_LMAX), noise_level="noiseless", seeds=2,
        stage_1=f"--backbone tiny --max-epochs 1 --tiles-dir {small_suite}/tiles/lmax_{{lmax}}_{{noise_level}}",
        stage_2="--max-epochs 1 --n-members 1",
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = command.lead.local(run_sweep.COMMAND.side_by_side, config, "gpu")
    assert called == ["npe.sweep.run_point"] * 2
    assert command.lead.info().nonpreemptible
    errors = [point["error"] for point in result.points if "error" in point]
    assert errors == ["RuntimeError: the container was lost"]
    assert json.loads((tmp_path / "sweeps/sweep/fom_vs_lmax.json").read_text()) == asdict(result)


def test_a_recipe_stands_behind_what_the_user_gave(monkeypatch: pytest.MonkeyPatch) -> None:
    """The client gives every option a value, so an option that was given as its default is told by its flag."""
    built: list[CompressorConfig] = []
    main = with_signature_of(CompressorConfig, built.append)
    defaults = {field.name: field.default for field in fields(CompressorConfig)}
    for words in (["--recipe", "laptop", "--lmax", "100"], ["--recipe=laptop", "--max-epochs=500", "--lmax", "100"]):
        monkeypatch.setattr(sys, "argv", ["modal", "run", "run_compressor.py", *words])
        main(**defaults | {"recipe": "laptop", "lmax": 100})
        assert built[-1] == parse_args(CompressorConfig, words)
    assert [config.max_epochs for config in built] == [RECIPES["laptop"]["max_epochs"], 500]
    assert built[1].backbone == RECIPES["laptop"]["backbone"]
