"""Stage 1: train the compressor on tiles, keep the weights with the lowest validation loss."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.optim.swa_utils import get_ema_multi_avg_fn

from common.artifacts import (
    claimed,
    compressor_folder,
    make_empty_folder,
    named_folder,
    refuse_finished_run,
    sealed,
    tiles_folder,
    write_json,
)
from common.device import describe_device, name_of_dtype, pick_device, pick_precision, seeded_generator
from common.early_stopping import EarlyStopping
from common.errors import UserError, warn
from common.figures import draw_loss_curves
from common.progress import Progress
from common.resume import LastCheckpoint, Part, Position
from common.schedule import ema_decay_at, lr_at
from common.versions import versions
from compress.config import CompressorConfig
from compress.memory import bytes_of_a_step
from compress.model import CHECKPOINT_NAME, FieldLevelCompressor, load_compressor, save_compressor
from compress.pictures import draw_predictions
from data.module import TileDataModule, TileDataset, batches, n_batches, names_of_batch
from data.norm_stats import write_norm_stats
from data.schema import nside_of
from data.split import write_manifest

RESULT_NAME = "result.json"


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
    folder = compressor_folder(config.results_dir, config.run_tag)
    with claimed(folder):
        refuse_finished_run(folder, RESULT_NAME, config.restart)
        return _train(config, folder, on_checkpoint)


def _train(config: CompressorConfig, folder: Path, on_checkpoint: Callable[[], None]) -> dict[str, Any]:
    device = pick_device(config.device)
    dtype = pick_precision(config.precision, device, config.backbone)
    last = LastCheckpoint(
        folder,
        begun_with(config) | {"precision": name_of_dtype(dtype)},
        CHECKPOINT_NAME,
        device,
        restart=config.restart,
        seconds_between=config.checkpoint_seconds,
        on_saved=on_checkpoint,
    )
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
        dtype=dtype,
        feed=config.feed,
        reserve=bytes_of_a_step(
            config.backbone, dtype, config.batch_size, nside_of(config.lmax, config.nside), training=True
        ),
        noiseless_dir=named_folder(config.noiseless_tiles, config.lmax, config.noise_level)
        if config.noiseless_tiles
        else None,
    )
    data.setup()
    for warning in data.audit.warnings():
        warn(warning)
    if len(data.fiducial_ds) == 0:
        warn(f"{tiles_dir} has no simulation {config.fiducial_sim_id}: stage 2 will find no fiducial tiles and refuse")
    if not last.read_data(data.fingerprints):
        make_empty_folder(folder)
        write_manifest(folder, data.manifest)
        write_norm_stats(folder, data.norm_stats)

    torch.manual_seed(config.seed)  # initial weights and stochastic depth; all else draws from generators
    model = FieldLevelCompressor(config.backbone, dtype).to(device)
    stopper = EarlyStopping(config.patience)
    fit(model, data, config, stopper, last)

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
        "epochs": last.position.epoch,
        "best_epoch": stopper.best_epoch,
        "stopped": "early stopping" if stopper.should_stop() else "max_epochs",
        "elapsed_s": round(last.elapsed_s(), 1),
        "n_tiles": {name: len(dataset) for name, dataset in splits.items()} | {"fiducial": len(data.fiducial_ds)},
        "n_parameters": sum(p.numel() for p in model.parameters()),
        "audit": data.audit.to_json(),
        "manifest_sha256": data.manifest.sha256,
        "folder": str(folder),
        "tiles_dir": str(tiles_dir),
        "fingerprints": data.fingerprints,
        "device": describe_device(device),
        "precision": name_of_dtype(model.dtype),
        "versions": versions(),
        "config": asdict(config),
    }
    result = sealed(result)
    draw_loss_curves(
        last.metrics,
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
    last.path.unlink(missing_ok=True)
    on_checkpoint()
    return result


def fit(
    model: FieldLevelCompressor,
    data: TileDataModule,
    config: CompressorConfig,
    stopper: EarlyStopping,
    last: LastCheckpoint,
) -> None:
    """The training loop; writes best.ckpt, last.ckpt and metrics.jsonl. Goes on from last.ckpt if there is one.

    With --ema-decay, what is validated and saved is a moving average of weights and BatchNorm statistics: after every
    step average <- d average + (1 - d) weights, with d from ema_decay_at.
    """
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay, fused=True
    )
    average = copy.deepcopy(model).requires_grad_(False) if config.ema_decay else None
    judged = model if average is None else average
    augment, theta_noise = (seeded_generator(config.seed, f"compressor {name}") for name in ("augment", "theta noise"))
    train_ds = data.compressor_train_ds.augmented(augment, (config.theta_noise, theta_noise))
    steps_per_epoch = n_batches(len(train_ds), config.batch_size)
    schedule = partial(
        lr_at,
        steps_per_epoch=steps_per_epoch,
        peak=config.learning_rate,
        warmup_steps=config.warmup_steps,
        decay_factor=config.decay_factor,
        decay_epochs=config.decay_epochs,
    )
    hashes = {"manifest_sha256": data.manifest.sha256, "norm_stats_sha256": data.norm_stats.sha256}
    parts: dict[str, Part] = {"model": model, "optimizer": optimizer, "stopper": stopper}
    if average is not None:
        parts["average"] = average
    at = last.restore(parts, {"augment": augment, "theta noise": theta_noise})
    n_steps = config.max_epochs * steps_per_epoch
    with Progress("training the compressor", n_steps, "steps") as progress, last.saved_when_interrupted():
        step = at.epoch * steps_per_epoch + at.batch
        progress.advance(step)
        while at.epoch < config.max_epochs and not stopper.should_stop():
            epoch_start = time.monotonic()
            model.train()
            for kappa, theta in batches(train_ds, config.batch_size, _shuffle(config, at.epoch), first=at.batch):
                optimizer.param_groups[0]["lr"] = schedule(step)
                loss = functional.mse_loss(model(kappa), theta)
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()
                if average is not None:
                    move_average(average, model, ema_decay_at(step, config.ema_decay) if step else 0.0)
                step += 1
                at.next_batch(loss)
                last.save_if_due()
                progress.advance()

            train_loss = _finite_mean(at, data, config, last.best)
            if config.norm_tiles:
                renew_batch_norm(judged, data.compressor_train_ds, config)
            val_mse = mean_squared_error(judged, data.npe_train_ds, config.batch_size)
            if stopper.update(val_mse, at.epoch):
                save_compressor(last.best, judged, config, hashes, at.epoch, val_mse)
            metrics = {
                "epoch": at.epoch,
                "train_loss": train_loss,
                "val_mse": val_mse,
                "lr": optimizer.param_groups[0]["lr"],
                "seconds": round(time.monotonic() - epoch_start, 3),
            }
            last.end_epoch(metrics)
            progress.advance(0, f"epoch {metrics['epoch']}, val_mse {val_mse:.4f}, best {stopper.best_loss:.4f}")


@torch.no_grad()
def move_average(average: nn.Module, model: nn.Module, decay: float) -> None:
    """average <- decay average + (1 - decay) model, of all weights and BatchNorm statistics.

    torch's AveragedModel does the same, but has its GPU wait for a counter on the CPU at every step.
    """
    of_average, of_model = (list(m.state_dict().values()) for m in (average, model))
    for floating in (True, False):  # counters of batches are whole numbers
        some = [i for i, tensor in enumerate(of_average) if tensor.is_floating_point() == floating]
        if some:
            get_ema_multi_avg_fn(decay)([of_average[i] for i in some], [of_model[i] for i in some], 0)


def _shuffle(config: CompressorConfig, epoch: int) -> torch.Generator:
    return seeded_generator(config.seed, f"compressor shuffle {epoch}")


def _finite_mean(at: Position, data: TileDataModule, config: CompressorConfig, best: Path) -> float:
    """Mean loss of an epoch, looked at once per epoch so that a GPU never waits for Python.

    Raises:
        UserError: a loss was NaN or infinite; names the tiles of the first such batch.
    """
    losses = torch.stack(at.losses)
    if not (finite := losses.isfinite()).all():
        batch, shuffle = int((~finite).int().argmax()), _shuffle(config, at.epoch)
        names = names_of_batch(data.compressor_train_ds, config.batch_size, shuffle, batch)
        raise UserError(
            f"the loss became {float(losses[batch])} in epoch {at.epoch}, batch {batch}; the best weights so far, if "
            f"any, are in {best}; try --restart with a lower --learning-rate or longer --warmup-steps, and look at "
            f"the batch's tiles (sim/orientation/tile): {names}"
        )
    return float(losses.mean())


@torch.no_grad()
def renew_batch_norm(model: FieldLevelCompressor, dataset: TileDataset, config: CompressorConfig) -> None:
    """Put the mean statistics of --norm-tiles tiles in the place of BatchNorm's running ones.

    Those are of a few batches of rolled tiles, which have a seam that no tile has that is judged. It takes the same
    tiles every time, and drops no layer, so that nothing is drawn at random.
    """
    layers = [module for module in model.modules() if isinstance(module, torch.nn.modules.batchnorm._BatchNorm)]
    momenta = [layer.momentum for layer in layers]
    model.eval()
    for layer in layers:
        layer.train()
        layer.reset_running_stats()
        layer.momentum = None  # the plain mean over batches
    some = batches(dataset, config.batch_size, seeded_generator(config.seed, "compressor norm tiles"))
    for kappa, _ in islice(some, n_batches(config.norm_tiles, config.batch_size)):
        model(kappa)
    for layer, momentum in zip(layers, momenta, strict=True):
        layer.momentum = momentum


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
