"""The training loop against the bare arithmetic and against the usual way: `python benchmarks/train_step.py`.

ours    compress.train.fit as it is: gather, augmentation, schedule, progress, validation; but no checkpoint, of which
        a run writes one a minute and one after an epoch that is better than any before: epochs here last seconds
limit   forward, backward, optimiser, and the validation's forward passes, on one resident random batch
usual   the same network behind a DataLoader with worker processes, pinned memory and transforms of single tiles

Same network, batch, precision and number of steps; milliseconds per tile that is trained on. Header of the output:
processor, cores, device, versions.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np
import torch
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset

from benchmarks.measure import Row, in_turns, report, seconds
from common.device import pick_device, pick_precision
from common.early_stopping import EarlyStopping
from common.machine import Precision
from common.resume import LastCheckpoint
from compress.config import Backbone, CompressorConfig
from compress.model import FieldLevelCompressor
from compress.train import fit
from data.dataset import TileDataset, whole_dataset
from data.mock.nz import N_BINS
from data.norm_stats import NormStats
from data.schema import FOM_PARAMS, PARAM_NAMES
from data.tiles import Tiles, empty_kappa

# backbone, nside, batch, steps an epoch, validation batches an epoch: a quarter, about as in a run
CASES: list[tuple[Backbone, int, int, int, int]] = [
    ("tiny", 128, 128, 8, 2),
    ("tiny", 256, 32, 8, 2),
    ("tiny", 512, 8, 8, 2),
    ("efficientnet_b0", 128, 64, 8, 2),
    ("efficientnet_v2_s", 128, 32, 8, 2),
]
TARGETS = {"tiny": "<= 1/0.95 = 1.053", "efficientnet_b0": "<= 1/0.97 = 1.031", "efficientnet_v2_s": "<= 1.031"}
WORKERS = 2


def random_tiles(n: int, nside: int) -> Tiles:
    """Tiles of white noise."""
    kappa = empty_kappa(n, N_BINS, nside)
    np.random.default_rng(0).standard_normal(out=kappa.transpose(0, 2, 3, 1), dtype=np.float32)
    return Tiles(kappa, np.zeros((n, 3), dtype=np.int64), np.random.default_rng(1).random((n, len(PARAM_NAMES))), 0, "")


class SingleTiles(Dataset[tuple[torch.Tensor, torch.Tensor]]):
    """The usual way: one tile at a time, turned, flipped and rolled by torch."""

    def __init__(self, dataset: TileDataset) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, position: int) -> tuple[torch.Tensor, torch.Tensor]:
        kappa, theta = self.dataset[position]  # (4, N, N), (2,)
        turns, flip, down, right = (int(torch.randint(n, ())) for n in (4, 2, kappa.shape[-1], kappa.shape[-1]))
        kappa = torch.rot90(kappa.flip(-1) if flip else kappa, turns, (-2, -1))
        return torch.roll(kappa, (down, right), (-2, -1)).contiguous(), theta


def measure(
    backbone: Backbone, nside: int, batch: int, n_steps: int, n_val: int, device: torch.device, precision: Precision
) -> Row:
    """One line of the table."""
    config = CompressorConfig(
        backbone=backbone,
        max_epochs=1,
        batch_size=batch,
        warmup_steps=10,
        device=device.type,
        precision=precision,
        checkpoint_seconds=float("inf"),
    )  # type: ignore[arg-type]
    dtype = pick_precision(precision, device, backbone)
    model = FieldLevelCompressor(backbone, dtype).to(device)
    tiles = random_tiles((n_steps + n_val) * batch, nside)
    stats = NormStats((0.0,) * 4, (1.0,) * 4, (0.5, 0.5), (1.0, 1.0))
    everything = whole_dataset(tiles, FOM_PARAMS, stats, device, dtype)
    train_rows, val_rows = np.split(np.arange(len(tiles.keys)), [n_steps * batch])
    train_ds, val_ds = (
        TileDataset(everything.source, everything.theta, rows, device) for rows in (train_rows, val_rows)
    )
    data = SimpleNamespace(
        compressor_train_ds=train_ds, npe_train_ds=val_ds, manifest=SimpleNamespace(sha256=""), norm_stats=stats
    )
    kappa = torch.randn(batch, N_BINS, nside, nside, device=device).to(memory_format=torch.channels_last)
    theta = torch.randn(batch, 2, device=device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)

    def step(kappa: torch.Tensor, theta: torch.Tensor) -> None:
        loss = functional.mse_loss(model(kappa), theta)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()

    def validate(batches: Callable[[], object]) -> None:
        model.eval()
        with torch.no_grad():
            for one in batches():  # type: ignore[attr-defined]
                model(one)

    def ours(folder: Path) -> None:
        fit(model, data, config, EarlyStopping(5, best_loss=0.0), LastCheckpoint(folder, {}, "best.ckpt", device))  # type: ignore[arg-type]

    def limit() -> None:
        model.train()
        for _ in range(n_steps):
            step(kappa, theta)
        validate(lambda: itertools.repeat(kappa, n_val))

    loader = DataLoader(
        SingleTiles(train_ds), batch, shuffle=True, num_workers=WORKERS, pin_memory=device.type == "cuda",
        persistent_workers=True, worker_init_fn=lambda _: torch.set_num_threads(1),
    )  # fmt: skip

    def usual() -> None:
        model.train()
        for one, of_it in loader:
            step(one.to(device, memory_format=torch.channels_last), of_it.to(device))
        validate(lambda: itertools.repeat(kappa, n_val))

    with tempfile.TemporaryDirectory() as folder:
        name = f"{backbone}, {nside} x {nside}, {str(dtype).removeprefix('torch.')}, batch {batch}"
        found = in_turns(
            {
                "ours": lambda: seconds(lambda: ours(Path(folder)), device),
                "limit": lambda: seconds(limit, device),
                "usual": lambda: seconds(usual, device),
            },
            name,
        )
    per_tile = {way: [1e3 * value / (n_steps * batch) for value in values] for way, values in found.items()}
    return Row(f"training step, {name}", "ms/tile", **per_tile, target=TARGETS[backbone])


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--backbone", default="", help="this one alone")
    parser.add_argument("--results-dir", type=Path, default=Path("build/bench"))
    options = parser.parse_args()
    device = pick_device(options.device)
    cases = [case for case in CASES if options.backbone in ("", case[0])]
    rows = [measure(*case, device, options.precision) for case in cases]
    report(rows, device, options.results_dir / "train_step.json")


if __name__ == "__main__":
    main()
