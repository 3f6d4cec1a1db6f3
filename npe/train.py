"""Stage 2: train the Gaussian NPE on the fly behind the frozen compressor, then the Figure of Merit."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from common.artifacts import (
    COMPRESSOR_RUNS,
    claimed,
    make_empty_folder,
    named_folder,
    npe_folder,
    refuse_finished_run,
    sealed,
    tiles_folder,
    write_json,
)
from common.device import describe_device, name_of_dtype, pick_device, seeded_generator
from common.errors import UserError, warn
from common.figures import draw_loss_curves
from common.progress import Progress
from common.resume import LastCheckpoint, Part, Position
from common.versions import versions
from compress.memory import bytes_of_a_step
from compress.model import TrainedCompressor, load_compressor
from data.cache import read_tiles_through_cache
from data.module import TileDataModule, batches, names_of_batch, whole_dataset
from data.norm_stats import NORM_STATS_NAME, read_norm_stats
from data.schema import THETA_NAMES, nside_of
from data.shards import Tiles
from data.split import MANIFEST_NAME, fingerprint_of, read_manifest
from npe.calibration import calibrate
from npe.compressed import CompressedTileDataModule, CompressedTileDataset, compress_all
from npe.config import NPEConfig
from npe.ensemble import Member, ensemble_to_json, make_members
from npe.fom import augmentation_shift, bootstrap_median, scatter
from npe.likeness import REFERENCE_NAME, Reference, look_at, save_reference
from npe.model import CHECKPOINT_NAME, GaussianNPE, Posterior, load_npe, predict_posterior, save_npe
from npe.pictures import draw_calibration, draw_fom, draw_tiles
from npe.report import write_report

RESULT_NAME = "fom_result.json"


def train_npe(config: NPEConfig, on_checkpoint: Callable[[], None] = lambda: None) -> dict[str, Any]:
    """Run stage 2 from a stage-1 checkpoint to fom_result.json.

    Args:
        config: all options.
        on_checkpoint: called after each file that must not be lost is written (Modal commits its Volume).

    Returns:
        the content of fom_result.json.

    Raises:
        UserError: bad input, tiles that stage 1 did not see, no fiducial tiles, a finished run of the same
            tag, or a loss that is not finite.
    """
    device = pick_device(config.device)
    compressor_run = Path(config.ckpt).parent
    trained = load_compressor(Path(config.ckpt), device, config.precision)
    _check_against(config, trained)
    results_dir = config.results_dir or _results_dir_of(compressor_run)
    folder = npe_folder(results_dir, config.tag or trained.config.run_tag)
    with claimed(folder):
        refuse_finished_run(folder, RESULT_NAME, config.restart)
        return _train(config, trained, compressor_run, results_dir, folder, device, on_checkpoint)


def _train(
    config: NPEConfig,
    trained: TrainedCompressor,
    compressor_run: Path,
    results_dir: str | Path,
    folder: Path,
    device: torch.device,
    on_checkpoint: Callable[[], None],
) -> dict[str, Any]:
    options = begun_with(config)
    options |= {"precision": name_of_dtype(trained.model.dtype), "compressor": trained.sha256}
    last = LastCheckpoint(
        folder,
        options,
        CHECKPOINT_NAME,
        device,
        restart=config.restart,
        seconds_between=config.checkpoint_seconds,
        on_saved=on_checkpoint,
    )
    data = _read_tiles(config, trained, compressor_run, results_dir, device)
    for warning in data.audit.warnings():
        warn(warning)
    fresh = _read_calibration_tiles(config, data)
    theta_std = np.array(data.norm_stats.theta_std)
    if not last.read_data(data.fingerprints):
        make_empty_folder(folder)

    augment = seeded_generator(config.seed, "npe augment")
    compressed = CompressedTileDataModule(data, trained.model, augment, config.n_views)
    compressor_checkpoint = f"{compressor_run.resolve().name}/{Path(config.ckpt).name}"
    members = fit(compressed, config, compressor_checkpoint, last, device)

    first = members[0].stopper
    npe, *others = load_npe(folder / CHECKPOINT_NAME, device)
    fiducial = _posterior_of(npe, compressed.fiducial_ds, data, config.batch_size)
    test = _posterior_of(npe, compressed.val_ds, data, config.batch_size)
    rng, calibration_rng = (np.random.default_rng([config.seed, purpose]) for purpose in (1, 2))
    if fresh is None:
        rows, calibration_name = data.test_ds.rows.numpy(), "the test split"
        calibration = calibrate(test, data.tiles.theta[rows], data.tiles.keys[rows, 0], calibration_rng)
    else:
        calibration_name = config.calibration_tiles
        fresh_tiles = whole_dataset(fresh, data.norm_stats, device, data.dtype, config.feed)
        fresh_ds = CompressedTileDataset(fresh_tiles, trained.model, config.n_views)
        posterior = _posterior_of(npe, fresh_ds, data, config.batch_size)
        calibration = calibrate(posterior, fresh.theta, fresh.keys[:, 0], calibration_rng)
    reference = _reference(CompressedTileDataset(data.npe_train_ds, trained.model, config.n_views), data, config)
    test_median = bootstrap_median(test.fom, data.manifest.splits["test"][:, 0], rng)
    assert data.audit.fiducial is not None  # _read_tiles refuses a data set without fiducial tiles
    fiducial_median = bootstrap_median(fiducial.fom, np.array(data.audit.fiducial.patch_of_tile), rng)
    result = {
        "lmax": trained.config.lmax,
        "noise_level": trained.config.noise_level,
        "fom_fiducial_median": float(np.median(fiducial.fom)),
        "fom_fiducial_std": scatter(fiducial.fom),
        "fom_fiducial_all": fiducial.fom.tolist(),
        "fom_test_median": float(np.median(test.fom)),
        "fom_test_lo_16": float(np.percentile(test_median, 16)),
        "fom_test_hi_84": float(np.percentile(test_median, 84)),
        "compressor_checkpoint": compressor_checkpoint,
        "fiducial": {
            "sim_id": data.manifest.fiducial_sim_id,
            "theta": list(THETA_NAMES),
            "theta_true": data.tiles.theta[data.fiducial_ds.rows[0]].tolist(),
            "mu": fiducial.mu.tolist(),
            "cov": fiducial.cov.tolist(),
            "fom_min": float(fiducial.fom.min()),
            "fom_max": float(fiducial.fom.max()),
            "n_patches": data.audit.fiducial.n_patches,
            "fom_median_lo_16": float(np.percentile(fiducial_median, 16)),
            "fom_median_hi_84": float(np.percentile(fiducial_median, 84)),
        },
        "npe": {
            "epochs": last.position.epoch,
            "best_epoch": first.best_epoch,
            "best_test_nll": first.best_loss,
            "stopped": "early stopping" if first.should_stop() else "max_epochs",
            "n_train_tiles": len(compressed.train_ds),
            "n_test_tiles": len(compressed.val_ds),
        },
        "ensemble": ensemble_to_json(
            [fiducial] + [_posterior_of(other, compressed.fiducial_ds, data, config.batch_size) for other in others]
        ),
        "calibration": {
            "tiles": calibration_name,
            "optimistic": fresh is None,
            **calibration.to_json(float(np.median(fiducial.fom))),
        },
        "augmentation_shift_in_sigma": augmentation_shift(
            compressed.val_ds,
            test,
            theta_std,
            config.batch_size,
            seeded_generator(config.seed, "npe augmentation shift"),
        ),
        "audit": data.audit.to_json(),
        "compressor": {
            "sha256": trained.sha256,
            "val_mse": trained.val_mse,
            "epoch": trained.epoch,
            "config": asdict(trained.config),
        },
        "reference_sha256": save_reference(folder / REFERENCE_NAME, reference),
        "manifest_sha256": data.manifest.sha256,
        "fingerprints": data.fingerprints | {"calibration_tiles": None if fresh is None else fingerprint_of(fresh)},
        "folder": str(folder),
        "elapsed_s": round(last.elapsed_s(), 1),
        "device": describe_device(device),
        "precision": name_of_dtype(trained.model.dtype),
        "versions": versions(),
        "config": asdict(config),
    }
    result = sealed(result)
    draw_fom(fiducial, np.array(result["fiducial"]["theta_true"]), result, folder / "fom.png")
    draw_calibration(calibration, calibration_name, folder / "calibration.png")
    draw_loss_curves(
        last.metrics,
        folder / "loss_curves.png",
        "Gaussian NPE",
        "negative log-likelihood of normalised theta",
        train=("train_nll", "training (augmented)"),
        validation=("test_nll", "test split (early stopping)"),
        best_epoch=first.best_epoch,
        log=False,
    )
    draw_tiles(data, folder / "tiles.png")
    write_report(result, folder, compressor_run)
    write_json(folder / RESULT_NAME, result)
    last.path.unlink(missing_ok=True)
    on_checkpoint()
    return result


def fit(
    compressed: CompressedTileDataModule,
    config: NPEConfig,
    compressor_checkpoint: str,
    last: LastCheckpoint,
    device: torch.device,
) -> list[Member]:
    """The training loop; writes npe_best.ckpt, last.ckpt and metrics.jsonl (the first member's losses).

    AdamW treats every weight by itself, so members that share an optimiser and the sum of their losses learn
    exactly what each would learn alone. The loop ends when the last of them has stopped. Goes on from last.ckpt if
    there is one.
    """
    members = make_members(config.n_members, config.seed, config.patience, device)
    parameters = [p for member in members for p in member.npe.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=config.learning_rate, weight_decay=config.weight_decay, fused=True)
    augment = compressed.train_ds.tiles.augment
    assert augment is not None
    parts: dict[str, Part] = {"optimizer": optimizer} | {f"member {k}": member for k, member in enumerate(members)}
    at = last.restore(parts, {"augment": augment})
    with Progress("training the NPE", config.max_epochs, "epochs") as progress, last.saved_when_interrupted():
        progress.advance(at.epoch)
        val_summary, val_theta = compress_all(compressed.val_ds, config.batch_size)  # never augmented: once is enough
        while at.epoch < config.max_epochs and not all(member.stopper.should_stop() for member in members):
            epoch_start = time.monotonic()
            for summary, theta in batches(
                compressed.train_ds, config.batch_size, _shuffle(config, at.epoch), first=at.batch
            ):
                nll = torch.stack([member.npe.nll(summary, theta).mean() for member in members])  # (n_members,)
                optimizer.zero_grad(set_to_none=True)
                nll.sum().backward()
                optimizer.step()
                at.next_batch(nll)
                last.save_if_due()

            with torch.no_grad():
                test_nll = torch.stack([member.npe.nll(val_summary, val_theta).mean() for member in members]).cpu()
            train_nll = torch.stack(at.losses).mean(dim=0).cpu()  # (n_batches, n_members) -> (n_members,)
            if not (train_nll + test_nll).isfinite().all():
                raise UserError(_not_finite(at, compressed, config))
            better = [member.judge(loss, at.epoch) for member, loss in zip(members, test_nll.tolist(), strict=True)]
            if any(better):
                best = members[0].stopper
                weights = [member.best for member in members]
                save_npe(last.best, weights, config, compressor_checkpoint, best.best_epoch, best.best_loss)
            metrics = {
                "epoch": at.epoch,
                "train_nll": float(train_nll[0]),
                "test_nll": float(test_nll[0]),
                "seconds": round(time.monotonic() - epoch_start, 3),
            }
            last.end_epoch(metrics)
            progress.advance(1, f"test_nll {test_nll[0]:.4f}, best {members[0].stopper.best_loss:.4f}")
    return members


def _shuffle(config: NPEConfig, epoch: int) -> torch.Generator:
    return seeded_generator(config.seed, f"npe shuffle {epoch}")


def _not_finite(at: Position, compressed: CompressedTileDataModule, config: NPEConfig) -> str:
    """What to say of an epoch with a loss that is not finite."""
    bad = ~torch.stack(at.losses).isfinite().all(dim=1)  # (n_batches,)
    cure = "try --restart with a lower --learning-rate"
    if not bad.any():
        return f"the NPE loss on the test split is not finite in epoch {at.epoch}; {cure}"
    batch = int(bad.int().argmax())
    names = names_of_batch(compressed.train_ds.tiles, config.batch_size, _shuffle(config, at.epoch), batch)
    return (
        f"the NPE loss is not finite in epoch {at.epoch}, batch {batch}; {cure}, and look at the batch's tiles "
        f"(sim/orientation/tile): {names}"
    )


def _posterior_of(npe: GaussianNPE, dataset: CompressedTileDataset, data: TileDataModule, batch_size: int) -> Posterior:
    summary, _ = compress_all(dataset, batch_size)
    return predict_posterior(npe, summary, data.norm_stats)


def _reference(dataset: CompressedTileDataset, data: TileDataModule, config: NPEConfig) -> Reference:
    """What the tiles look like that the NPE learnt from, for run_predict.py."""
    summary, spectra = look_at(dataset, data.lmax, config.batch_size)
    rows = dataset.tiles.rows.numpy()
    return Reference(summary, spectra, data.tiles.theta[rows], data.tiles.keys[rows, 0])


def _read_calibration_tiles(config: NPEConfig, data: TileDataModule) -> Tiles | None:
    """The tiles of --calibration-tiles.

    Raises:
        UserError: bad shards, or simulations that this run was trained on.
    """
    if not config.calibration_tiles:
        return None
    folder = named_folder(config.calibration_tiles, data.lmax, data.noise_level)
    tiles, _ = read_tiles_through_cache(folder, data.lmax, data.noise_level, data.nside)
    seen = set(map(tuple, data.tiles.params.tolist()))
    if any(tuple(row) in seen for row in tiles.params.tolist()):
        raise UserError(
            f"{config.calibration_tiles} shares cosmologies with the training tiles; "
            "give independent simulations as --calibration-tiles (python run_mock.py --fresh makes such)"
        )
    return tiles


def _results_dir_of(compressor_run: Path) -> Path:
    """The results folder that a stage-1 run lies in: results/field_compressor_runs/{tag}.

    Raises:
        UserError: the checkpoint lies elsewhere.
    """
    parent = compressor_run.parent
    if parent.name != COMPRESSOR_RUNS:
        parent = compressor_run.resolve().parent  # --ckpt best.ckpt, given from inside the folder
    if parent.name != COMPRESSOR_RUNS:
        raise UserError(f"--ckpt does not lie in a {COMPRESSOR_RUNS} folder; say with --results-dir where to write")
    return parent.parent


def _check_against(config: NPEConfig, trained: TrainedCompressor) -> None:
    for name in ("lmax", "noise_level"):
        wanted, found = getattr(config, name), getattr(trained.config, name)
        if wanted is not None and wanted != found:
            flag = "--" + name.replace("_", "-")
            raise UserError(
                f"{flag} {wanted}, but {config.ckpt} was trained at {found}; leave {flag} out or give another --ckpt"
            )


def _read_tiles(
    config: NPEConfig, trained: TrainedCompressor, compressor_run: Path, results_dir: str | Path, device: torch.device
) -> TileDataModule:
    """The data set of stage 1, with its split and normalisation."""
    manifest = read_manifest(compressor_run)
    if manifest.sha256 != trained.manifest_sha256:
        raise UserError(
            f"{compressor_run / MANIFEST_NAME} is not the split that {config.ckpt} was trained with; "
            "restore it or run stage 1 again"
        )
    norm_stats = read_norm_stats(compressor_run)
    if norm_stats.sha256 != trained.norm_stats_sha256:
        raise UserError(
            f"{compressor_run / NORM_STATS_NAME} is not what {config.ckpt} was trained with; "
            "restore it or run stage 1 again"
        )
    if len(manifest.splits["fiducial"]) == 0:
        raise UserError(
            f"the data set of {config.ckpt} has no simulation {manifest.fiducial_sim_id}, so there is no fiducial FoM; "
            "add it to the tiles, or choose another with --fiducial-sim-id, and run stage 1 again"
        )
    folder = tiles_folder(
        config.tiles_dir or trained.config.tiles_dir, results_dir, manifest.lmax, manifest.noise_level
    )
    noiseless_tiles = config.noiseless_tiles or trained.config.noiseless_tiles
    data = TileDataModule(
        folder,
        manifest.lmax,
        manifest.noise_level,
        manifest.fiducial_sim_id,
        nside=trained.config.nside,
        geometry=trained.config.geometry,
        split_seed=manifest.seed,
        split_by=manifest.split_by,
        device=device,
        dtype=trained.model.dtype,
        feed=config.feed,
        reserve=bytes_of_a_step(
            trained.config.backbone,
            trained.model.dtype,
            config.batch_size,
            nside_of(manifest.lmax, trained.config.nside),
            training=False,
        ),
        noiseless_dir=named_folder(noiseless_tiles, manifest.lmax, manifest.noise_level) if noiseless_tiles else None,
        manifest=manifest,
        norm_stats=norm_stats,
    )
    data.setup()
    return data
