"""An epoch of stage 2 against the bare forward passes and against tile by tile: `python benchmarks/npe_epoch.py`.

ours    npe.train.fit as it is, five members: augmentation, batched compression, the members' steps, checkpoints
limit   the frozen network's forward passes alone, on one resident random batch
usual   each tile compressed by itself in __getitem__, then the same steps

2370 training tiles as in a full run; milliseconds per tile. The batches of the limit are those of ours.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np
import torch

from benchmarks.measure import ROUNDS, Row, in_turns, report, seconds
from benchmarks.train_step import random_tiles
from common.device import pick_device, pick_precision
from common.resume import LastCheckpoint
from compress.config import Backbone
from compress.model import FieldLevelCompressor
from data.dataset import TileDataset, n_batches, whole_dataset
from data.mock.nz import N_BINS
from data.norm_stats import NormStats
from data.schema import FOM_PARAMS
from npe.compressed import CompressedTileDataModule, CompressedTileDataset
from npe.config import NPEConfig
from npe.train import fit

N_TRAIN, N_VAL, NSIDE = 2370, 64, 128  # a short validation, compressed once a run and not once an epoch
EPOCHS = 2
CASES: dict[Backbone, tuple[int, int]] = {"tiny": (N_TRAIN, 240), "efficientnet_b0": (512, 64)}  # tiles, one by one


class OneByOne(CompressedTileDataset):
    """The usual way."""

    @torch.no_grad()
    def __getitems__(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:  # type: ignore[override]
        kappa, theta = zip(*(self.tiles[int(i)] for i in positions), strict=True)
        return torch.cat([self.compressor(one[None]) for one in kappa]), torch.stack(theta)


def measure(backbone: Backbone, n_train: int, n_single: int, device: torch.device) -> Row:
    """One line of the table; the usual way with fewer tiles, since it takes so long."""
    config = NPEConfig(ckpt="", max_epochs=EPOCHS, checkpoint_seconds=float("inf"))
    dtype = pick_precision("auto", device, backbone)
    torch.manual_seed(0)
    compressor = FieldLevelCompressor(backbone, dtype).to(device).eval()
    stats = NormStats((0.0,) * 4, (1.0,) * 4, (0.5, 0.5), (1.0, 1.0))
    everything = whole_dataset(random_tiles(n_train + N_VAL, NSIDE), FOM_PARAMS, stats, device, dtype)

    def splits(first: int, n: int) -> SimpleNamespace:
        rows = np.arange(first, first + n)
        train, val = (TileDataset(everything.source, everything.theta, r, device) for r in (rows, np.arange(N_VAL)))
        return SimpleNamespace(npe_train_ds=train, test_ds=val, fiducial_ds=val)

    module = CompressedTileDataModule(splits(N_VAL, n_train), compressor, torch.Generator().manual_seed(0))  # type: ignore[arg-type]
    single = CompressedTileDataModule(splits(N_VAL, n_single), compressor, torch.Generator().manual_seed(0))  # type: ignore[arg-type]
    single.train_ds = OneByOne(single.train_ds.tiles, compressor)
    size = -(-n_train // n_batches(n_train, config.batch_size))
    kappa = torch.randn(size, N_BINS, NSIDE, NSIDE, device=device).to(memory_format=torch.channels_last)
    few = torch.randn(N_VAL, N_BINS, NSIDE, NSIDE, device=device).to(memory_format=torch.channels_last)

    @torch.no_grad()
    def forward_passes() -> None:
        compressor(few)
        for _ in range(EPOCHS * n_batches(n_train, config.batch_size)):
            compressor(kappa)

    with tempfile.TemporaryDirectory() as folder:

        def train(data: CompressedTileDataModule) -> None:
            fit(data, config, "", LastCheckpoint(Path(folder), {}, "npe_best.ckpt", device), device)

        found = in_turns(
            {
                "ours": lambda: seconds(lambda: train(module), device) / (EPOCHS * n_train),
                "limit": lambda: seconds(forward_passes, device) / (EPOCHS * n_train),
                "usual": lambda: seconds(lambda: train(single), device) / (EPOCHS * n_single),
            },
            f"NPE epoch, {backbone}",
            ROUNDS,
        )
    per_tile = {way: [1e3 * value for value in values] for way, values in found.items()}
    name = f"NPE epoch, {n_train} tiles through {backbone}, {str(dtype).removeprefix('torch.')}"
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
