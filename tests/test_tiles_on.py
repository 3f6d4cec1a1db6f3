"""Tiles held in memory, held as bf16 or read from the disk: the same to the bit, whatever fits."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import SMALL_LMAX, make_tiles, write_tiles

import common.device
import common.machine
import data.cache
import data.dataset
from common.errors import UserError
from compress.evaluate import predict
from compress.memory import bytes_of_a_step
from compress.model import FieldLevelCompressor, load_compressor
from data.cache import read_tiles_through_cache
from data.config import SplitOptions, TilesOn
from data.dataset import TileDataset, batches, whole_dataset
from data.module import TileDataModule
from data.moments import moments_of
from data.norm_stats import NormStats, compute_norm_stats
from data.schema import FOM_PARAMS, columns_of
from data.stream import TileStream
from data.tiles import Tiles

CPU = torch.device("cpu")
STAGE_1 = ["--lmax", SMALL_LMAX, "--noise-level", "noiseless", "--backbone", "tiny", "--max-epochs", 3]
STAGE_1 += ["--warmup-steps", 5, "--device", "cpu", "--batch-size", 64]


def dataset_of(tiles: Tiles, tiles_on: TilesOn = "auto", dtype: torch.dtype = torch.float32) -> TileDataset:
    norm_stats = compute_norm_stats(columns_of(tiles.params, FOM_PARAMS), moments_of(tiles.kappa))
    return whole_dataset(tiles, FOM_PARAMS, norm_stats, CPU, dtype, tiles_on)


def test_both_stages_are_the_same_to_the_bit_wherever_the_tiles_are(
    small_suite: Path, tmp_path: Path, run_command: Callable
) -> None:
    shutil.copytree(small_suite / "tiles", tmp_path / "tiles")
    found = []
    for place in ("device", "disk"):
        options = ["--results-dir", tmp_path, "--tiles-on", place, "--tag", place]
        code, _, err = run_command("run_compressor.py", *STAGE_1, *options)
        assert code == 0, err
        ckpt = tmp_path / "field_compressor_runs" / place / "best.ckpt"
        stage_2 = ["--ckpt", ckpt, "--max-epochs", 3, "--device", "cpu", "--tiles-on", place]
        code, _, err = run_command("run_npe.py", *stage_2)
        assert code == 0, err
        metrics = [json.loads(line) for line in ckpt.with_name("metrics.jsonl").read_text().splitlines()]
        fom = json.loads((tmp_path / "field_npe_runs" / place / "fom_result.json").read_text())
        found.append(
            (
                load_compressor(ckpt, CPU, "float32").model.state_dict(),
                [{k: v for k, v in line.items() if k != "seconds"} for line in metrics],
                {k: fom[k] for k in ("fom_fiducial_all", "npe", "calibration", "augmentation_shift_in_sigma")},
            )
        )
    held, read = found
    assert all(torch.equal(a, b) for a, b in zip(held[0].values(), read[0].values(), strict=True))
    assert held[1:] == read[1:]


@pytest.mark.parametrize("n_bins", [1, 6])
def test_split_tiles_have_the_bins_of_the_shards_and_the_parameters_that_were_named(
    n_bins: int, tmp_path: Path
) -> None:
    write_tiles(tmp_path, make_tiles(10, 16, 32, n_bins=n_bins), rows_per_shard=50)
    module = TileDataModule(tmp_path, SplitOptions(lmax=32), ("w", "Omega_m", "S8"), device=CPU)
    tiles = module.setup()
    assert np.array_equal(tiles.theta, tiles.tiles.params[:, [3, 0, 2]])
    rows = tiles.compressor_train_ds.rows.numpy()
    assert sorted(map(tuple, tiles.tiles.keys[rows])) == sorted(map(tuple, tiles.manifest.splits["compressor_train"]))
    kappa = tiles.tiles.kappa[rows]
    mean, std = (moment(kappa, axis=(0, 2, 3), dtype=np.float64, keepdims=True) for moment in (np.mean, np.std))
    for place in ("device", "disk"):
        found, theta = replace(module, tiles_on=place).setup().compressor_train_ds.__getitems__(range(len(rows)))
        torch.testing.assert_close(found, torch.from_numpy((kappa - mean) / std).float(), rtol=1e-4, atol=1e-5)
        physical = tiles.norm_stats.physical_theta(theta.numpy())
        np.testing.assert_allclose(physical, tiles.theta[rows], rtol=1e-5)
    for other in (replace(module, params=("Omega_m", "S8")), replace(module, tiles_dir=tmp_path / "other")):
        write_tiles(tmp_path / "other", make_tiles(10, 16, 32), rows_per_shard=50)
        with pytest.raises(UserError, match=r"norm_stats.json has . bins and . parameters, .* run stage 1"):
            replace(other, norm_stats=tiles.norm_stats).setup()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tiles_are_held_if_they_fit_beside_the_network_and_read_from_the_disk_if_not(
    dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_tiles(tmp_path, make_tiles(10, 16, 32), rows_per_shard=50)
    tiles, moments = read_tiles_through_cache(tmp_path, 32, "des_y3")
    norm_stats = compute_norm_stats(columns_of(tiles.params, FOM_PARAMS), moments)
    torch.manual_seed(0)
    network = FieldLevelCompressor("tiny", 4, len(FOM_PARAMS), dtype)
    reserve, size = 10_000_000, tiles.kappa.size * dtype.itemsize
    seen = {}
    for share in (1.01, 0.99):
        free = int(reserve + share * size / data.dataset.MEMORY_SHARE)
        monkeypatch.setattr(common.device, "free_memory", lambda free=free: free)
        dataset = whole_dataset(tiles, FOM_PARAMS, norm_stats, CPU, dtype, reserve=reserve, called="tiles")
        assert isinstance(dataset.source, torch.Tensor if share > 1 else TileStream)
        assert dataset.source.dtype is dtype
        said = capsys.readouterr().err
        assert ("held on cpu" in said) == (share > 1)
        assert "of which 0.0 GB for the network" in said
        seen[share] = predict(network, dataset, 50)
    in_float32 = predict(network, whole_dataset(tiles, FOM_PARAMS, norm_stats, CPU, tiles_on="disk"), 50)
    assert in_float32.std() > 0
    assert all(torch.equal(summary, in_float32) for summary in seen.values())


# On an 80 GB GPU a training step of efficientnet_v2_s in bf16, 128 tiles, peaked at so many GB.
PEAKS = {128: 3.6, 256: 13.4, 512: 52.5}


@pytest.mark.parametrize("nside", list(PEAKS))
def test_the_memory_of_a_step_is_that_of_a_gpu(nside: int) -> None:
    estimate = bytes_of_a_step("efficientnet_v2_s", torch.bfloat16, 128, nside, 4, training=True)
    assert estimate / 1e9 == pytest.approx(PEAKS[nside], rel=0.06)


def test_at_lmax_1000_an_80_gb_gpu_holds_the_tiles_in_bf16_and_not_in_float32(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the defaults of stage 1; the 791 simulations are pretended to, and nothing is allocated."""
    kappa = np.broadcast_to(np.float32(0), (791 * 12, 4, 512, 512))
    tiles = Tiles(kappa, np.zeros((len(kappa), 3), int), np.zeros((len(kappa), 8)), 1000, "des_y3")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (84_000_000_000, 85_000_000_000))
    monkeypatch.setattr(data.dataset, "_on_device", lambda *_: torch.empty(0))
    norm_stats = NormStats((0.0,) * 4, (1.0,) * 4, (0.0, 0.0), (1.0, 1.0))
    for dtype, held in ((torch.bfloat16, True), (torch.float32, False)):
        reserve = bytes_of_a_step("efficientnet_v2_s", dtype, 128, 512, 4, training=True)
        whole_dataset(tiles, FOM_PARAMS, norm_stats, torch.device("cuda"), dtype, reserve=reserve, called="tiles")
        assert ("held on cuda" in capsys.readouterr().err) == held


