"""Stage 1, the training loop: keep the weights with the lowest validation loss."""

import copy
import time
from functools import partial
from pathlib import Path

import torch
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from common.device import seeded_generator
from common.early_stopping import EarlyStopping
from common.errors import UserError
from common.progress import Progress
from common.resume import LastCheckpoint, Part, Position
from compress.config import CompressorConfig
from compress.evaluate import validate
from compress.model import FieldLevelCompressor, save_compressor
from compress.schedule import ema_decay_at, lr_at
from data.dataset import batch_positions, batches, first_bad_batch
from data.module import SplitTiles


def train(
    model: FieldLevelCompressor, data: SplitTiles, config: CompressorConfig, last: LastCheckpoint
) -> EarlyStopping:
    """Train; write best.ckpt, last.ckpt and metrics.jsonl; resume from last.ckpt if there is one."""
    processes = last.processes
    learner = processes.learner(model, last.device, config.compile)  # the same weights, with means of their gradients
    decay = config.weight_decay
    optimizer = torch.optim.AdamW(model.parameters(), config.learning_rate, weight_decay=decay, fused=True)
    average = copy.deepcopy(model).requires_grad_(False) if config.ema_decay else None
    evaluated = model if average is None else average
    stopper = EarlyStopping(config.patience)
    augment, theta_noise = (seeded_generator(config.seed, f"compressor {name}") for name in ("augment", "theta noise"))
    train_ds = data.compressor_train_ds.augmented(augment, (config.theta_noise, theta_noise)).shared(processes)
    weights = [processes.weight(len(batch)) for batch in batch_positions(len(train_ds), config.batch_size, None)]
    learning_rate, steps_per_epoch = _schedule(config, len(weights)), len(weights)
    parts: dict[str, Part] = {"model": model, "optimizer": optimizer, "stopper": stopper}
    parts |= {} if average is None else {"average": average}
    at = last.restore(parts, {"augment": augment, "theta noise": theta_noise})
    n_steps, step = config.max_epochs * steps_per_epoch, at.epoch * steps_per_epoch + at.batch

    with Progress("training the compressor", n_steps, "steps") as progress, last.saved_when_interrupted():
        progress.advance(step)
        while at.epoch < config.max_epochs and not stopper.should_stop():
            epoch_start = time.monotonic()
            model.train()
            for kappa, theta in batches(train_ds, config.batch_size, _shuffle(config, at.epoch), first=at.batch):
                optimizer.param_groups[0]["lr"] = learning_rate(step)
                loss = model.loss(learner(kappa), theta) * weights[at.batch]
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()
                if average is not None:
                    move_average(average, model, ema_decay_at(step, config.ema_decay) if step else 0.0)
                step += 1
                at.next_batch(processes.mean_of(loss))
                last.save_if_due()
                progress.advance()
                processes.check()

            train_loss = _finite_mean(at, data, config, last.best)
            val_loss = validate(evaluated, data, config, processes)
            if stopper.update(val_loss, at.epoch) and processes.lead:
                save_compressor(last.best, evaluated, config, data.provenance, at.epoch, val_loss)
            metrics = {"epoch": at.epoch, "train_loss": train_loss, f"val_{config.loss}": val_loss}
            metrics |= {"lr": optimizer.param_groups[0]["lr"], "seconds": round(time.monotonic() - epoch_start, 3)}
            last.end_epoch(metrics)
            progress.advance(
                0, f"epoch {metrics['epoch']}, val_{config.loss} {val_loss:.4f}, best {stopper.best_loss:.4f}"
            )
    return stopper


def _schedule(config: CompressorConfig, steps_per_epoch: int) -> partial[float]:
    return partial(
        lr_at,
        steps_per_epoch=steps_per_epoch,
        peak=config.learning_rate,
        warmup_steps=config.warmup_steps,
        decay_factor=config.decay_factor,
        decay_epochs=config.decay_epochs,
    )


def _shuffle(config: CompressorConfig, epoch: int) -> torch.Generator:
    return seeded_generator(config.seed, f"compressor shuffle {epoch}")


@torch.no_grad()
def move_average(average: nn.Module, model: nn.Module, decay: float) -> None:
    """average <- decay average + (1 - decay) model, of all weights and BatchNorm statistics.

    torch's AveragedModel does the same, but lets the GPU wait for a counter on the CPU at every step.
    """
    of_average, of_model = (list(m.state_dict().values()) for m in (average, model))
    for floating in (True, False):  # counters of batches are whole numbers
        some = [i for i, tensor in enumerate(of_average) if tensor.is_floating_point() == floating]
        if some:
            get_ema_multi_avg_fn(decay)([of_average[i] for i in some], [of_model[i] for i in some], 0)


def _finite_mean(at: Position, data: SplitTiles, config: CompressorConfig, best: Path) -> float:
    """Mean loss of an epoch, looked at once per epoch so that a GPU never waits for Python.

    Raises:
        UserError: a loss was NaN or infinite; names the tiles of the first such batch.
    """
    if bad := first_bad_batch(at.losses, data.compressor_train_ds, config.batch_size, _shuffle(config, at.epoch)):
        batch, names = bad
        raise UserError(
            f"the loss became {float(at.losses[batch])} in epoch {at.epoch}, batch {batch}; the best weights so far, "
            f"if any, are in {best}; try --restart with a lower --learning-rate or longer --warmup-steps, and look at "
            f"the batch's tiles (sim/orientation/tile): {names}"
        )
    return float(torch.stack(at.losses).mean())
