"""Stage 1: train the compressor on tiles, keep the weights with the lowest validation loss."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch.nn import functional
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from common.artifacts import compressor_folder, make_empty_folder, refuse_finished_run, tiles_folder, write_json
from common.config import CompressorConfig
from common.device import describe_device, pick_device, pick_precision, seeded_generator, versions
from common.early_stopping import EarlyStopping
from common.errors import UserError, warn
from common.figures import draw_loss_curves
from common.progress import Progress, append_metrics
from common.schedule import ema_decay_at, lr_at
from compress.model import CHECKPOINT_NAME, FieldLevelCompressor, load_compressor, save_compressor
from compress.pictures import draw_predictions
from data.module import TileDataModule, TileDataset, batches, n_batches
from data.norm_stats import write_norm_stats
from data.split import write_manifest

RESULT_NAME, METRICS_NAME = "result.json", "metrics.jsonl"


def train_compressor(config: CompressorConfig, on_checkpoint: Callable[[], None] = lambda: None) -> dict[str, Any]:
    """Run stage 1 from shards to result.json.

    Args:
        config: all options.
        on_checkpoint: called after each file that must not be lost is written (Modal commits its Volume).

    Returns:
        the content of result.json.

    Raises:
        UserError: bad input, a finished run of the same tag, or a loss that is not finite.
    """
    start = time.monotonic()
    folder = compressor_folder(config.results_dir, config.run_tag)
    refuse_finished_run(folder, RESULT_NAME, config.restart)
    device = pick_device(config.device)
    torch.manual_seed(config.seed)  # initial weights and stochastic depth; all else draws from generators
    model = FieldLevelCompressor(config.backbone, pick_precision(config.precision, device)).to(device)
    tiles_dir = tiles_folder(config.tiles_dir, config.results_dir, config.lmax, config.noise_level)
    data = TileDataModule(
        tiles_dir,
        config.lmax,
        config.noise_level,
        config.fiducial_sim_id,
        nside=config.nside,
        geometry=config.geometry,
        split_seed=config.split_seed,
        split_by=config.split_by,
        device=device,
        dtype=model.dtype,
        feed=config.feed,
        noiseless_dir=Path(config.noiseless_tiles) if config.noiseless_tiles else None,
    )
    data.setup()
    for warning in data.audit.warnings():
        warn(warning)
    if len(data.fiducial_ds) == 0:
        warn(f"{tiles_dir} has no simulation {config.fiducial_sim_id}: stage 2 will find no fiducial tiles and refuse")
    make_empty_folder(folder)
    write_manifest(folder, data.manifest)
    write_norm_stats(folder, data.norm_stats)

    stopper = EarlyStopping(config.patience)
    epochs = fit(model, data, config, stopper, folder, on_checkpoint)

    model = load_compressor(folder / CHECKPOINT_NAME, device, config.precision).model
    splits = {"train": data.compressor_train_ds, "val": data.npe_train_ds, "test": data.test_ds}
    predicted = {name: predict(model, dataset, config.batch_size) for name, dataset in splits.items()}
    mse = {
        f"{name}_mse": float((p - splits[name].theta[splits[name].rows]).square().mean())
        for name, p in predicted.items()
    }
    result = {
        "lmax": config.lmax,
        "noise_level": config.noise_level,
        "backbone": config.backbone,
        **mse,
        "epochs": epochs,
        "best_epoch": stopper.best_epoch,
        "stopped": "early stopping" if stopper.should_stop() else "max_epochs",
        "elapsed_s": round(time.monotonic() - start, 1),
        "n_tiles": {name: len(dataset) for name, dataset in splits.items()} | {"fiducial": len(data.fiducial_ds)},
        "n_parameters": sum(p.numel() for p in model.parameters()),
        "audit": data.audit.to_json(),
        "manifest_sha256": data.manifest.sha256,
        "folder": str(folder),
        "tiles_dir": str(tiles_dir),
        "device": describe_device(device),
        "precision": str(model.dtype).removeprefix("torch."),
        "versions": versions(),
        "config": asdict(config),
    }
    draw_loss_curves(
        folder / METRICS_NAME,
        folder / "loss_curves.png",
        "Compressor",
        "mean squared error of normalised theta",
        train=("train_loss", "training (augmented, with theta noise)"),
        validation=("val_mse", "validation"),
        best_epoch=stopper.best_epoch,
        log=True,
    )
    draw_predictions(
        {
            "training": (data.compressor_train_ds, predicted["train"]),
            "validation": (data.npe_train_ds, predicted["val"]),
        },
        data.norm_stats,
        folder / "predicted_vs_true.png",
    )
    write_json(folder / RESULT_NAME, result)
    on_checkpoint()
    return result


def fit(
    model: FieldLevelCompressor,
    data: TileDataModule,
    config: CompressorConfig,
    stopper: EarlyStopping,
    folder: Path,
    on_checkpoint: Callable[[], None],
) -> int:
    """The training loop; writes best.ckpt and metrics.jsonl. Returns the number of epochs that were run.

    With --ema-decay, what is validated and saved is a moving average of weights and BatchNorm statistics: after every
    step average <- d average + (1 - d) weights, with d from ema_decay_at.
    """
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay, fused=True
    )
    shuffle, augment, theta_noise = (
        seeded_generator(config.seed, f"compressor {purpose}") for purpose in ("shuffle", "augment", "theta noise")
    )
    train_ds = data.compressor_train_ds.augmented(augment)
    steps_per_epoch = n_batches(len(train_ds), config.batch_size)
    schedule = partial(
        lr_at,
        steps_per_epoch=steps_per_epoch,
        peak=config.learning_rate,
        warmup_steps=config.warmup_steps,
        decay_factor=config.decay_factor,
        decay_epochs=config.decay_epochs,
    )
    average = AveragedModel(model, use_buffers=True)
    judged = cast(FieldLevelCompressor, average.module) if config.ema_decay else model
    step, epoch = 0, 0
    with Progress("training the compressor", config.max_epochs * steps_per_epoch, "steps") as progress:
        for epoch in range(config.max_epochs):
            epoch_start = time.monotonic()
            model.train()
            losses = []
            for kappa, theta in batches(train_ds, config.batch_size, shuffle):
                optimizer.param_groups[0]["lr"] = lr = schedule(step)
                noise = config.theta_noise * torch.randn(theta.shape, generator=theta_noise)
                loss = functional.mse_loss(model(kappa), theta + noise.to(theta.device))
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()
                if config.ema_decay:
                    average.multi_avg_fn = get_ema_multi_avg_fn(ema_decay_at(step, config.ema_decay))
                    average.update_parameters(model)
                losses.append(loss.detach())
                step += 1
                progress.advance()

            train_loss = _finite_mean(losses, epoch, folder)
            val_mse = mean_squared_error(judged, data.npe_train_ds, config.batch_size)
            if stopper.update(val_mse, epoch):
                save_compressor(folder / CHECKPOINT_NAME, judged, config, data.manifest.sha256, epoch, val_mse)
                on_checkpoint()
            seconds = round(time.monotonic() - epoch_start, 3)
            append_metrics(
                folder / METRICS_NAME,
                {"epoch": epoch, "train_loss": train_loss, "val_mse": val_mse, "lr": lr, "seconds": seconds},
            )
            progress.advance(0, f"epoch {epoch}, val_mse {val_mse:.4f}, best {stopper.best_loss:.4f}")
            if stopper.should_stop():
                break
    return epoch + 1


def _finite_mean(losses: list[torch.Tensor], epoch: int, folder: Path) -> float:
    """Mean loss of an epoch, looked at once per epoch so that a GPU never waits for Python.

    Raises:
        UserError: a loss was NaN or infinite.
    """
    values = torch.stack(losses)
    if not (finite := values.isfinite()).all():
        batch = int((~finite).int().argmax())
        raise UserError(
            f"the loss became {float(values[batch])} in epoch {epoch}, batch {batch}; "
            f"the best weights so far, if any, are in {folder}; try a lower --learning-rate or longer --warmup-steps"
        )
    return float(values.mean())


@torch.no_grad()
def predict(model: FieldLevelCompressor, dataset: TileDataset, batch_size: int) -> torch.Tensor:
    """Summaries of a data set as it is, in evaluation mode: (n, 2) on the CPU, normalised units."""
    model.eval()
    return torch.cat([model(kappa).cpu() for kappa, _ in batches(dataset, batch_size)])


@torch.no_grad()
def mean_squared_error(model: FieldLevelCompressor, dataset: TileDataset, batch_size: int) -> float:
    """Mean squared error over tiles and both parameters, normalised units, evaluation mode."""
    model.eval()
    total = sum(
        functional.mse_loss(model(kappa), theta, reduction="sum") for kappa, theta in batches(dataset, batch_size)
    )
    mse = float(total) / (len(dataset) * dataset.theta.shape[1])
    if not math.isfinite(mse):
        raise UserError("the validation loss is not finite; try a lower --learning-rate or longer --warmup-steps")
    return mse
