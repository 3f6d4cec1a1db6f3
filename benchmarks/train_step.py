"""The training loop against the bare arithmetic and against the usual way: `python benchmarks/train_step.py`.

ours    compress.train.train: gather, augmentation, schedule, progress, validation. No checkpoint is written, because
        epochs last seconds here, while a run writes best.ckpt once an epoch at most, and last.ckpt once a minute
limit   forward, backward, optimiser, and the forward passes of the validation, on one random batch in memory
usual   the same network behind a DataLoader with worker processes, pinned memory and transforms of single tiles

All three have the same network, batch, precision and number of steps. Milliseconds per training tile.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np
import torch
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset

from benchmarks.measure import Row, in_turns, report, seconds
from common.device import name_of_dtype, pick_device
from common.machine import Precision
from common.resume import LastCheckpoint
from compress.config import Backbone, CompressorConfig
from compress.model import CHECKPOINT_NAME, FieldLevelCompressor, pick_precision
from compress.train import train
from data.dataset import TileDataset, whole_dataset
from data.mock.nz import N_BINS
from data.norm_stats import NormStats
from data.schema import FOM_PARAMS, PARAM_NAMES
from data.tiles import Tiles, empty_kappa


@dataclass(frozen=True)
class Case:
    """Network, pixels per side, tiles per batch, and batches per epoch of training and validation."""

    backbone: Backbone
    nside: int
    batch_size: int
    n_steps: int
    n_val: int  # a quarter of the steps, about as in a run


CASES = [
    Case("tiny", 128, 128, 8, 2),
    Case("tiny", 256, 32, 8, 2),
    Case("tiny", 512, 8, 8, 2),
    Case("efficientnet_b0", 128, 64, 8, 2),
    Case("efficientnet_v2_s", 128, 32, 8, 2),
]
TARGETS = {"tiny": "<= 1/0.95 = 1.053", "efficientnet_b0": "<= 1/0.97 = 1.031", "efficientnet_v2_s": "<= 1.031"}
WORKERS = 2


def random_dataset(n: int, nside: int, device: torch.device, dtype: torch.dtype) -> TileDataset:
    """Tiles of white noise with random parameters."""
    kappa = empty_kappa(n, N_BINS, nside)
    np.random.default_rng(0).standard_normal(out=kappa.transpose(0, 2, 3, 1), dtype=np.float32)
    params = np.random.default_rng(1).random((n, len(PARAM_NAMES)))
    tiles = Tiles(kappa, np.zeros((n, 3), dtype=np.int64), params, lmax=0, noise_level="")
    d = len(FOM_PARAMS)
    norm_stats = NormStats((0.0,) * N_BINS, (1.0,) * N_BINS, (0.5,) * d, (1.0,) * d)
    return whole_dataset(tiles, FOM_PARAMS, norm_stats, device, dtype, tiles_on="device")


def rows_of(dataset: TileDataset, rows: np.ndarray) -> TileDataset:
    """Some tiles of a data set."""
    return TileDataset(dataset.source, dataset.theta, rows, dataset.device)


def random_batch(n: int, nside: int, device: torch.device) -> torch.Tensor:
    """White noise (n, bins, N, N), channels_last."""
    return torch.randn(n, N_BINS, nside, nside, device=device).to(memory_format=torch.channels_last)


class SingleTiles(Dataset[tuple[torch.Tensor, torch.Tensor]]):
    """The usual way: one tile at a time, turned, flipped and rolled by torch."""

    def __init__(self, dataset: TileDataset) -> None:
        assert isinstance(dataset.source, torch.Tensor)
        source = dataset.source.cpu()  # a forked worker process cannot use CUDA
        self.dataset = TileDataset(source, dataset.theta, dataset.rows.numpy(), source.device)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, position: int) -> tuple[torch.Tensor, torch.Tensor]:
        kappa, theta = self.dataset[position]  # (bins, N, N), (d,)
        turns, flip, down, right = (int(torch.randint(n, ())) for n in (4, 2, kappa.shape[-1], kappa.shape[-1]))
        kappa = torch.rot90(kappa.flip(-1) if flip else kappa, turns, (-2, -1))
        return torch.roll(kappa, (down, right), (-2, -1)).contiguous(), theta


class Epochs:
    """The three ways to train one network for an epoch."""

    def __init__(self, case: Case, device: torch.device, precision: Precision) -> None:
        self.case, self.device, self.precision = case, device, precision
        self.dtype = pick_precision(precision, device, case.backbone)
        self.model = FieldLevelCompressor(case.backbone, N_BINS, len(FOM_PARAMS), self.dtype).to(device)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3, fused=True)
        self.batch = random_batch(case.batch_size, case.nside, device)
        self.theta = torch.randn(case.batch_size, len(FOM_PARAMS), device=device)
        n_train, n_val = (n * case.batch_size for n in (case.n_steps, case.n_val))
        tiles = random_dataset(n_train + n_val, case.nside, device, self.dtype)
        self.train_ds = rows_of(tiles, np.arange(n_train))
        self.val_ds = rows_of(tiles, np.arange(n_train, n_train + n_val))
        self.loader: DataLoader[Any] = DataLoader(
            SingleTiles(self.train_ds),
            case.batch_size,
            shuffle=True,
            num_workers=WORKERS,
            pin_memory=device.type == "cuda",
            persistent_workers=True,
            worker_init_fn=lambda _: torch.set_num_threads(1),
        )

    def ours(self) -> None:
        """The training loop of stage 1."""
        config = CompressorConfig(
            backbone=self.case.backbone,
            max_epochs=1,
            batch_size=self.case.batch_size,
            warmup_steps=10,
            norm_tiles=0,  # the limit has no such passes
            precision=self.precision,
            checkpoint_seconds=1e9,
        )
        data: Any = SimpleNamespace(compressor_train_ds=self.train_ds, npe_train_ds=self.val_ds, provenance={})
        with tempfile.TemporaryDirectory() as folder, patch("compress.train.save_compressor"):
            train(self.model, data, config, LastCheckpoint(Path(folder), config, {}, CHECKPOINT_NAME, self.device))

    def limit(self) -> None:
        """The arithmetic alone."""
        self.model.train()
        for _ in range(self.case.n_steps):
            self._step(self.batch, self.theta)
        self._validate()

    def usual(self) -> None:
        """A DataLoader of single tiles."""
        self.model.train()
        for kappa, theta in self.loader:
            self._step(kappa.to(self.device, memory_format=torch.channels_last), theta.to(self.device))
        self._validate()

    def _step(self, kappa: torch.Tensor, theta: torch.Tensor) -> None:
        loss = functional.mse_loss(self.model(kappa), theta)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()

    @torch.no_grad()
    def _validate(self) -> None:
        self.model.eval()
        for kappa in itertools.repeat(self.batch, self.case.n_val):
            self.model(kappa)


def measure(case: Case, device: torch.device, precision: Precision) -> Row:
    """One line of the table."""
    epochs = Epochs(case, device, precision)
    name = f"{case.backbone}, {case.nside} x {case.nside}, {name_of_dtype(epochs.dtype)}, batch {case.batch_size}"
    found = in_turns(
        {
            "ours": lambda: seconds(epochs.ours, device),
            "limit": lambda: seconds(epochs.limit, device),
            "usual": lambda: seconds(epochs.usual, device),
        },
        name,
    )
    n_tiles = case.n_steps * case.batch_size
    per_tile = {way: [1e3 * value / n_tiles for value in values] for way, values in found.items()}
    return Row(f"training step, {name}", "ms/tile", **per_tile, target=TARGETS[case.backbone])


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--backbone", default="", help="only this one")
    parser.add_argument("--results-dir", type=Path, default=Path("build/bench"))
    options = parser.parse_args()
    device = pick_device(options.device)
    cases = [case for case in CASES if options.backbone in ("", case.backbone)]
    rows = [measure(case, device, options.precision) for case in cases]
    report(rows, device, options.results_dir / "train_step.json")


if __name__ == "__main__":
    main()
