"""report.html: one self-contained page about a stage-2 run, from report.html.j2; pictures inside, nothing fetched."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from common.artifacts import atomic_path
from data.audit import TOLERATED_LEAK
from npe.result import FomResult

REPORT_NAME, TEMPLATE_NAME = "report.html", "report.html.j2"


def write_report(result: FomResult, folder: Path, compressor_run: Path) -> None:
    """Write report.html beside the pictures of a stage-2 run.

    Args:
        result: of the run.
        folder: of the run, with its pictures.
        compressor_run: folder of the stage-1 run; its pictures are taken if they are there.
    """
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined
    )
    page = environment.get_template(TEMPLATE_NAME).render(
        r=result,
        leak=max((leak.worst for leak in result.audit.leakage.values()), default=0.0),
        tolerated_leak=TOLERATED_LEAK,
        tiles=_rows_of_tiles(result),
        made_by=_made_by(result),
        stage_1=_options(result.compressor.config),
        stage_2=_options(result.config),
        pictures=_pictures(folder, compressor_run),
    )
    with atomic_path(folder / REPORT_NAME) as temporary:
        temporary.write_text(page, encoding="utf-8")


def _options(config: dict[str, Any]) -> list[tuple[str, Any]]:
    return [(name, "not given" if value in ("", None) else value) for name, value in config.items()]


def _rows_of_tiles(result: FomResult) -> list[tuple[str, ...]]:
    """A row per fiducial tile: number, each parameter with its error, FoM."""
    sigma = result.posterior.sigma
    return [
        (str(i), *(f"{m:.4f} ± {s:.4f}" for m, s in zip(mu, sigma[i], strict=True)), f"{fom:.0f}")
        for i, (mu, fom) in enumerate(zip(result.fiducial.mu, result.fom_fiducial_all, strict=True))
    ]


def _made_by(result: FomResult) -> list[tuple[str, Any]]:
    where = ("compressor_checkpoint", "manifest_sha256", "folder", "elapsed_s", "device", "precision")
    return [(name, getattr(result, name)) for name in where] + list(result.versions.items())


def _pictures(folder: Path, compressor_run: Path) -> dict[str, str]:
    """Every picture as base64 by its name; empty where there is none."""
    paths = {name: folder / name for name in ("fom.png", "calibration.png", "tiles.png", "loss_curves.png")}
    paths["predicted_vs_true.png"] = compressor_run / "predicted_vs_true.png"
    paths["stage 1 loss_curves.png"] = compressor_run / "loss_curves.png"
    return {name: base64.b64encode(path.read_bytes()).decode() if path.exists() else "" for name, path in paths.items()}