def test_an_epoch_asks_for_every_batch_before_it_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    tiles = make_tiles(10, 16, 32)
    streamed, held = dataset_of(tiles, "disk"), dataset_of(tiles, "device")
    assert isinstance(streamed.source, TileStream)
    in_time = 0
    original = streamed.source.read

    def read(rows: torch.Tensor) -> torch.Tensor:
        nonlocal in_time
        ahead = streamed.source._ahead  # type: ignore[union-attr]
        in_time += ahead is not None and torch.equal(ahead[0], rows)
        return original(rows)

    monkeypatch.setattr(streamed.source, "read", read)
    orders = [torch.Generator().manual_seed(3) for _ in range(2)]
    pairs = list(zip(batches(streamed, 32, orders[0]), batches(held, 32, orders[1]), strict=True))
    assert all(torch.equal(a, b) for one, other in pairs for a, b in zip(one, other, strict=True))
    assert in_time == len(pairs) - 1  # all but the first


def test_without_room_for_the_cache_tiles_must_fit_into_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_tiles(tmp_path, make_tiles(10, 16, 32), rows_per_shard=50)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(data.cache, "_write_pixels", full)
    size = 120 * 4 * 16 * 16 * 4
    monkeypatch.setattr(data.cache, "free_memory", lambda: size)
    tiles, moments = read_tiles_through_cache(tmp_path, 32, "des_y3")
    assert np.array_equal(moments.mean, moments_of(tiles.kappa).mean)
    monkeypatch.setattr(data.cache, "free_memory", lambda: size - 1)
    with pytest.raises(UserError, match=r"No space left on device\), and the tiles take .* make room"):
        read_tiles_through_cache(tmp_path, 32, "des_y3")


@pytest.mark.parametrize("generation", [0, 1])
def test_a_container_has_no_more_memory_than_its_limit_leaves(
    generation: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(common.machine, "CGROUP", tmp_path)
    of_the_machine = common.machine.free_memory()
    assert of_the_machine > 1 << 28
    limit, use, statistics, cached = common.machine.CGROUP_FILES[generation]
    (tmp_path / "memory").mkdir()
    (tmp_path / limit).write_text(f"{1 << 28}\n")
    (tmp_path / use).write_text(f"{1 << 27}\n")
    (tmp_path / statistics).write_text(f"anon 5\n{cached} {1 << 20}\nother 7\n")
    assert common.machine.free_memory() == (1 << 28) - (1 << 27) + (1 << 20)
    (tmp_path / limit).write_text("max\n")
    assert common.machine.free_memory() > 1 << 28


def test_what_was_read_ahead_for_an_epoch_that_was_left_is_not_taken_for_another_batch() -> None:
    tiles = make_tiles(10, 16, 32)
    streamed, held = dataset_of(tiles, "disk"), dataset_of(tiles, "device")
    next(batches(streamed, 32, torch.Generator().manual_seed(3)))  # the second batch is on its way
    positions = torch.arange(32)
    assert torch.equal(streamed.__getitems__(positions)[0], held.__getitems__(positions)[0])
