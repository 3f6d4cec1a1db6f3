"""Both stages over several lmax, seeds or numbers of simulations: a run for every point, and the curve through them."""

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from common.artifacts import (
    COMPRESSOR_RUNS,
    NONE,
    NPE_RUNS,
    SWEEPS,
    named_folder,
    sha256_of_file,
    tiles_folder,
    write_json,
)
from common.errors import UserError, say
from common.lock import exclusive
from common.options import difference, identity
from common.results import read_result
from common.versions import COMMIT, versions
from compress.config import CompressorConfig
from compress.model import CHECKPOINT_NAME, load_compressor
from compress.result import RESULT_NAME as COMPRESSOR_RESULT_NAME
from compress.result import CompressorResult
from compress.stage import run_compressor
from data.cache import read_tiles_through_cache
from data.config import nuisance_list
from data.nuisance import check_varied
from data.schema import NOISELESS
from data.split import fingerprint_of, subset_of
from npe.config import NPEConfig, SweepConfig, SweepRun
from npe.ensemble import compare
from npe.fom import scatter
from npe.learning_curve import learning_curves
from npe.pictures import draw_curve, draw_learning_curves
from npe.result import RESULT_NAME, CurvePoint, FomResult, LearningCurves, SweepResult, read_fom_result
from npe.stage import check_calibration_tiles, run_npe

Result = TypeVar("Result")
CPU = torch.device("cpu")
CURVE_NAME, LEARNING_CURVE_NAME = "fom_vs_lmax.json", "learning_curve.json"  # their pictures are *.png


def run_sweep(
    config: SweepConfig, on_checkpoint: Callable[[], None] = lambda: None
) -> SweepResult | LearningCurves | FomResult | list[str]:
    """Every point, one after the other, and the curve; or with --point one of them, with --dry-run its commands.

    Raises:
        UserError: no point succeeded.
    """
    if config.dry_run:
        return config.commands
    if config.point:
        return both_stages(config.runs[config.point - 1], on_checkpoint)
    with exclusive(Path(config.results_dir, SWEEPS, config.name)):
        outcomes = []
        for number, run in enumerate(config.runs, 1):
            say(f"point {number} of {len(config.runs)}: {run.tag}")
            outcomes.append(run_point(run, on_checkpoint))
        return _curve(config, outcomes, on_checkpoint)


def sweep_side_by_side(
    config: SweepConfig,
    on_checkpoint: Callable[[], None],
    run_all: Callable[[str, Sequence[Any]], Iterator[FomResult | Exception]],
) -> SweepResult | LearningCurves:
    """The same, each point of a round in a container of its own (common/command.py has run_all)."""
    if config.dry_run or config.point:
        raise UserError("--dry-run and --point are for a cluster; on Modal all points run side by side without them")
    outcomes = [outcome for runs in config.rounds for outcome in run_all("npe.sweep.run_point", runs)]
    return _curve(config, outcomes, on_checkpoint)


def run_point(run: SweepRun, on_checkpoint: Callable[[], None] = lambda: None) -> FomResult | Exception:
    """The result of a point, or what went wrong, which does not stop the others."""
    try:
        return both_stages(run, on_checkpoint)
    except Exception as error:
        say(f"error: {run.tag}: {_in_words(error)}")
        return error


def both_stages(run: SweepRun, on_checkpoint: Callable[[], None] = lambda: None) -> FomResult:
    """Both stages of one point, or stage 2 alone. A finished stage is kept, and an interrupted one resumes."""
    compressor, folder = run.compressor(), Path(run.sweep.results_dir, COMPRESSOR_RUNS, run.compressor_tag)
    _refuse_early(run, compressor)
    stage_1 = _read(_stage_1, folder / COMPRESSOR_RESULT_NAME, compressor.restart)
    if stage_1 is None or not _is_kept(stage_1, compressor, compressor):
        if run.stage_2_alone:  # its siblings would train the same one
            raise UserError(f"it needs stage 1 of {run.compressor_tag}, which has not finished or failed")
        run_compressor(compressor, on_checkpoint)
    npe, folder = run.npe(str(folder / CHECKPOINT_NAME)), Path(run.sweep.results_dir, NPE_RUNS, run.tag)
    done = _read(read_fom_result, folder / RESULT_NAME, npe.restart)
    if done and done.compressor.sha256 == sha256_of_file(Path(npe.ckpt)) and _is_kept(done, npe, compressor):
        return done
    # --restart, because the folder may hold a run of a compressor that stage 1 has replaced.
    return run_npe(replace(npe, restart=True), on_checkpoint)


