"""Both stages on a GPU that is not there: nothing mixes devices, nothing waits, and an interrupted run goes on."""

from __future__ import annotations

import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from conftest import SMALL_LMAX
from pretend_cuda import CUDA, PretendCuda, pretend_cuda

from common.device import to_device
from common.interrupt import Interrupted
from common.resume import Position
from compress.config import CompressorConfig
from compress.stage import run_compressor
from data.config import TilesOn
from npe.config import NPEConfig, PredictConfig
from npe.predict import predict_tiles
from npe.stage import run_npe


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[PretendCuda]:
    with pretend_cuda(monkeypatch) as pretended:
        yield pretended


@pytest.fixture
def stop_after(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Let a signal be heard between two batches, after so many of them."""

    def arm(n_batches: int) -> None:
        left = iter(range(n_batches, -1_000_000, -1))

        def check() -> None:
            if next(left) == 0:
                raise Interrupted(signal.SIGTERM)

        monkeypatch.setattr("data.dataset.check", check)

    return arm


def stage_1(results: Path, tag: str, **options: object) -> CompressorConfig:
    return CompressorConfig(
        results_dir=str(results), lmax=SMALL_LMAX, noise_level="noiseless", backbone="tiny", precision="float32",
        max_epochs=2, batch_size=100, warmup_steps=3, ema_decay=0.9, norm_tiles=100, tag=tag, device="cpu", **options,
    )  # fmt: skip


def stage_2(results: Path, tag: str) -> NPEConfig:
    ckpt = str(results / "field_compressor_runs" / tag / "best.ckpt")
    return NPEConfig(ckpt=ckpt, max_epochs=3, batch_size=50, n_members=2, precision="float32", device="cpu")


def weights(results: Path, tag: str) -> list[torch.Tensor]:
    best = torch.load(results / f"field_compressor_runs/{tag}/best.ckpt", weights_only=True)["model"]
    members = torch.load(results / f"field_npe_runs/{tag}/npe_best.ckpt", weights_only=True)["members"]
    return [*best.values(), *(tensor for member in members for tensor in member.values())]


def test_both_stages_interrupted_in_mid_epoch_go_on_to_the_bit_and_to_that_of_the_cpu(
    small_suite: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop_after: Callable[[int], None]
) -> None:
    """Draws are the CPU's on every device, and the arithmetic is the CPU's here, so all three runs are one."""
    shutil.copytree(small_suite / "tiles", tmp_path / "tiles")
    run_compressor(stage_1(tmp_path, "cpu"))
    run_npe(stage_2(tmp_path, "cpu"))
    with pretend_cuda(monkeypatch):
        run_compressor(stage_1(tmp_path, "whole"))
        run_npe(stage_2(tmp_path, "whole"))
        per_epoch = 5 + 3 + 1  # batches of the training, of its validation and of the BatchNorm statistics
        for n_batches in (2, per_epoch + 3):
            stop_after(n_batches)
            with pytest.raises(Interrupted, match=r"last.ckpt has epoch \d, batch [1-9]"):
                run_compressor(stage_1(tmp_path, "stopped"))
        stop_after(-1)
        run_compressor(stage_1(tmp_path, "stopped"))
        stop_after(1 + 3)
        with pytest.raises(Interrupted, match=r"last.ckpt has epoch \d, batch [1-9]"):
            run_npe(stage_2(tmp_path, "stopped"))
        stop_after(-1)
        result = run_npe(stage_2(tmp_path, "stopped"))
    assert result.device == "a GPU that is not there"
    wanted = weights(tmp_path, "cpu")
    for tag in ("whole", "stopped"):
        assert all(torch.equal(a, b) for a, b in zip(wanted, weights(tmp_path, tag), strict=True)), tag


@pytest.mark.parametrize(("tiles_on", "noise"), [("device", ""), ("disk", "noiseless_tiles")])
def test_a_step_waits_for_no_copy(
    tiles_on: TilesOn, noise: str, small_suite: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cuda: PretendCuda
) -> None:
    shutil.copytree(small_suite / "tiles", tmp_path / "tiles")
    tiles = str(tmp_path / "tiles" / f"lmax_{SMALL_LMAX}_noiseless")
    original, waits, batches = Position.next_batch, [], []

    def next_batch(at: Position, loss: torch.Tensor) -> None:
        if at.batch > 0:  # what came before the first belongs to the epoch before it
            waits.extend(cuda.waits)
            batches.append(at.batch)
        original(at, loss)
        cuda.waits.clear()

    monkeypatch.setattr(Position, "next_batch", next_batch)
    options = {"noiseless_tiles": tiles} if noise else {}
    run_compressor(stage_1(tmp_path, "t", tiles_on=tiles_on, **options))
    run_npe(stage_2(tmp_path, "t"))
    assert len(batches) >= 2 * 4 + 3 * 2
    assert waits == []


def test_the_pretended_gpu_refuses_what_a_real_one_refuses(cuda: PretendCuda) -> None:
    there, here = torch.ones(3, device=CUDA), torch.ones(3)
    assert (there + torch.tensor(1.0)).device == CUDA
    for mixed in (lambda: there + here, lambda: torch.stack([there.sum(), here.sum()]), lambda: here[there.long()]):
        with pytest.raises(RuntimeError, match="same device"):
            mixed()
    with pytest.raises(TypeError, match="numpy"):
        there.numpy()
    assert cuda.waits == []
    for waiting in (there.cpu, lambda: here.to(CUDA), lambda: here.to(CUDA, non_blocking=True), there.sum().item):
        waiting()
    assert len(cuda.waits) == 4
    assert here.pin_memory().to(CUDA, non_blocking=True).device == CUDA
    assert len(cuda.waits) == 4


def test_a_batch_goes_to_the_device_in_one_copy_and_arrives_as_it_was(
    cuda: PretendCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator, copies = torch.Generator().manual_seed(0), []
    tensors = [torch.randint(1 << 40, (7,), generator=generator) for _ in range(6)]
    tensors.append(torch.randn(7, 3, generator=generator))
    original = cuda.move
    monkeypatch.setattr(cuda, "move", lambda *a: copies.append(1) or original(*a))
    found = to_device(tensors, CUDA)
    assert len(copies) == 1
    assert all(torch.equal(a.cpu(), b) for a, b in zip(found, tensors, strict=True))


def test_single_tiles_are_answered_on_a_gpu(small_suite: Path, tmp_path: Path, cuda: PretendCuda) -> None:
    shutil.copytree(small_suite / "tiles", tmp_path / "tiles")
    run_compressor(stage_1(tmp_path, "t"))
    stage = run_npe(stage_2(tmp_path, "t"))
    shard = min((tmp_path / "tiles").rglob("shard_*.parquet"))
    result = predict_tiles(PredictConfig(run=stage.folder, tiles=str(shard), n_samples=0, device="cpu"))
    assert len(result.predictions) == 600
