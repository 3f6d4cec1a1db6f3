"""An epoch of stage 2 against the bare forward passes and against tile by tile: `python benchmarks/npe_epoch.py`.

ours    npe.train.train with five members: augmentation, batched compression, the members' steps, npe_best.ckpt
limit   the forward passes of the frozen network alone, on one random batch of the same size in memory
usual   each tile compressed by itself in __getitem__, then the same steps

2370 training tiles, as in a full run. Milliseconds per tile. What ours takes beyond the limit is shown by taking it
away: first the members' steps, then augmentation, too. The last row has a whole stage 2 and, as usual, a whole stage 1
of the laptop's recipe: seconds for their epochs at the measured rates.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np
import torch

from benchmarks.measure import Row, in_turns, report, seconds
from benchmarks.train_step import Case, Epochs, random_batch, random_dataset, rows_of
from common.device import name_of_dtype, pick_device
from common.resume import LastCheckpoint
from compress.config import RECIPES, Backbone, CompressorConfig
from compress.model import FieldLevelCompressor, pick_precision
from data.dataset import TileDataset, batches, n_batches
from data.mock.nz import N_BINS
from data.schema import FOM_PARAMS
from npe.compressed import CompressedTileDataModule, CompressedTileDataset
from npe.config import NPEConfig
from npe.model import CHECKPOINT_NAME
from npe.train import train

N_TRAIN, N_VAL, NSIDE = 2370, 64, 128  # a small test split: it is compressed once a run and not once an epoch
EPOCHS = 2
CONFIG = NPEConfig(ckpt="", max_epochs=EPOCHS, checkpoint_seconds=1e9)
STAGE_1, N_STAGE_1 = CompressorConfig(**RECIPES["laptop"]), 6636  # tiles
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


def measure(backbone: Backbone, n_train: int, n_single: int, device: torch.device) -> list[Row]:
    """The lines of one network; the usual way has fewer tiles, because it takes so long."""
    dtype = pick_precision("auto", device, backbone)
    torch.manual_seed(0)
    compressor = FieldLevelCompressor(backbone, N_BINS, len(FOM_PARAMS), dtype).to(device).eval()
    tiles = random_dataset(N_VAL + n_train, NSIDE, device, dtype)
    augment = torch.Generator().manual_seed(0)
    batched, single = (compressed_splits(tiles, n, compressor, augment) for n in (n_train, n_single))
    single.train_ds = OneByOne(single.train_ds.tiles, compressor)
    as_they_are = CompressedTileDataset(rows_of(tiles, np.arange(N_VAL, N_VAL + n_train)), compressor)
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

    def compressed(dataset: CompressedTileDataset) -> None:
        compressor(few)
        for epoch in range(EPOCHS):
            for _ in batches(dataset, CONFIG.batch_size, torch.Generator().manual_seed(epoch)):
                pass

    found = in_turns(
        {
            "ours": lambda: seconds(lambda: epochs(batched), device) / (EPOCHS * n_train),
            "limit": lambda: seconds(forward_passes, device) / (EPOCHS * n_train),
            "usual": lambda: seconds(lambda: epochs(single), device) / (EPOCHS * n_single),
            "no steps": lambda: seconds(lambda: compressed(batched.train_ds), device) / (EPOCHS * n_train),
            "nor views": lambda: seconds(lambda: compressed(as_they_are), device) / (EPOCHS * n_train),
        },
        f"NPE epoch, {backbone}",
    )
    found = {way: [1e3 * value for value in values] for way, values in found.items()}
    name = f"NPE epoch, {n_train} tiles through {backbone}, {name_of_dtype(dtype)}"
    ours, limit, usual, no_steps, nor_views = found.values()
    return [
        Row(name, "ms/tile", ours, limit, usual, "<= 1.05; usual / ours >= 3"),
        Row("... without the members' steps", "ms/tile", no_steps, limit),
        Row("... nor augmentation", "ms/tile", nor_views, limit),
    ]


def whole_stages(ours: Sequence[float], device: torch.device) -> Row:
    """Both stages of the laptop's recipe, from the milliseconds that an epoch takes for each tile."""
    stage_1 = Epochs(Case(STAGE_1.backbone, NSIDE, STAGE_1.batch_size, 8, 2), device, "auto")
    n_stage_1, n_stage_2 = STAGE_1.max_epochs * N_STAGE_1, NPEConfig(ckpt="").max_epochs * N_TRAIN
    usual = in_turns({"stage 1": lambda: seconds(stage_1.ours, device)}, "stage 1", len(ours))["stage 1"]
    per_tile = [value / (stage_1.case.n_steps * stage_1.case.batch_size) for value in usual]
    return Row(
        "the training of stage 2, as usual that of stage 1, laptop's recipe",
        "s",
        [1e-3 * n_stage_2 * value for value in ours],
        usual=[n_stage_1 * value for value in per_tile],
    )


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--results-dir", type=Path, default=Path("build/bench"))
    options = parser.parse_args()
    device = pick_device(options.device)
    rows = [row for backbone, sizes in CASES.items() for row in measure(backbone, *sizes, device)]
    rows.append(whole_stages(rows[0].ours, device))
    report(rows, device, options.results_dir / "npe_epoch.json")


if __name__ == "__main__":
    main()
