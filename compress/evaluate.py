"""Evaluation of a compressor: what trained weights and data give."""

import math
from dataclasses import asdict, dataclass
from itertools import islice

import torch
from torch.nn.modules.batchnorm import _BatchNorm

from common.device import describe_device, name_of_dtype, seeded_generator
from common.early_stopping import EarlyStopping
from common.errors import UserError
from common.processes import ALONE, Processes
from common.resume import LastCheckpoint
from common.versions import versions
from compress.config import CompressorConfig
from compress.model import FieldLevelCompressor, load_compressor
from compress.result import CompressorResult
from data.dataset import TileDataset, batches, n_batches
from data.module import SplitTiles


@torch.no_grad()
def predict(model: FieldLevelCompressor, dataset: TileDataset, batch_size: int) -> torch.Tensor:
    """Summaries of all tiles of a data set, in evaluation mode: (n, n_params) on the CPU, normalised units."""
    model.eval()
    return torch.cat([model(kappa).cpu() for kappa, _ in batches(dataset, batch_size)])


def validate(
    model: FieldLevelCompressor, data: SplitTiles, config: CompressorConfig, processes: Processes = ALONE
) -> float:
    """The validation loss of a model whose BatchNorm gets the statistics that it will be used with."""
    processes.mean(buffer for buffer in model.buffers() if buffer.is_floating_point())
    if config.norm_tiles:
        renew_batch_norm(model, data.compressor_train_ds, config, processes)
    return validation_loss(model, data.npe_train_ds, config.batch_size, processes)


@torch.no_grad()
def validation_loss(
    model: FieldLevelCompressor, dataset: TileDataset, batch_size: int, processes: Processes = ALONE
) -> float:
    """The model's loss over all tiles, normalised units, in evaluation mode; UserError if it is not finite."""
    model.eval()
    total = torch.zeros((), device=dataset.device)
    for kappa, theta in batches(dataset.shared(processes), batch_size):
        total += model.loss(model(kappa), theta, reduction="sum")
        processes.check()
    processes.mean([total])
    loss = float(total) * processes.size / (len(dataset) * model.loss.terms_per_tile)
    if not math.isfinite(loss):
        raise UserError("the validation loss is not finite; try a lower --learning-rate or longer --warmup-steps")
    return loss


@torch.no_grad()
def renew_batch_norm(
    model: FieldLevelCompressor, dataset: TileDataset, config: CompressorConfig, processes: Processes = ALONE
) -> None:
    """Replace BatchNorm's running statistics by the mean ones of --norm-tiles tiles, not augmented.

    The running ones come from the last batches, whose tiles are rolled and so have a seam that no other tile has. The
    tiles are the same every time, and no layer is dropped, so that nothing is drawn at random.
    """
    layers = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    momenta = [layer.momentum for layer in layers]
    model.eval()
    for layer in layers:
        layer.train()
        layer.reset_running_stats()
        layer.momentum = None  # the plain mean over batches
    some = batches(dataset, config.batch_size, seeded_generator(config.seed, "compressor norm tiles"))
    for kappa, _ in islice(some, n_batches(config.norm_tiles, config.batch_size)):
        model(kappa)
        processes.check()
    for layer, momentum in zip(layers, momenta, strict=True):
        layer.momentum = momentum


@dataclass(frozen=True)
class CompressorEvaluation:
    """A result, and what its pictures show: for training and validation the summaries (n, n_params), normalised."""

    result: CompressorResult
    predicted: dict[str, torch.Tensor]


def evaluate_compressor(
    config: CompressorConfig, data: SplitTiles, stopper: EarlyStopping, last: LastCheckpoint
) -> CompressorEvaluation:
    """Evaluate the best weights of a training that has ended, on tiles that are not augmented."""
    model = load_compressor(last.best, last.device, config.precision).model
    splits = {"train": data.compressor_train_ds, "val": data.npe_train_ds, "test": data.test_ds}
    predicted = {name: predict(model, dataset, config.batch_size) for name, dataset in splits.items()}
    mse = {
        f"{name}_mse": float((predicted[name] - dataset.theta[dataset.rows]).square().mean())
        for name, dataset in splits.items()
    }
    nll: dict[str, float | None] = dict.fromkeys(splits)
    if config.loss == "nll":
        model.loss.cpu().requires_grad_(False)
        nll = {name: float(model.loss(predicted[name], ds.theta[ds.rows])) for name, ds in splits.items()}
    result = CompressorResult(
        lmax=config.lmax,
        noise_level=config.noise_level,
        backbone=config.backbone,
        **mse,
        train_nll=nll["train"],
        val_nll=nll["val"],
        test_nll=nll["test"],
        epochs=last.position.epoch,
        best_epoch=stopper.best_epoch,
        stopped="early stopping" if stopper.should_stop() else "max_epochs",
        elapsed_s=round(last.elapsed_s(), 1),
        init_from=last.data["init_from"],
        n_tiles={name: len(dataset) for name, dataset in splits.items()} | {"fiducial": len(data.fiducial_ds)},
        n_parameters=sum(p.numel() for p in model.parameters()),
        audit=data.audit,
        manifest_sha256=data.manifest.sha256,
        folder=str(last.path.parent),
        tiles_dir=str(data.tiles_dir),
        fingerprints=data.fingerprints,
        device=describe_device(last.device),
        precision=name_of_dtype(model.dtype),
        versions=versions(),
        config=asdict(config),
    )
    return CompressorEvaluation(result, predicted)