def _refuse_early(run: SweepRun, compressor: CompressorConfig) -> None:
    """Raise UserError, before stage 1 takes its time, for tiles that would stop stage 2 or another point."""
    sweep, nuisance = run.sweep, compressor.nuisance
    size = compressor.lmax, compressor.noise_level, compressor.nside
    folder = tiles_folder(compressor.tiles_dir, sweep.results_dir, compressor.lmax, compressor.noise_level, nuisance)
    tiles, _ = read_tiles_through_cache(folder, *size)
    check_varied(tiles.nuisances, tiles.n_bins, nuisance, folder)
    bare = tiles_folder(compressor.tiles_dir, sweep.results_dir, compressor.lmax, compressor.noise_level, NONE)
    if nuisance != NONE and NONE in nuisance_list(sweep.nuisance) and any(bare.glob("shard_*.parquet")):
        others, _ = read_tiles_through_cache(bare, *size)
        if not np.array_equal(tiles.params, others.params):
            found = f"{folder} has other simulations than {bare}, so their FoMs do not compare"
            raise UserError(f"{found}; make both with the same --n-sims and --seed")
    if run.n_sims:
        subset_of(tiles.keys[:, 0], sweep.numbers[-1], compressor.split_seed, compressor.fiducial_sim_id)
    if text := run.npe("").calibration_tiles:
        fresh = named_folder(text, compressor.lmax, compressor.noise_level, nuisance)
        check_calibration_tiles(read_tiles_through_cache(fresh, *size)[0], fresh, tiles, folder)


def _stage_1(folder: Path) -> CompressorResult:
    """The result of a stage-1 run whose checkpoint can be used."""
    load_compressor(folder / CHECKPOINT_NAME, CPU, "float32")
    return read_result(folder / COMPRESSOR_RESULT_NAME, CompressorResult, "stage 1")


def _read(read: Callable[[Path], Result], path: Path, restart: bool) -> Result | None:
    """The result of a run; None if there is none, or if it is damaged and --restart replaces it."""
    try:
        return read(path.parent) if path.exists() else None
    except UserError:
        if not restart:
            raise
        return None


def _in_words(error: Exception) -> str:
    return str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"


def _is_kept(
    result: CompressorResult | FomResult, config: CompressorConfig | NPEConfig, compressor: CompressorConfig
) -> bool:
    """Whether a result has the same options and data, and with --restart the same code.

    Raises:
        UserError: the options or the data are others, and not --restart.
    """
    differs = difference(identity(type(config), result.config), identity(type(config), asdict(config)))
    start = {"init_from": result.init_from} if isinstance(result, CompressorResult) else {}
    differs = differs or difference(result.fingerprints | start, _fingerprints(config, compressor))
    if differs and not config.restart:
        cure = "give the same, --restart in the quotes, or another --name"
        raise UserError(f"{result.folder} was made from others ({differs}); {cure}")
    return not differs and (not config.restart or result.versions.get("commit") == COMMIT)


def _fingerprints(config: CompressorConfig | NPEConfig, compressor: CompressorConfig) -> dict[str, str | None]:
    """Of the tiles that a stage would read now, and of the weights that it would start from, as its result has them."""
    lmax, level, nuisance = compressor.lmax, compressor.noise_level, compressor.nuisance
    tiles = tiles_folder(config.tiles_dir or compressor.tiles_dir, config.results_dir, lmax, level, nuisance)
    folders = {"tiles": str(tiles), "noiseless_tiles": config.noiseless_tiles or compressor.noiseless_tiles}
    found: dict[str, str | None] = {}
    if isinstance(config, NPEConfig):
        folders["calibration_tiles"] = config.calibration_tiles
    else:
        start = config.init_from
        found["init_from"] = load_compressor(Path(start), CPU, "float32").sha256 if start else None
    found |= dict.fromkeys(folders)
    for name, folder in folders.items():
        if folder:
            noise = NOISELESS if name == "noiseless_tiles" else level
            there = named_folder(folder, lmax, level, nuisance)
            read, _ = read_tiles_through_cache(there, lmax, noise, compressor.nside)
            found[name] = fingerprint_of(read)
    return found


