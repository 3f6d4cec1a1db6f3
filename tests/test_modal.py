"""The Modal wrappers, without an account: what they ask for, and that they run the same functions."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import GUARD_S, ROOT, SMALL_LMAX

from common import remote
from compress.config import CompressorConfig
from data.config import CheckConfig, FetchConfig
from data.ingest.config import IngestConfig
from npe.config import NPEConfig, PredictConfig, SweepConfig

pytest.importorskip("modal")
pytestmark = pytest.mark.modal

FUNCTIONS = {
    "run_compressor": "compressor_in_container",
    "run_npe": "npe_in_container",
    "run_mock": "mock_in_container",
    "run_check": "check_in_container",
    "run_sweep": "point_in_container",
    "run_ingest": "ingest_in_container",
    "run_predict": "predict_in_container",
    "run_fetch": "fetch_in_container",
}


@pytest.fixture(autouse=True)
def no_account(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in list(os.environ):
        if name.startswith("MODAL_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("MODAL_CONFIG_PATH", str(tmp_path / "no_such_config.toml"))


@pytest.mark.parametrize("script", sorted(FUNCTIONS))
def test_functions_ask_for_what_a_long_run_needs(script: str) -> None:
    info = getattr(importlib.import_module(script), FUNCTIONS[script]).info()
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
        result = run_compressor.compressor_in_container.local(asdict(stage_1))
        ckpt = Path(result["folder"]) / "best.ckpt"
        fom = run_npe.npe_in_container.local(asdict(NPEConfig(ckpt=str(ckpt), max_epochs=3)))
        again = run_npe.npe_in_container.local(asdict(NPEConfig(ckpt=str(ckpt), max_epochs=3)))
    written = json.loads((small_suite / "field_npe_runs" / "modal" / "fom_result.json").read_text())
    assert written == fom
    assert "holds a finished run" in again["user_error"]  # a value: raised, Modal would retry it ten times


@pytest.mark.parametrize(
    "path",
    [
        "results/field_compressor_runs/t/best.ckpt",
        "/results/field_compressor_runs/t/best.ckpt",
        "field_compressor_runs/t/best.ckpt",
    ],
)
def test_paths_mean_the_volume_in_a_container(path: str) -> None:
    config = remote._on_volume(NPEConfig(ckpt=path, tiles_dir=path, calibration_tiles=path, noiseless_tiles=path))
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
    monkeypatch.setattr(remote.modal, "is_local", lambda: False)
    monkeypatch.setattr(remote, "volume", volume)
    monkeypatch.setattr(remote, "RESULTS", str(mount))
    config = CompressorConfig(
        lmax=SMALL_LMAX, noise_level="noiseless", backbone="tiny", max_epochs=3, batch_size=64, checkpoint_seconds=0
    )

    def start(tag: str) -> dict[str, Any]:
        volume.calls.clear()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return run_compressor.compressor_in_container.local(asdict(replace(config, tag=tag)))

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
    assert "going on from" in capsys.readouterr().err
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
    import run_npe

    def stop(_: NPEConfig, on_checkpoint: Callable[[], None]) -> dict[str, Any]:
        os.kill(os.getpid(), signal.SIGINT)
        raise AssertionError("the signal was not heard")

    monkeypatch.setattr("npe.train.train_npe", stop)
    with pytest.warns(UserWarning, match="local"), pytest.raises(KeyboardInterrupt):
        run_npe.npe_in_container.local(asdict(NPEConfig(ckpt="x")))


def test_paths_inside_quotes_mean_the_volume_as_well() -> None:
    config = SweepConfig(
        stage_1="--backbone tiny --tiles-dir 'results/my tiles/lmax_{lmax}' --noiseless-tiles=results/clean",
        stage_2="--calibration-tiles /results/fresh",
    )
    run = remote._on_volume(config).runs[0]
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
            metadata = api_pb2.VolumeMetadata(name=remote.VOLUME_NAME, version=version)
            return api_pb2.VolumeGetOrCreateResponse(volume_id="vo-1", metadata=metadata)

    client: Any = type("Client", (), {"_stub": Stub()})()
    volume: Any = synchronizer._translate_in(remote.volume)  # type: ignore[attr-defined]
    asyncio.run(volume._load(volume, None, LoadContext(client=client, environment_name="main"), None))
    assert volume.object_id == "vo-1"


def test_a_sweep_is_led_and_its_curve_written_in_a_container(
    small_suite: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The client may be gone by then."""
    import run_sweep

    points: list[int] = []

    def side_by_side(inputs: list[tuple[dict[str, Any], int]], return_exceptions: bool) -> list[Any]:
        assert return_exceptions
        points.extend(number for _, number in inputs)
        found: list[Any] = [one_of_many.local(*arguments) for arguments in inputs[:-1]]
        return [*found, RuntimeError("the container was lost")]

    one_of_many = run_sweep.point_in_container
    monkeypatch.setattr(run_sweep, "point_in_container", SimpleNamespace(starmap=side_by_side))
    config = SweepConfig(
        results_dir=str(tmp_path), lmax=str(SMALL_LMAX), noise_level="noiseless", seeds=2,
        stage_1=f"--backbone tiny --max-epochs 1 --tiles-dir {small_suite}/tiles/lmax_{{lmax}}_{{noise_level}}",
        stage_2="--max-epochs 1 --n-members 1",
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = run_sweep.sweep_in_container.local(asdict(config))
    assert points == [0, 1]
    assert run_sweep.sweep_in_container.info().nonpreemptible
    assert [point["error"] for point in result["points"] if "error" in point] == ["the container was lost"]
    assert json.loads((tmp_path / "sweeps/sweep/fom_vs_lmax.json").read_text()) == result
