"""Evaluation of stage 2: trained weights and data become the Figure of Merit and its evidence."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from common.device import describe_device, name_of_dtype, seeded_generator
from common.early_stopping import EarlyStopping
from common.resume import LastCheckpoint
from common.versions import versions
from compress.model import TrainedCompressor
from data.dataset import whole_dataset
from data.module import SplitTiles
from data.schema import columns_of
from data.split import fingerprint_of
from data.tiles import Tiles
from npe.calibration import calibrate, squared_distances
from npe.compressed import CompressedTileDataModule, CompressedTileDataset, compress_all
from npe.config import NPEConfig
from npe.ensemble import Member, compare
from npe.fom import augmentation_shift, bootstrap_median, scatter
from npe.model import GaussianNPE, Posterior, load_npe, predict_posterior
from npe.ood import REFERENCE_NAME, Reference, look_at, save_reference
from npe.result import Calibration, CompressorUsed, FiducialTiles, FomResult, NPETraining


@dataclass(frozen=True)
class FomEvaluation:
    """A result, and what its pictures show besides: d2 (n,) of the tiles that the calibration was checked on."""

    result: FomResult
    d2: np.ndarray


@dataclass(frozen=True)
class _Trained:
    """What the evaluation starts from: the first member, the other members, and what they read."""

    npe: GaussianNPE
    others: list[GaussianNPE]
    data: SplitTiles
    compressed: CompressedTileDataModule
    compressor: TrainedCompressor
    config: NPEConfig

    def posterior(self, npe: GaussianNPE, dataset: CompressedTileDataset) -> Posterior:
        """Posteriors of a data set's tiles, in physical units."""
        summary, _ = compress_all(dataset, self.config.batch_size)
        return predict_posterior(npe, summary, self.data.params, self.data.norm_stats)


def evaluate_npe(
    config: NPEConfig,
    compressor: TrainedCompressor,
    data: SplitTiles,
    fresh: Tiles | None,
    compressed: CompressedTileDataModule,
    members: list[Member],
    last: LastCheckpoint,
) -> FomEvaluation:
    """Evaluate the best weights of a training that has ended; writes reference.npz.

    Args:
        config: all options.
        compressor: frozen.
        data, compressed: the tiles of the run, as they are and through the compressor.
        fresh: independent simulations to check the calibration on; None for the test split.
        members: as the training has left them.
        last: of the training.
    """
    npe, *others = load_npe(last.best, len(data.params), last.device)
    trained = _Trained(npe, others, data, compressed, compressor, config)
    fiducial, test = (trained.posterior(npe, dataset) for dataset in (compressed.fiducial_ds, compressed.val_ds))
    rng, calibration_rng = (np.random.default_rng([config.seed, purpose]) for purpose in (1, 2))
    median = float(np.median(fiducial.fom))
    calibration, d2 = _calibration(trained, test, fresh, calibration_rng, median)
    reference = _reference(trained)
    test_median = bootstrap_median(test.fom, data.tiles.keys[data.test_ds.rows, 0], rng)
    result = FomResult(
        lmax=data.lmax,
        noise_level=compressor.config.noise_level,
        fom_fiducial_median=median,
        fom_fiducial_std=scatter(fiducial.fom),
        fom_fiducial_all=fiducial.fom.tolist(),
        fom_test_median=float(np.median(test.fom)),
        fom_test_lo_16=float(np.percentile(test_median, 16)),
        fom_test_hi_84=float(np.percentile(test_median, 84)),
        compressor_checkpoint=checkpoint_name(config),
        fiducial=_fiducial(fiducial, data, rng),
        npe=_training(members[0].stopper, last, compressed),
        ensemble=compare([fiducial, *(trained.posterior(other, compressed.fiducial_ds) for other in others)]),
        calibration=calibration,
        augmentation_shift_in_sigma=augmentation_shift(
            compressed.val_ds,
            test,
            np.array(data.norm_stats.theta_std),
            config.batch_size,
            seeded_generator(config.seed, "npe augmentation shift"),
        ),
        audit=data.audit,
        compressor=CompressorUsed(compressor.sha256, compressor.val_mse, compressor.epoch, asdict(compressor.config)),
        reference_sha256=save_reference(last.path.with_name(REFERENCE_NAME), reference),
        manifest_sha256=data.manifest.sha256,
        fingerprints=data.fingerprints | {"calibration_tiles": None if fresh is None else fingerprint_of(fresh)},
        folder=str(last.path.parent),
        elapsed_s=round(last.elapsed_s(), 1),
        device=describe_device(last.device),
        precision=name_of_dtype(compressor.model.dtype),
        versions=versions(),
        config=asdict(config),
    )
    return FomEvaluation(result, d2)


