"""Both stages over several lmax and seeds: every point a run of its own, and the curve through them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from common.artifacts import (
    claimed,
    compressor_folder,
    named_folder,
    npe_folder,
    read_sealed,
    sha256_of_file,
    sweep_folder,
    tiles_folder,
    write_json,
)
from common.errors import UserError, say
from common.options import difference
from common.versions import COMMIT, versions
from compress.config import CompressorConfig
from compress.model import CHECKPOINT_NAME
from compress.train import RESULT_NAME as COMPRESSOR_RESULT_NAME
from compress.train import train_compressor
from data.cache import read_tiles_through_cache
from data.schema import NOISELESS
from data.split import fingerprint_of
from npe.config import NPEConfig, SweepConfig, SweepRun
from npe.fom import scatter
from npe.pictures import draw_curve
from npe.train import RESULT_NAME, train_npe

CURVE_NAME, PICTURE_NAME = "fom_vs_lmax.json", "fom_vs_lmax.png"


def run_point(run: SweepRun, on_checkpoint: Callable[[], None] = lambda: None) -> dict[str, Any]:
    """Both stages of one point; what is finished is kept, what was interrupted goes on.

    Args:
        run: lmax, seed and options.
        on_checkpoint: as in train_compressor.

    Returns:
        lmax, seed, tag, and the figures of the point; or `error`, one line, in their place: a sweep goes on without
        a point that failed.
    """
    point: dict[str, Any] = {"lmax": run.lmax, "seed": run.seed, "tag": run.tag}
    try:
        compressor, folder = run.compressor(), compressor_folder(run.sweep.results_dir, run.tag)
        if not _finished(folder / COMPRESSOR_RESULT_NAME, compressor, compressor):
            train_compressor(compressor, on_checkpoint)
        npe = run.npe(str(folder / CHECKPOINT_NAME))
        result_path = npe_folder(run.sweep.results_dir, run.tag) / RESULT_NAME
        if _is_of_another_compressor(result_path, npe) or not _finished(result_path, npe, compressor):
            # What is there, finished or not, may be of a compressor that stage 1 has replaced.
            train_npe(replace(npe, restart=True), on_checkpoint)
        result = read_sealed(result_path, "stage 2")
        keys = ("fom_fiducial_median", "fom_fiducial_std", "fom_test_median")
        return point | {key: result[key] for key in keys} | {"s": result["calibration"]["s"]}
    except Exception as error:  # whatever it is, the other points do not depend on it
        kind = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
        say(f"error: {run.tag}: {kind}{error}")
        return point | {"error": f"{kind}{error}"}


def _finished(path: Path, config: CompressorConfig | NPEConfig, compressor: CompressorConfig) -> bool:
    """Whether a stage has its result, from the same options and data, and with --restart by the same code.

    Raises:
        UserError: it has one from others, and not --restart.
    """
    if not path.exists():
        return False
    there, names = read_sealed(path, "this stage"), begun_with(config)
    differs = difference({name: there["config"].get(name) for name in names}, names)
    if not differs:
        differs = difference(there.get("fingerprints", {}), _fingerprints(config, compressor))
    if config.restart:
        return not differs and there["versions"].get("commit") == COMMIT
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


def _is_of_another_compressor(path: Path, npe: NPEConfig) -> bool:
    return path.exists() and read_sealed(path, "stage 2")["compressor"]["sha256"] != sha256_of_file(Path(npe.ckpt))


def run_sweep(
    config: SweepConfig,
    on_checkpoint: Callable[[], None] = lambda: None,
    points: Iterable[dict[str, Any]] | None = None,
) -> dict[str, Any]:
    """The curve: every point, one after the other, unless they are given.

    Args:
        config: all options.
        on_checkpoint: as in train_compressor.
        points: what run_point has returned elsewhere.

    Returns:
        the content of fom_vs_lmax.json: `points`, `curve` (per lmax the mean over seeds `fom`, its scatter over seeds
        `std_over_seeds` and the mean scatter over tiles `std_over_tiles`, null for one seed or tile), `failed`,
        `folder`, `versions`.

    Raises:
        UserError: no point at all succeeded.
    """
    folder = sweep_folder(config.results_dir, config.name)
    with claimed(folder):
        found = [run_point(run, on_checkpoint) for run in config.runs] if points is None else list(points)
        by_lmax = defaultdict(list)
        for point in found:
            if "error" not in point:
                by_lmax[point["lmax"]].append(point)
        if not by_lmax:
            raise UserError(f"no point of the sweep succeeded; the first failed with: {found[0]['error']}")
        curve = []
        for lmax, group in sorted(by_lmax.items()):
            medians = [point["fom_fiducial_median"] for point in group]
            curve.append(
                {
                    "lmax": lmax,
                    "n_seeds": len(group),
                    "fom": float(np.mean(medians)),
                    "std_over_seeds": scatter(np.array(medians)),
                    "std_over_tiles": _mean([point["fom_fiducial_std"] for point in group]),
                    "s": float(np.mean([point["s"] for point in group])),
                }
            )
        result = {
            "noise_level": config.noise_level,
            "curve": curve,
            "points": found,
            "failed": [point["tag"] for point in found if "error" in point],
            "folder": str(folder),
            "versions": versions(),
        }
        folder.mkdir(parents=True, exist_ok=True)
        draw_curve(curve, found, config.noise_level, folder / PICTURE_NAME)
        write_json(folder / CURVE_NAME, result)
    on_checkpoint()
    return result


def _mean(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None
