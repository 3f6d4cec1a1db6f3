"""report.html: one self-contained page about a stage-2 run, from report.html.j2; pictures inside, nothing fetched."""

import base64
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from common.artifacts import atomic_path
from data.audit import TOLERATED_LEAK
from data.config import kinds_of
from npe.result import FomResult

REPORT_NAME, TEMPLATE_NAME = "report.html", "report.html.j2"
IN_WORDS = {
    "ia": "intrinsic alignments",
    "dz": "errors of the source redshifts",
    "m": "errors of the shear calibration",
}  # of the nuisances, which the tiles either vary or lack
# A nuisance that KINDS gets must leave these.
NEVER_IN = ("baryonic feedback", "masks", "the survey's footprint")


def write_report(result: FomResult, folder: Path, compressor_run: Path) -> None:
    """Write report.html into the folder of a stage-2 run, with the pictures of both stages that are there."""
    paths = {name: folder / name for name in ("fom.png", "calibration.png", "tiles.png", "loss_curves.png")}
    paths["predicted_vs_true.png"] = compressor_run / "predicted_vs_true.png"
    paths["stage 1 loss_curves.png"] = compressor_run / "loss_curves.png"
    loader = FileSystemLoader(Path(__file__).parent)
    page = Environment(loader=loader, autoescape=True, undefined=StrictUndefined).get_template(TEMPLATE_NAME)
    tiles = [
        (i, *(f"{m:.4f} ± {s:.4f}" for m, s in zip(mu, sigma, strict=True)), f"{fom:.0f}")
        for i, (mu, sigma, fom) in enumerate(
            zip(result.fiducial.mu, result.posterior.sigma, result.fom_fiducial_all, strict=True)
        )
    ]
    pictures = {name: base64.b64encode(path.read_bytes()).decode() for name, path in paths.items() if path.exists()}
    varied = kinds_of(result.nuisance)
    words = {
        "varied": [text for kind, text in IN_WORDS.items() if kind in varied],
        "left_out": [*(text for kind, text in IN_WORDS.items() if kind not in varied), *NEVER_IN],
    }
    html = page.render(r=result, tolerated_leak=TOLERATED_LEAK, tiles=tiles, pictures=pictures, **words)
    with atomic_path(folder / REPORT_NAME) as temporary:
        temporary.write_text(html, encoding="utf-8")