def checkpoint_name(config: NPEConfig) -> str:
    """The compressor's checkpoint as results name it: {tag}/best.ckpt."""
    return f"{Path(config.ckpt).parent.resolve().name}/{Path(config.ckpt).name}"


def _calibration(
    trained: _Trained, test: Posterior, fresh: Tiles | None, rng: np.random.Generator, fom: float
) -> tuple[Calibration, np.ndarray]:
    """The calibration on the test split or on fresh simulations, and d2 (n,) of its tiles."""
    data, config = trained.data, trained.config
    if fresh is None:
        posterior, name, rows = test, "the test split", data.test_ds.rows.numpy()
        theta, sim_id = data.theta[rows], data.tiles.keys[rows, 0]
    else:
        device, dtype = data.test_ds.device, trained.compressor.model.dtype
        dataset = whole_dataset(fresh, data.params, data.norm_stats, device, dtype, config.tiles_on)
        posterior = trained.posterior(trained.npe, CompressedTileDataset(dataset, trained.compressor.model))
        name, theta, sim_id = config.calibration_tiles, columns_of(fresh.params, data.params), fresh.keys[:, 0]
    calibration = calibrate(posterior, theta, sim_id, rng, fom=fom, tiles=name, optimistic=fresh is None)
    return calibration, squared_distances(posterior, theta)


def _fiducial(posterior: Posterior, data: SplitTiles, rng: np.random.Generator) -> FiducialTiles:
    assert data.audit.fiducial is not None  # stage 2 refuses a data set without fiducial tiles
    median = bootstrap_median(posterior.fom, np.array(data.audit.fiducial.patch_of_tile), rng)
    return FiducialTiles(
        sim_id=data.manifest.fiducial_sim_id,
        theta=list(data.params),
        theta_true=data.theta[data.fiducial_ds.rows[0]].tolist(),
        mu=posterior.mu.tolist(),
        cov=posterior.cov.tolist(),
        fom_min=float(posterior.fom.min()),
        fom_max=float(posterior.fom.max()),
        n_patches=data.audit.fiducial.n_patches,
        fom_median_lo_16=float(np.percentile(median, 16)),
        fom_median_hi_84=float(np.percentile(median, 84)),
    )


def _training(first: EarlyStopping, last: LastCheckpoint, compressed: CompressedTileDataModule) -> NPETraining:
    return NPETraining(
        epochs=last.position.epoch,
        best_epoch=first.best_epoch,
        best_test_nll=first.best_loss,
        stopped="early stopping" if first.should_stop() else "max_epochs",
        n_train_tiles=len(compressed.train_ds),
        n_test_tiles=len(compressed.val_ds),
    )


def _reference(trained: _Trained) -> Reference:
    """What an ordinary tile looks like, for run_predict.py."""
    data, dataset = trained.data, trained.data.npe_train_ds
    rows = dataset.rows.numpy()
    compressed = CompressedTileDataset(dataset, trained.compressor.model)
    summary, spectra = look_at(compressed, data.lmax, trained.config.batch_size)
    return Reference(summary, spectra, data.theta[rows], data.tiles.keys[rows, 0])
