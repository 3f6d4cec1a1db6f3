"""An epoch of stage 2 against the bare forward passes and against tile by tile: `python benchmarks/npe_epoch.py`.

ours    npe.train.train with five members: augmentation, batched compression, the members' steps, npe_best.ckpt
limit   the forward passes of the frozen network alone, on one random batch of the same size in memory
usual   each tile compressed by itself in __getitem__, then the same steps

2370 training tiles, as in a full run. Milliseconds per tile.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np
import torch

from benchmarks.measure import Row, in_turns, report, seconds
from benchmarks.train_step import random_batch, random_dataset, rows_of
from common.device import name_of_dtype, pick_device
from common.resume import LastCheckpoint
from compress.config import Backbone
from compress.model import FieldLevelCompressor, pick_precision
from data.dataset import TileDataset, n_batches
from data.mock.nz import N_BINS
from data.schema import FOM_PARAMS
from npe.compressed import CompressedTileDataModule, CompressedTileDataset
from npe.config import NPEConfig
from npe.model import CHECKPOINT_NAME
from npe.train import train

N_TRAIN, N_VAL, NSIDE = 2370, 64, 128  # a small test split: it is compressed once a run and not once an epoch
EPOCHS = 2
CONFIG = NPEConfig(ckpt="", max_epochs=EPOCHS, checkpoint_seconds=1e9)
CASES: dict[Backbone, tuple[int, int]] = {"tiny": (N_TRAIN, 240), "efficientnet_b0": (512, 64)}  # tiles, one by one


class OneByOne(CompressedTileDataset):
    """The usual way."""

    @torch.no_grad()
    def __getitems__(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:  # type: ignore[override]
        kappa, theta = zip(*(self.tiles[int(i)] for i in positions), strict=True)
        return torch.cat([self.compressor(one[None]) for one in kappa]), torch.stack(theta)


def compressed_splits(
    tiles: TileDataset, n_train: int, compressor: FieldLevelCompressor, augment: torch.Generator
) -> CompressedTileDataModule:
    """The first N_VAL tiles as the test split, the next n_train to learn from."""
    val_ds, train_ds = (rows_of(tiles, rows) for rows in np.split(np.arange(N_VAL + n_train), [N_VAL]))
    data: Any = SimpleNamespace(npe_train_ds=train_ds, test_ds=val_ds, fiducial_ds=val_ds)
    return CompressedTileDataModule(data, compressor, augment)


def measure(backbone: Backbone, n_train: int, n_single: int, device: torch.device) -> Row:
    """One line of the table; the usual way has fewer tiles, because it takes so long."""
    dtype = pick_precision("auto", device, backbone)
    torch.manual_seed(0)
    compressor = FieldLevelCompressor(backbone, N_BINS, len(FOM_PARAMS), dtype).to(device).eval()
    tiles = random_dataset(N_VAL + n_train, NSIDE, device, dtype)
    augment = torch.Generator().manual_seed(0)
    batched, single = (compressed_splits(tiles, n, compressor, augment) for n in (n_train, n_single))
    single.train_ds = OneByOne(single.train_ds.tiles, compressor)
    n_steps = n_batches(n_train, CONFIG.batch_size)
    batch, few = (random_batch(n, NSIDE, device) for n in (-(-n_train // n_steps), N_VAL))

    def epochs(data: CompressedTileDataModule) -> None:
        with tempfile.TemporaryDirectory() as folder:
            last = LastCheckpoint(Path(folder), CONFIG, {}, CHECKPOINT_NAME, device)
            train(data, CONFIG, last)

    @torch.no_grad()
    def forward_passes() -> None:
        compressor(few)
        for _ in range(EPOCHS * n_steps):
            compressor(batch)

    found = in_turns(
        {
            "ours": lambda: seconds(lambda: epochs(batched), device) / (EPOCHS * n_train),
            "limit": lambda: seconds(forward_passes, device) / (EPOCHS * n_train),
            "usual": lambda: seconds(lambda: epochs(single), device) / (EPOCHS * n_single),
        },
        f"NPE epoch, {backbone}",
    )
    per_tile = {way: [1e3 * value for value in values] for way, values in found.items()}
    name = f"NPE epoch, {n_train} tiles through {backbone}, {name_of_dtype(dtype)}"
    return Row(name, "ms/tile", **per_tile, target="<= 1.05; usual / ours >= 3")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--results-dir", type=Path, default=Path("build/bench"))
    options = parser.parse_args()
    device = pick_device(options.device)
    rows = [measure(backbone, *sizes, device) for backbone, sizes in CASES.items()]
    report(rows, device, options.results_dir / "npe_epoch.json")


if __name__ == "__main__":
    main()
