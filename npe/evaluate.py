"""Evaluation of stage 2: trained weights and data become the Figure of Merit and its evidence."""

from dataclasses import asdict, dataclass

import numpy as np

from common.artifacts import named_folder
from common.device import describe_device, name_of_dtype, seeded_generator
from common.resume import LastCheckpoint
from common.versions import versions
from compress.model import TrainedCompressor
from data.dataset import whole_dataset
from data.module import SplitTiles
from data.shard_metadata import nuisance_priors_in
from data.split import fingerprint_of
from data.tiles import Tiles
from npe.calibration import calibrate, recalibrate, squared_distances
from npe.compressed import CompressedTileDataModule, CompressedTileDataset, compress_all
from npe.config import NPEConfig
from npe.ensemble import Member, compare
from npe.fom import augmentation_shift, bootstrap_median, scatter
from npe.model import GaussianNPE, Posterior, load_npe, predict_posterior
from npe.ood import REFERENCE_NAME, Reference, look_at, save_reference
from npe.result import Calibration, CompressorUsed, FiducialTiles, FomResult, NPETraining


@dataclass(frozen=True)
class NPERun:
    """What a run of stage 2 has read, and where it is saved."""

    config: NPEConfig
    compressor: TrainedCompressor
    data: SplitTiles
    compressed: CompressedTileDataModule  # the tiles of `data` as the compressor sees them
    fresh: Tiles | None  # independent simulations to check the calibration on; None for the test split
    last: LastCheckpoint

    def posterior(self, npe: GaussianNPE, dataset: CompressedTileDataset) -> Posterior:
        """Posteriors of a data set's tiles, in physical units."""
        summary, _ = compress_all(dataset, self.config.batch_size)
        return predict_posterior(npe, summary, self.data.params, self.data.norm_stats)


def evaluate_npe(run: NPERun, members: list[Member]) -> tuple[FomResult, np.ndarray]:
    """Evaluate the best weights of a training that has ended; writes reference.npz.

    Returns:
        the result, and for its picture d2 (n,) of the tiles that the calibration was checked on.
    """
    config, compressor, data, last = run.config, run.compressor, run.data, run.last
    npes = load_npe(last.best, len(data.params), last.device)
    fiducial, *of_others = (run.posterior(npe, run.compressed.fiducial_ds) for npe in npes)
    test = run.posterior(npes[0], run.compressed.val_ds)
    rng, calibration_rng = (np.random.default_rng([config.seed, purpose]) for purpose in (1, 2))
    median = float(np.median(fiducial.fom))
    calibration, d2 = _calibration(run, npes[0], test, calibration_rng, median)
    test_lo, test_hi = _interval(test.fom, data.tiles.keys[data.test_ds.rows, 0], rng)
    shift_generator = seeded_generator(config.seed, "npe augmentation shift")
    theta_std = np.array(data.norm_stats.theta_std)
    result = FomResult(
        lmax=data.tiles.lmax,
        noise_level=compressor.config.noise_level,
        fom_fiducial_median=median,
        fom_fiducial_std=scatter(fiducial.fom),
        fom_fiducial_all=fiducial.fom.tolist(),
        fom_test_median=float(np.median(test.fom)),
        fom_test_lo_16=test_lo,
        fom_test_hi_84=test_hi,
        compressor_checkpoint=config.compressor_checkpoint,
        nuisance=compressor.config.nuisance,
        nuisance_priors=nuisance_priors_in(data.tiles_dir),
        fiducial=_fiducial(fiducial, data, rng),
        npe=_training(run, members[0]),
        ensemble=compare([fiducial, *of_others]),
        calibration=calibration,
        recalibrated=recalibrate(fiducial, calibration),
        augmentation_shift_in_sigma=augmentation_shift(
            run.compressed.val_ds, test, theta_std, config.batch_size, shift_generator
        ),
        audit=data.audit,
        compressor=CompressorUsed(compressor.sha256, compressor.val_loss, compressor.epoch, asdict(compressor.config)),
        reference_sha256=save_reference(last.path.with_name(REFERENCE_NAME), _reference(run)),
        manifest_sha256=data.manifest.sha256,
        fingerprints=data.fingerprints | {"calibration_tiles": fingerprint_of(run.fresh) if run.fresh else None},
        folder=str(last.path.parent),
        elapsed_s=round(last.elapsed_s(), 1),
        device=describe_device(last.device),
        precision=name_of_dtype(compressor.model.dtype),
        versions=versions(),
        config=asdict(config),
    )
    return result, d2


def _interval(fom: np.ndarray, group: np.ndarray, rng: np.random.Generator) -> list[float]:
    """The 68 % interval of the median of FoMs (n,), bootstrapped over groups (n,)."""
    return np.percentile(bootstrap_median(fom, group, rng), [16, 84]).tolist()


def _calibration(
    run: NPERun, npe: GaussianNPE, test: Posterior, rng: np.random.Generator, fom: float
) -> tuple[Calibration, np.ndarray]:
    """The calibration on the test split or on fresh simulations, and d2 (n,) of its tiles."""
    data, model, fresh = run.data, run.compressor.model, run.fresh
    if fresh is None:
        posterior, name, rows = test, "the test split", data.test_ds.rows.numpy()
        theta, sim_id = data.theta[rows], data.tiles.keys[rows, 0]
    else:
        dataset = whole_dataset(fresh, data.params, data.norm_stats, run.last.device, model.dtype, run.config.tiles_on)
        posterior = run.posterior(npe, CompressedTileDataset(dataset, model))
        about = data.tiles.lmax, data.tiles.noise_level, run.compressor.config.nuisance
        name = str(named_folder(run.config.calibration_tiles, *about))
        theta, sim_id = fresh.columns(data.params), fresh.keys[:, 0]
    calibration = calibrate(posterior, theta, sim_id, rng, fom=fom, tiles=name, optimistic=fresh is None)
    return calibration, squared_distances(posterior, theta)


def _fiducial(posterior: Posterior, data: SplitTiles, rng: np.random.Generator) -> FiducialTiles:
    assert data.audit.fiducial is not None  # stage 2 refuses a data set without fiducial tiles
    lo, hi = _interval(posterior.fom, np.array(data.audit.fiducial.patch_of_tile), rng)
    return FiducialTiles(
        sim_id=data.manifest.fiducial_sim_id,
        theta=list(data.params),
        theta_true=data.theta[data.fiducial_ds.rows[0]].tolist(),
        mu=posterior.mu.tolist(),
        cov=posterior.cov.tolist(),
        fom_min=float(posterior.fom.min()),
        fom_max=float(posterior.fom.max()),
        n_patches=data.audit.fiducial.n_patches,
        fom_median_lo_16=lo,
        fom_median_hi_84=hi,
    )


def _training(run: NPERun, first: Member) -> NPETraining:
    return NPETraining(
        epochs=run.last.position.epoch,
        best_epoch=first.stopper.best_epoch,
        best_test_nll=first.stopper.best_loss,
        stopped="early stopping" if first.stopper.should_stop() else "max_epochs",
        n_train_tiles=len(run.compressed.train_ds),
        n_test_tiles=len(run.compressed.val_ds),
    )


def _reference(run: NPERun) -> Reference:
    """What an ordinary tile looks like, for run_predict.py."""
    data, dataset = run.data, run.data.npe_train_ds
    rows = dataset.rows.numpy()
    summary, spectra = look_at(
        CompressedTileDataset(dataset, run.compressor.model), data.tiles.lmax, run.config.batch_size
    )
    return Reference(summary, spectra, data.theta[rows], data.tiles.keys[rows, 0])
