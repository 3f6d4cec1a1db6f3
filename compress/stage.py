"""Stage 1 from shards to result.json: read, train, evaluate, write."""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch

from common.artifacts import COMPRESSOR_RUNS, make_empty_folder, named_folder, tiles_folder
from common.board import Board
from common.device import check_compiler, name_of_dtype, pick_device
from common.errors import UserError, n_processes, warn
from common.lock import exclusive
from common.processes import Processes, joined
from common.results import write_result
from common.resume import LastCheckpoint, refuse_finished_run
from compress.config import CompressorConfig
from compress.evaluate import CompressorEvaluation, evaluate_compressor
from compress.memory import bytes_of_a_step
from compress.model import CHECKPOINT_NAME, FieldLevelCompressor, pick_precision
from compress.pictures import draw_loss_curves, draw_predictions
from compress.pretrained import Pretrained, read_pretrained
from compress.result import RESULT_NAME, CompressorResult
from compress.train import train
from data.dataset import n_batches
from data.module import SplitTiles, TileDataModule
from data.norm_stats import NormStats, write_norm_stats
from data.schema import A_IA, nside_of
from data.split import SplitManifest, write_manifest


def run_compressor(config: CompressorConfig, on_checkpoint: Callable[[], None] = lambda: None) -> CompressorResult:
    """Run stage 1.

    Args:
        config: all options.
        on_checkpoint: called after each file that must not be lost is written (Modal commits its Volume).

    Returns:
        the content of result.json.

    Raises:
        UserError: bad input, a finished run of the same tag, or a loss that is not finite.
    """
    folder = Path(config.results_dir, COMPRESSOR_RUNS, config.run_tag)
    device = pick_device(config.device)
    with joined(device) as processes, exclusive(folder) if processes.lead else nullcontext():
        _refuse_early(config, folder, device, processes)
        dtype = pick_precision(config.precision, device, config.backbone)
        pretrained = read_pretrained(config, device) if config.init_from else None
        fixed = {"precision": name_of_dtype(dtype), "init_from": pretrained.compressor.sha256 if pretrained else None}
        last = LastCheckpoint(folder, config, fixed, CHECKPOINT_NAME, device, on_checkpoint, processes)
        data = _read_one_after_the_other(config, device, dtype, pretrained, processes)
        data = pretrained.seen_with(data) if pretrained else data
        if processes.lead:
            if not last.can_resume(data.fingerprints):
                make_empty_folder(folder)
            write_manifest(folder, data.manifest)
            write_norm_stats(folder, data.norm_stats)

        torch.manual_seed(config.seed)  # initial weights and stochastic depth; all else draws from generators
        shape = data.tiles.n_bins, len(data.params)
        model = FieldLevelCompressor(config.backbone, *shape, dtype, config.loss).to(device)
        if pretrained:
            pretrained.give_weights(model)
        stopper = train(model, data, config, last)
        result: CompressorResult | None = None
        if processes.lead:
            evaluation = evaluate_compressor(config, data, stopper, last)
            _write(evaluation, data, folder, last.board)
            last.path.unlink(missing_ok=True)
            on_checkpoint()
            result = evaluation.result
        return processes.of_leader(result)


def _read_one_after_the_other(
    config: CompressorConfig,
    device: torch.device,
    dtype: torch.dtype,
    pretrained: Pretrained | None,
    processes: Processes,
) -> SplitTiles:
    """The tiles of every process: first the leader's, which writes the cache that all map, and says where they are."""
    norm_stats = pretrained.norm_stats if pretrained else None
    data = read_tiles(config, device, dtype, norm_stats=norm_stats) if processes.lead else None
    tiles_on = processes.of_leader(data.compressor_train_ds.tiles_on if data else None)
    return data or read_tiles(replace(config, tiles_on=tiles_on), device, dtype, norm_stats=norm_stats)


