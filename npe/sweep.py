"""Both stages over several lmax and seeds: every point a run of its own, and the curve through them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from common.artifacts import (
    COMPRESSOR_RUNS,
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
from compress.model import CHECKPOINT_NAME
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

CURVE_NAME, PICTURE_NAME = "fom_vs_lmax.json", "fom_vs_lmax.png"


def run_sweep(config: SweepConfig, on_checkpoint: Callable[[], None] = lambda: None) -> SweepResult:
    """Every point, one after the other, and the curve.

    Args:
        config: all options.
        on_checkpoint: as in run_compressor.

    Returns:
        the content of fom_vs_lmax.json.

    Raises:
        UserError: no point at all succeeded.
    """
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
    """Both stages of one point; a finished stage is kept, an interrupted one resumes.

    Args:
        run: lmax, seed and options.
        on_checkpoint: as in run_compressor.

    Returns:
        the result, or what went wrong: a sweep goes on without a point that failed.
    """
    try:
        compressor, folder = run.compressor(), Path(run.sweep.results_dir, COMPRESSOR_RUNS, run.tag)
        path = folder / COMPRESSOR_RESULT_NAME
        stage_1 = read_result(path, CompressorResult, "stage 1") if path.exists() else None
        if not _is_finished(path, stage_1, compressor, compressor):
            run_compressor(compressor, on_checkpoint)
        npe = run.npe(str(folder / CHECKPOINT_NAME))
        path = Path(run.sweep.results_dir, NPE_RUNS, run.tag) / RESULT_NAME
        stage_2 = read_fom_result(path.parent) if path.exists() else None
        of_another = stage_2 is not None and stage_2.compressor.sha256 != sha256_of_file(Path(npe.ckpt))
        if of_another or not _is_finished(path, stage_2, npe, compressor):
            # --restart, because the folder may hold a run of a compressor that stage 1 has replaced.
            run_npe(replace(npe, restart=True), on_checkpoint)
        return read_fom_result(path.parent)
    except Exception as error:  # whatever it is, the other points do not depend on it
        say(f"error: {run.tag}: {_in_words(error)}")
        return error


def _in_words(error: Exception) -> str:
    return str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"


def _is_finished(
    path: Path,
    result: CompressorResult | FomResult | None,
    config: CompressorConfig | NPEConfig,
    compressor: CompressorConfig,
) -> bool:
    """Whether a stage has its result, from the same options and data, and with --restart by the same code.

    Raises:
        UserError: it has one from others, and not --restart.
    """
    if result is None:
        return False
    differs = difference(identity(type(config), result.config), identity(type(config), asdict(config)))
    if not differs:
        differs = difference(result.fingerprints, _fingerprints(config, compressor))
    if config.restart:
        return not differs and result.versions.get("commit") == COMMIT
    if differs:
        raise UserError(
            f"{path} was made from others ({differs}); give the same, --restart in the quotes, or another --name"
        )
    return True


def _fingerprints(config: CompressorConfig | NPEConfig, compressor: CompressorConfig) -> dict[str, str | None]:
    """Of the tiles that a stage would read now, as its result has them."""
    level = compressor.noise_level

    def of(text: str, noise_level: str) -> str | None:
        if not text:
            return None
        folder = named_folder(text, compressor.lmax, level)
        return fingerprint_of(read_tiles_through_cache(folder, compressor.lmax, noise_level, compressor.nside)[0])

    tiles = tiles_folder(config.tiles_dir or compressor.tiles_dir, config.results_dir, compressor.lmax, level)
    found = {
        "tiles": of(str(tiles), level),
        "noiseless_tiles": of(config.noiseless_tiles or compressor.noiseless_tiles, NOISELESS),
    }
    return found | ({"calibration_tiles": of(config.calibration_tiles, level)} if isinstance(config, NPEConfig) else {})


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
            keys = ("fom_fiducial_median", "fom_fiducial_std", "fom_test_median")
            figures = {key: getattr(outcome, key) for key in keys}
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
