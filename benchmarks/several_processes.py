"""Two processes of one thread against one of two, training a network: `python benchmarks/several_processes.py`.

ours    compress.train.train in two processes with half of each batch, their gradients averaged by gloo
limit   the same loop in one process with two threads

The same global batch, started by PyTorch's launcher. Milliseconds per training tile of the last of EPOCHS epochs,
validation included. Both always run on the CPU.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np
import torch

from benchmarks.measure import ROUNDS, Row, in_turns, report
from benchmarks.train_step import CASES, random_dataset, rows_of
from common.processes import joined, start_together
from common.resume import LastCheckpoint
from compress.config import CompressorConfig
from compress.model import CHECKPOINT_NAME, FieldLevelCompressor
from compress.train import train
from data.mock.nz import N_BINS
from data.schema import FOM_PARAMS

CASE = CASES[0]
EPOCHS = 3  # the first is slower
CPU = torch.device("cpu")


def per_tile(n_threads: int) -> float:
    """Train in this process, alone or together with others; milliseconds per tile of the last epoch."""
    torch.set_num_threads(n_threads)
    n_train, n_val = (n * CASE.batch_size for n in (CASE.n_steps, CASE.n_val))
    tiles = random_dataset(n_train + n_val, CASE.nside, CPU, torch.float32)
    train_ds, val_ds = (rows_of(tiles, rows) for rows in np.split(np.arange(n_train + n_val), [n_train]))
    data: Any = SimpleNamespace(compressor_train_ds=train_ds, npe_train_ds=val_ds, provenance={})
    config = CompressorConfig(
        backbone=CASE.backbone,
        max_epochs=EPOCHS,
        batch_size=CASE.batch_size,
        warmup_steps=10,
        norm_tiles=0,
        checkpoint_seconds=1e9,
    )
    with tempfile.TemporaryDirectory() as folder, patch("compress.train.save_compressor"), joined(CPU) as processes:
        torch.manual_seed(0)
        model = FieldLevelCompressor(CASE.backbone, N_BINS, len(FOM_PARAMS))
        last = LastCheckpoint(Path(folder), config, {}, CHECKPOINT_NAME, CPU, processes=processes)
        train(model, data, config, last)
        return 1e3 * float(last.position.metrics[-1]["seconds"]) / n_train


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results-dir", type=Path, default=Path("build/bench"))
    options = parser.parse_args()
    what = f"two processes against one, {CASE.backbone}, {CASE.nside} x {CASE.nside}, batch {CASE.batch_size}"
    ways = {"ours": lambda: start_together(2, per_tile, 1), "limit": lambda: start_together(1, per_tile, 2)}
    row = Row(what, "ms/tile", **in_turns(ways, what, ROUNDS))
    report([row], CPU, options.results_dir / "several_processes.json")


if __name__ == "__main__":
    main()
