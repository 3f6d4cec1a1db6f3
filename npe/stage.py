"""Stage 2 from a compressor's checkpoint to fom_result.json: read, train, evaluate, write."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from common.artifacts import COMPRESSOR_RUNS, NPE_RUNS, make_empty_folder, named_folder
from common.board import Board
from common.device import name_of_dtype, pick_device, seeded_generator
from common.errors import UserError, warn
from common.lock import exclusive
from common.options import flag_of, tag_suffix
from common.results import write_result
from common.resume import LastCheckpoint, refuse_finished_run
from compress.model import TrainedCompressor, load_compressor
from compress.pictures import draw_loss_curves
from compress.result import RESULT_NAME as COMPRESSOR_RESULT_NAME
from compress.stage import read_tiles
from data.cache import read_tiles_through_cache
from data.module import SplitTiles
from data.norm_stats import NORM_STATS_NAME, read_norm_stats
from data.shard_metadata import nuisance_priors_in
from data.split import MANIFEST_NAME, read_manifest, subset_of
from data.tiles import Tiles
from npe.compressed import CompressedTileDataModule
from npe.config import NPEConfig
from npe.evaluate import NPERun, evaluate_npe
from npe.model import CHECKPOINT_NAME
from npe.pictures import draw_calibration, draw_fom, draw_tiles
from npe.report import write_report
from npe.result import RESULT_NAME, FomResult
from npe.train import train

MIN_CALIBRATION_SIMS = 5  # so many know the scatter among them to a third


def run_npe(config: NPEConfig, on_checkpoint: Callable[[], None] = lambda: None) -> FomResult:
    """Run stage 2; `on_checkpoint` is called after each file that must not be lost (Modal commits its Volume).

    Raises:
        UserError: bad input, tiles that stage 1 did not see, no fiducial tiles, a finished run of the same
            tag, or a loss that is not finite.
    """
    device = pick_device(config.device)
    compressor = load_compressor(Path(config.ckpt), device, config.precision)
    _check_against(config, compressor)
    results_dir = config.results_dir or _results_dir_of(Path(config.ckpt).parent)
    folder = Path(results_dir, NPE_RUNS, config.tag or compressor.config.run_tag + tag_suffix(config))
    with exclusive(folder):
        refuse_finished_run(folder, RESULT_NAME, config.restart)
        fixed = {"precision": name_of_dtype(compressor.model.dtype), "compressor": compressor.sha256}
        last = LastCheckpoint(folder, config, fixed, CHECKPOINT_NAME, device, on_checkpoint)
        data = read_tiles_of(compressor, config, results_dir, device)
        fresh = read_calibration_tiles(config, data, compressor.seen, compressor.config.nuisance)
        if not last.can_resume(data.fingerprints):
            make_empty_folder(folder)

        augment = seeded_generator(config.seed, "npe augment")
        compressed = CompressedTileDataModule(data, compressor.model, augment)
        members = train(compressed, config, last)
        result, d2 = evaluate_npe(NPERun(config, compressor, data, compressed, fresh, last), members)
        _write(result, d2, data, folder, last.board)
        last.path.unlink(missing_ok=True)
        on_checkpoint()
    return result


def _results_dir_of(compressor_run: Path) -> Path:
    """The results folder of a stage-1 run, results/field_compressor_runs/{tag}."""
    for run in (compressor_run, compressor_run.resolve()):  # --ckpt best.ckpt may be given from inside the folder
        if run.parent.name == COMPRESSOR_RUNS:
            return run.parent.parent
    raise UserError(f"--ckpt does not lie in a {COMPRESSOR_RUNS} folder; say with --results-dir where to write")


def _check_against(config: NPEConfig, compressor: TrainedCompressor) -> None:
    if not Path(config.ckpt).with_name(COMPRESSOR_RESULT_NAME).exists():
        warn(f"the training of {config.ckpt} has not finished; give its command again, and then this one")
    for name in ("lmax", "noise_level", "nuisance"):
        given, found = getattr(config, name), getattr(compressor.config, name)
        if given not in (None, found):
            raise UserError(f"{flag_of(name)} {given}: {config.ckpt} was trained at {found}; give another --ckpt")


def read_tiles_of(
    compressor: TrainedCompressor, config: NPEConfig, results_dir: str | Path, device: torch.device
) -> SplitTiles:
    """The data set of stage 1, with its split and normalisation; --n-sims leaves tiles of two splits out.

    Raises:
        UserError: they are not those that the compressor was trained with, there are no fiducial tiles, or an
            --n-sims that stage 1's simulations do not allow.
    """
    compressor_run, stage_1 = Path(config.ckpt).parent, compressor.config
    manifest, norm_stats = read_manifest(compressor_run), read_norm_stats(compressor_run)
    for name, found, wanted in (
        (MANIFEST_NAME, manifest.sha256, compressor.manifest_sha256),
        (NORM_STATS_NAME, norm_stats.sha256, compressor.norm_stats_sha256),
    ):
        if found != wanted:
            raise UserError(f"{compressor_run / name} is not what the compressor was trained with; restore it")
    if len(manifest.splits["fiducial"]) == 0:
        raise UserError(
            f"{config.ckpt}: its tiles have no simulation {manifest.fiducial_sim_id}, so there is no fiducial FoM; "
            "run stage 1 again with another --fiducial-sim-id"
        )
    here = replace(
        stage_1,
        results_dir=str(results_dir),
        tiles_dir=config.tiles_dir or stage_1.tiles_dir,
        noiseless_tiles=config.noiseless_tiles or stage_1.noiseless_tiles,
        tiles_on=config.tiles_on,
        batch_size=config.batch_size,
    )
    return _with_subset(read_tiles(here, device, compressor.model.dtype, manifest, norm_stats), config.n_sims)


def _with_subset(data: SplitTiles, n_sims: int) -> SplitTiles:
    """The data set whose NPE and test splits have the tiles of n_sims simulations alone (0: all).

    Raises:
        UserError: more simulations than the compressor's, or so few that a split has no tile.
    """
    manifest = data.manifest
    sim_ids = subset_of(manifest.sim_ids, n_sims, manifest.seed, manifest.fiducial_sim_id)
    npe_train, test = data.npe_train_ds.of_sims(sim_ids), data.test_ds.of_sims(sim_ids)
    if not len(npe_train) or not len(test):
        empty = f"{len(npe_train)} tiles of the NPE split and {len(test)} of the test split"
        raise UserError(f"--n-sims {n_sims} leaves {empty}; give more")
    return replace(data, npe_train_ds=npe_train, test_ds=test)


def read_calibration_tiles(config: NPEConfig, data: SplitTiles, seen: np.ndarray, nuisance: str) -> Tiles | None:
    """The tiles of --calibration-tiles, which vary the same nuisances.

    Raises:
        UserError: bad shards, a cosmology among those that were seen (n, 8), or as check_calibration_tiles.
    """
    if not config.calibration_tiles:
        return None
    wanted = data.tiles.lmax, data.tiles.noise_level
    folder = named_folder(config.calibration_tiles, *wanted, nuisance)
    tiles, _ = read_tiles_through_cache(folder, *wanted, data.tiles.nside)
    if not set(map(tuple, seen.tolist())).isdisjoint(map(tuple, tiles.params.tolist())):
        raise UserError(
            f"--calibration-tiles {config.calibration_tiles} shares cosmologies with the training tiles; "
            "give independent simulations (python run_mock.py --fresh makes some)"
        )
    check_calibration_tiles(tiles, folder, data.tiles, data.tiles_dir)
    return tiles


def check_calibration_tiles(fresh: Tiles, folder: Path, tiles: Tiles, tiles_dir: Path) -> None:
    """Raise UserError for too few simulations, or others than the tiles of a run: bins, nuisances or their priors."""
    where = f"--calibration-tiles {folder}"
    if (n_sims := len(np.unique(fresh.keys[:, 0]))) < MIN_CALIBRATION_SIMS:
        found = f"{where} has tiles of {n_sims} simulations, too few for an error over simulations"
        raise UserError(f"{found}; give at least {MIN_CALIBRATION_SIMS}")
    if fresh.n_bins != tiles.n_bins:
        found = f"{where} has {fresh.n_bins} bins, the run's tiles have {tiles.n_bins}"
        raise UserError(f"{found}; give simulations of the same survey")
    if list(fresh.nuisances) != list(tiles.nuisances):
        theirs, ours = (", ".join(some.nuisances) or "no nuisances" for some in (fresh, tiles))
        cure = "give tiles that vary the same ({nuisance} in the name of the folder stands for the run's)"
        raise UserError(f"{where} varies {theirs}, the run's tiles vary {ours}; {cure}")
    if nuisance_priors_in(folder) != nuisance_priors_in(tiles_dir):
        raise UserError(f"{where} was made with other --nuisance-priors than {tiles_dir}; give tiles with the same")


def _write(result: FomResult, d2: np.ndarray, data: SplitTiles, folder: Path, board: Board) -> None:
    """Pictures and report, then fom_result.json: a run that has it is finished."""
    draw_fom(result, folder / "fom.png")
    draw_calibration(result.calibration, d2, folder / "calibration.png")
    curves = {"train_nll": "training (augmented)", "test_nll": "test split (early stopping)"}
    title = "Gaussian NPE: negative log-likelihood of normalised theta"
    draw_loss_curves(folder, title, curves, result.npe.best_epoch)
    draw_tiles(data, folder / "tiles.png")
    write_report(result, folder, Path(result.config["ckpt"]).parent)
    board.end(result.config, {"fom_fiducial_median": result.fom_fiducial_median, "test_nll": result.npe.best_test_nll})
    write_result(folder / RESULT_NAME, result)
