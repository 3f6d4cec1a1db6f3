"""Both stages over several lmax and seeds: every point a run of its own, and the curve through them."""

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from common.artifacts import COMPRESSOR_RUNS, NPE_RUNS, SWEEPS, named_folder, sha256_of_file, tiles_folder, write_json
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
from data.schema import NOISELESS
from data.split import fingerprint_of
from npe.config import NPEConfig, SweepConfig, SweepRun
from npe.ensemble import compare
from npe.fom import scatter
from npe.pictures import draw_curve
from npe.result import RESULT_NAME, CurvePoint, FomResult, SweepResult, read_fom_result
from npe.stage import run_npe

Result = TypeVar("Result")
CURVE_NAME, PICTURE_NAME = "fom_vs_lmax.json", "fom_vs_lmax.png"


def run_sweep(config: SweepConfig, on_checkpoint: Callable[[], None] = lambda: None) -> SweepResult:
    """Every point, one after the other, and the curve; UserError if no point succeeded."""
    with exclusive(Path(config.results_dir, SWEEPS, config.name)):
        return _curve(config, [run_point(run, on_checkpoint) for run in config.runs], on_checkpoint)


def sweep_side_by_side(
    config: SweepConfig,
    on_checkpoint: Callable[[], None],
    run_all: Callable[[str, Sequence[Any]], Iterator[FomResult | Exception]],
) -> SweepResult:
    """The same, each point in a container of its own (common/command.py has run_all)."""
    return _curve(config, list(run_all("npe.sweep.run_point", config.runs)), on_checkpoint)


def run_point(run: SweepRun, on_checkpoint: Callable[[], None] = lambda: None) -> FomResult | Exception:
    """Both stages of one point: the result, or what went wrong, since the other points do not depend on it.

    A finished stage is kept, and an interrupted one resumes.
    """
    try:
        compressor, folder = run.compressor(), Path(run.sweep.results_dir, COMPRESSOR_RUNS, run.tag)
        stage_1 = _read(_stage_1, folder / COMPRESSOR_RESULT_NAME, compressor.restart)
        if stage_1 is None or not _is_kept(stage_1, compressor, compressor):
            run_compressor(compressor, on_checkpoint)
        npe, folder = run.npe(str(folder / CHECKPOINT_NAME)), Path(run.sweep.results_dir, NPE_RUNS, run.tag)
        done = _read(read_fom_result, folder / RESULT_NAME, npe.restart)
        if done and done.compressor.sha256 == sha256_of_file(Path(npe.ckpt)) and _is_kept(done, npe, compressor):
            return done
        # --restart, because the folder may hold a run of a compressor that stage 1 has replaced.
        return run_npe(replace(npe, restart=True), on_checkpoint)
    except Exception as error:
        say(f"error: {run.tag}: {_in_words(error)}")
        return error


def _stage_1(folder: Path) -> CompressorResult:
    """The result of a stage-1 run whose checkpoint can be used."""
    load_compressor(folder / CHECKPOINT_NAME, torch.device("cpu"), "float32")
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
    differs = differs or difference(result.fingerprints, _fingerprints(config, compressor))
    if differs and not config.restart:
        cure = "give the same, --restart in the quotes, or another --name"
        raise UserError(f"{result.folder} was made from others ({differs}); {cure}")
    return not differs and (not config.restart or result.versions.get("commit") == COMMIT)


def _fingerprints(config: CompressorConfig | NPEConfig, compressor: CompressorConfig) -> dict[str, str | None]:
    """Of the tiles that a stage would read now, as its result has them."""
    lmax, level = compressor.lmax, compressor.noise_level
    tiles = tiles_folder(config.tiles_dir or compressor.tiles_dir, config.results_dir, lmax, level)
    folders = {"tiles": str(tiles), "noiseless_tiles": config.noiseless_tiles or compressor.noiseless_tiles}
    if isinstance(config, NPEConfig):
        folders["calibration_tiles"] = config.calibration_tiles
    found: dict[str, str | None] = dict.fromkeys(folders)
    for name, folder in folders.items():
        if folder:
            noise = NOISELESS if name == "noiseless_tiles" else level
            read, _ = read_tiles_through_cache(named_folder(folder, lmax, level), lmax, noise, compressor.nside)
            found[name] = fingerprint_of(read)
    return found


def _curve(
    config: SweepConfig, outcomes: list[FomResult | Exception], on_checkpoint: Callable[[], None]
) -> SweepResult:
    """Write fom_vs_lmax.json and its picture from the outcome of every run."""
    by_lmax: dict[int, list[FomResult]] = defaultdict(list)
    points: list[dict[str, Any]] = []
    for run, outcome in zip(config.runs, outcomes, strict=True):
        if isinstance(outcome, Exception):
            figures: dict[str, Any] = {"error": _in_words(outcome)}
        else:
            by_lmax[run.lmax].append(outcome)
            names = ("fom_fiducial_median", "fom_fiducial_std", "fom_test_median")
            figures = {name: getattr(outcome, name) for name in names}
            figures["chi2_per_dof"] = outcome.calibration.chi2_per_dof
        points.append({"lmax": run.lmax, "seed": run.seed, "tag": run.tag, **figures})
    if not by_lmax:
        raise UserError(f"no point of the sweep succeeded; the first failed with: {points[0]['error']}")
    folder = Path(config.results_dir, SWEEPS, config.name)
    result = SweepResult(
        noise_level=config.noise_level,
        curve=[combine_seeds(lmax, results) for lmax, results in sorted(by_lmax.items())],
        points=points,
        failed=[point["tag"] for point in points if "error" in point],
        folder=str(folder),
        versions=versions(),
    )
    folder.mkdir(parents=True, exist_ok=True)
    draw_curve(result, folder / PICTURE_NAME)
    write_json(folder / CURVE_NAME, asdict(result))
    on_checkpoint()
    return result


def combine_seeds(lmax: int, results: list[FomResult]) -> CurvePoint:
    """Figures of runs that differ in their seeds: what repeating the training does to the Figure of Merit."""
    medians = [result.fom_fiducial_median for result in results]
    scatters = [result.fom_fiducial_std for result in results if result.fom_fiducial_std is not None]
    ensemble = compare([result.posterior for result in results])
    return CurvePoint(
        lmax=lmax,
        n_seeds=len(results),
        fom=float(np.mean(medians)),
        std_over_seeds=scatter(np.array(medians)),
        std_over_tiles=float(np.mean(scatters)) if scatters else None,
        chi2_per_dof=float(np.mean([result.calibration.chi2_per_dof for result in results])),
        mixture_fom=ensemble.mixture.fom_fiducial_median,
        worst_divergence_nats=ensemble.worst_divergence_nats,
    )