def _curve(
    config: SweepConfig, outcomes: list[FomResult | Exception], on_checkpoint: Callable[[], None]
) -> SweepResult | LearningCurves:
    """Write the curve and its picture from the outcome of every run."""
    points = [_point(run, outcome) for run, outcome in zip(config.runs, outcomes, strict=True)]
    failed = [point["tag"] for point in points if "error" in point]
    if len(failed) == len(points):
        raise UserError(f"no point of the sweep succeeded; the first failed with: {points[0]['error']}")
    folder = Path(config.results_dir, SWEEPS, config.name)
    folder.mkdir(parents=True, exist_ok=True)
    about: dict[str, Any] = {"noise_level": config.noise_level, "points": points, "failed": failed}
    about |= {"folder": str(folder), "versions": versions()}
    result: SweepResult | LearningCurves
    if config.n_sims:
        name, result = LEARNING_CURVE_NAME, LearningCurves(curves=learning_curves(points, config.seed), **about)
        draw_learning_curves(result, (folder / name).with_suffix(".png"))
    else:
        done: dict[tuple[int, str], dict[int, FomResult]] = defaultdict(dict)
        for run, outcome in zip(config.runs, outcomes, strict=True):
            if not isinstance(outcome, Exception):
                done[run.lmax, run.nuisance][run.seed] = outcome
        curve = [combine_seeds(*which, results, done.get((which[0], NONE), {})) for which, results in done.items()]
        name, result = CURVE_NAME, SweepResult(curve=curve, **about)
        draw_curve(result, (folder / name).with_suffix(".png"))
    write_json(folder / name, asdict(result))
    on_checkpoint()
    return result


def _point(run: SweepRun, outcome: FomResult | Exception) -> dict[str, Any]:
    """What the curve's file says of a run."""
    point: dict[str, Any] = {"lmax": run.lmax, "nuisance": run.nuisance, "seed": run.seed, "tag": run.tag}
    if run.n_sims:
        point |= {"n_sims": run.n_sims, "compressor_n_sims": run.compressor_n_sims}
    if isinstance(outcome, Exception):
        return point | {"error": _in_words(outcome)}
    for name in ("fom_fiducial_median", "fom_fiducial_std", "fom_test_median"):
        point[name] = getattr(outcome, name)
    for name in ("chi2_per_dof_of_fom", "nll", "nll_err", "verdict"):
        point[name] = getattr(outcome.calibration, name)
    wide = outcome.recalibrated
    return point | {"fom_recalibrated": wide and wide.fom_fiducial_median}


def combine_seeds(lmax: int, nuisance: str, by_seed: dict[int, FomResult], bare: dict[int, FomResult]) -> CurvePoint:
    """Figures of runs that differ in their seeds, each beside the run of its seed without nuisances."""
    results = list(by_seed.values())
    medians = [result.fom_fiducial_median for result in results]
    scatters = [result.fom_fiducial_std for result in results if result.fom_fiducial_std is not None]
    ensemble = compare([result.posterior for result in results])
    recalibrated = [result.recalibrated.fom_fiducial_median for result in results if result.recalibrated]
    pairs = [(by_seed[seed], bare[seed]) for seed in by_seed if seed in bare]
    to_bare = _ratio([(one.fom_fiducial_median, other.fom_fiducial_median) for one, other in pairs])
    wide = [(one.recalibrated, other.recalibrated) for one, other in pairs]
    recalibrated_to_bare = _ratio([(o.fom_fiducial_median, b.fom_fiducial_median) for o, b in wide if o and b])
    return CurvePoint(
        lmax=lmax,
        nuisance=nuisance,
        n_seeds=len(results),
        fom=float(np.mean(medians)),
        std_over_seeds=scatter(np.array(medians)),
        std_over_tiles=float(np.mean(scatters)) if scatters else None,
        chi2_per_dof_of_fom=float(np.mean([result.calibration.chi2_per_dof_of_fom for result in results])),
        fom_recalibrated=float(np.mean(recalibrated)) if recalibrated else None,
        mixture_fom=ensemble.mixture.fom_fiducial_median,
        worst_divergence_nats=ensemble.worst_divergence_nats,
        to_bare=to_bare[0],
        to_bare_err=to_bare[1],
        recalibrated_to_bare=recalibrated_to_bare[0],
        recalibrated_to_bare_err=recalibrated_to_bare[1],
    )


def _ratio(pairs: list[tuple[float, float]]) -> tuple[float | None, float | None]:
    """The mean of the ratios of pairs, and its error from their scatter."""
    ratios = np.array([one / other for one, other in pairs])
    spread = scatter(ratios) if len(ratios) else None
    return float(ratios.mean()) if len(ratios) else None, None if spread is None else spread / np.sqrt(len(ratios))