def _refuse_early(config: CompressorConfig, folder: Path, device: torch.device, processes: Processes) -> None:
    """Raise UserError for what would end the run later, or make it another than the user meant."""
    if processes.lead:
        refuse_finished_run(folder, RESULT_NAME, config.restart)
    if config.gpus not in (1, processes.size):
        cure = f"torchrun --standalone --nproc-per-node {config.gpus} run_compressor.py"
        raise UserError(f"--gpus is for modal run; here start {cure} with the other options")
    if config.batch_size < 2 * processes.size:
        raise UserError(f"--batch-size {config.batch_size} is less than two tiles for each process; give more")
    if config.init_from and Path(config.init_from).resolve().parent == folder.resolve():
        raise UserError(f"--init-from {config.init_from} is in the folder that this run writes; give another --tag")
    if config.compile:
        check_compiler(device)


def read_tiles(
    config: CompressorConfig,
    device: torch.device,
    dtype: torch.dtype,
    manifest: SplitManifest | None = None,
    norm_stats: NormStats | None = None,
) -> SplitTiles:
    """The tiles of a run, split and normalised anew or as given, after a look at what is wrong with them."""
    nside, training = nside_of(config.lmax, config.nside), manifest is None
    batch_size = -(-config.batch_size // n_processes())  # of one of them
    noiseless = config.noiseless_tiles
    data = TileDataModule(
        tiles_folder(config.tiles_dir, config.results_dir, config.lmax, config.noise_level, config.nuisance),
        config,
        config.theta_names,
        device=device,
        dtype=dtype,
        tiles_on=config.tiles_on,
        reserve=partial(bytes_of_a_step, config.backbone, dtype, batch_size, nside, training=training),
        noiseless_dir=named_folder(noiseless, config.lmax, config.noise_level, config.nuisance) if noiseless else None,
        manifest=manifest,
        norm_stats=norm_stats,
    ).setup()
    for warning in data.audit.warnings():
        warn(warning)
    if training and A_IA not in data.params and np.ptp(data.tiles.nuisances.get(A_IA, 0)):
        warn(f"the tiles vary {A_IA}, of which the summaries will say nothing: the FoM is lower; add it to --params")
    n_train = len(data.compressor_train_ds)
    n_steps = config.max_epochs * n_batches(n_train, config.batch_size)
    if training and (least := n_train // n_batches(n_train, config.batch_size)) < 2 * n_processes():
        found = f"--batch-size {config.batch_size} cuts {n_train} training tiles into batches of {least} or more"
        raise UserError(f"{found}, fewer than two for each process; give more")
    if training and n_steps <= config.warmup_steps:
        cure = "give fewer, a smaller --batch-size or more --max-epochs"
        warn(f"training ends after {n_steps} steps, within its --warmup-steps {config.warmup_steps}; {cure}")
    if len(data.fiducial_ds) == 0:
        warn(f"{data.tiles_dir} has no simulation {config.fiducial_sim_id}, the fiducial one: stage 2 will refuse it")
    return data


def _write(evaluation: CompressorEvaluation, data: SplitTiles, folder: Path, board: Board) -> None:
    """Pictures, then result.json: where it stands, the run is finished."""
    result, predicted = evaluation.result, evaluation.predicted
    loss = result.config["loss"]
    curves = {"train_loss": "training (augmented, with theta noise)", f"val_{loss}": "validation"}
    title = {"mse": "mean squared error", "nll": "negative log-likelihood"}[loss]
    title = f"Compressor: {title} of normalised theta"
    draw_loss_curves(folder, title, curves, result.best_epoch, log=loss == "mse")
    splits = {
        "training": (data.compressor_train_ds, predicted["train"]),
        "validation": (data.npe_train_ds, predicted["val"]),
    }
    draw_predictions(splits, data.params, data.norm_stats, folder / "predicted_vs_true.png")
    board.end(result.config, {"val_mse": result.val_mse, "test_mse": result.test_mse})
    write_result(folder / RESULT_NAME, result)
