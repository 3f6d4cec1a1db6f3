"""report.html: one self-contained page about a stage-2 run, pictures inside, nothing fetched from elsewhere."""

from __future__ import annotations

import base64
from collections.abc import Iterable
from html import escape
from pathlib import Path
from typing import Any

from common.artifacts import atomic_path
from data.audit import TOLERATED_LEAK
from data.schema import THETA_NAMES

REPORT_NAME = "report.html"

LEFT_OUT = (
    "Intrinsic alignments, errors of photometric redshifts and of shear calibration, baryonic feedback, masks and the "
    "survey's footprint are not in the tiles, so nothing marginalises over them: a survey's FoM is lower.",
    "The prior is the training suite's own: it is part of the FoM, and what varies in the suite is marginalised over.",
    "The posterior is Gaussian. Where the true one is not, the FoM is that of the nearest Gaussian.",
    "Augmentation treats a tile as a periodic square, which it is not; how far that moves a summary is stated above.",
)

STYLE = """
:root { --blue: #2a6f97; --orange: #d1603d; --ink: #22272e; --grey: #66707c; --line: #dfe3e8; }
* { box-sizing: border-box; }
body { font: 16px/1.5 system-ui, "Helvetica Neue", Arial, sans-serif; color: var(--ink); margin: 0; background: #fff; }
main { max-width: 960px; margin: 0 auto; padding: 32px 24px 64px; }
h1 { font-size: 1.5rem; margin: 0; }
h2 { font-size: 1.1rem; margin: 40px 0 8px; padding-top: 12px; border-top: 1px solid var(--line); }
p, li { max-width: 72ch; }
.grey { color: var(--grey); }
.fom { display: flex; flex-wrap: wrap; gap: 4px 24px; align-items: baseline; margin: 16px 0 8px; }
.fom b { font-size: 3.4rem; line-height: 1.1; color: var(--blue); font-weight: 600; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 12px; margin: 20px 0; }
.card { border: 1px solid var(--line); border-left: 4px solid var(--blue); border-radius: 4px; padding: 10px 14px; }
.card.look { border-left-color: var(--orange); }
.card b { display: block; }
.card span { font-size: 0.85rem; color: var(--grey); }
table { border-collapse: collapse; margin: 8px 0; font-size: 0.92rem; font-variant-numeric: tabular-nums; }
td, th { padding: 3px 18px 3px 0; text-align: left; border-bottom: 1px solid var(--line); vertical-align: top; }
td { overflow-wrap: anywhere; }
figure { margin: 12px 0; }
figure img { max-width: 100%; height: auto; }
.two { display: grid; grid-template-columns: repeat(auto-fit, minmax(300px, 1fr)); gap: 12px 28px; align-items: start; }
figure.narrow { max-width: 640px; }
.small { font-size: 0.85rem; }
@media print {
  main { max-width: none; padding: 0; }
  body { font-size: 10.5pt; }
  figure, .card, tr, h2 { break-inside: avoid; }
  h2 { break-after: avoid; margin-top: 20px; }
}
"""


def write_report(result: dict[str, Any], folder: Path, compressor_run: Path) -> None:
    """Write report.html beside the pictures of a stage-2 run.

    Args:
        result: content of fom_result.json.
        folder: of the run, with its pictures.
        compressor_run: folder of the stage-1 run; its pictures are taken if they are there.
    """
    title = f"FoM of (Omega_m, S8), lmax {result['lmax']}, {result['noise_level']}"
    body = "\n".join(
        [
            _headline(title, result),
            _section("Posteriors of the fiducial tiles", _picture(folder / "fom.png"), _fiducial(result)),
            _section(
                "Is the posterior as wide as it says?", _calibration(result), _picture(folder / "calibration.png")
            ),
            _section("The tiles", _picture(folder / "tiles.png")),
            _section("The compressor", _compressor(result), *_compressor_pictures(compressor_run)),
            _section("Training", _training(result), _two(*_loss_curves(compressor_run, folder))),
            _section("Audit of the data", _audit(result["audit"])),
            _section(
                "What the number leaves out", "<ul>" + "".join(f"<li>{escape(t)}</li>" for t in LEFT_OUT) + "</ul>"
            ),
            _section("Configuration and versions", _configuration(result)),
        ]
    )
    page = (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{STYLE}</style></head>\n'
        f"<body><main>\n{body}\n</main></body></html>\n"
    )
    with atomic_path(folder / REPORT_NAME) as temporary:
        temporary.write_text(page, encoding="utf-8")


# ---------------------------------------------------------------- sections


def _scatter(std: float | None) -> str:
    return "one tile has no scatter" if std is None else f"scatter from tile to tile: {std:.0f}"


def _headline(title: str, result: dict[str, Any]) -> str:
    fiducial, calibration, ensemble = result["fiducial"], result["calibration"], result["ensemble"]
    n_tiles, n_patches = len(result["fom_fiducial_all"]), fiducial["n_patches"]
    leak = max((_worst(p) for p in result["audit"]["partners"].values()), default=0.0)
    cards = [
        _card(
            f"{calibration['verdict']}, s = {calibration['s']:.2f} ± {calibration['s_err']:.2f}",
            "half the mean d²; 1 is right" + (", optimistic" if calibration["optimistic"] else ""),
            look=calibration["verdict"] != "calibrated",
        ),
        _card(
            f"{leak:.0%} of a split leaks",
            "tiles whose pixels or sky an earlier split has seen",
            look=leak > TOLERATED_LEAK,
        ),
        _card(
            f"members differ by {ensemble['worst_divergence_nats']:.3f} nats",
            f"worst pair of {ensemble['n_members']}; their mixture's FoM is "
            f"{ensemble['mixture']['fom_fiducial_median']:.0f}",
        ),
        _card(
            f"test split: {result['fom_test_median']:.0f}",
            f"{result['fom_test_lo_16']:.0f} … {result['fom_test_hi_84']:.0f} (68 %), cosmologies over the prior",
        ),
    ]
    return (
        f"<h1>{escape(title)}</h1>"
        f'<div class="fom"><b>{result["fom_fiducial_median"]:.0f}</b>'
        f"<span>median of the {n_tiles} tiles of simulation {fiducial['sim_id']}, which no training saw<br>"
        f"68 % of the median: {fiducial['fom_median_lo_16']:.0f} … {fiducial['fom_median_hi_84']:.0f}, from "
        f"{n_patches} distinct patches of sky; {_scatter(result['fom_fiducial_std'])}</span></div>"
        '<p class="grey">FoM = 1/√det Cov(Omega_m, S8), in physical units.</p>'
        f'<div class="cards">{"".join(cards)}</div>'
    )


def _fiducial(result: dict[str, Any]) -> str:
    fiducial = result["fiducial"]
    truth = ", ".join(f"{name} = {v:.5g}" for name, v in zip(THETA_NAMES, fiducial["theta_true"], strict=True))
    rows = [
        (i, *(f"{m:.4f} ± {cov[k][k] ** 0.5:.4f}" for k, m in enumerate(mu)), f"{fom:.0f}")
        for i, (mu, cov, fom) in enumerate(
            zip(fiducial["mu"], fiducial["cov"], result["fom_fiducial_all"], strict=True)
        )
    ]
    half = (len(rows) + 1) // 2
    return (
        f"<p>Truth: {truth}. At one fixed cosmology a posterior that marginalises over other parameters need not cover "
        "at its nominal rate: these tiles check for bias, not calibration.</p>"
        + _two(*(_table(("tile", *THETA_NAMES, "FoM"), part) for part in (rows[:half], rows[half:]) if part))
    )


def _calibration(result: dict[str, Any]) -> str:
    c = result["calibration"]
    optimistic = " The test split stopped the training, so its figures are optimistic." if c["optimistic"] else ""
    moved = result["augmentation_shift_in_sigma"]["all"]
    rows = [
        (
            name,
            *(f"{c[key][k]:+.2f} ± {c[key + '_err'][k]:.2f}" for key in ("z_mean", "z_std")),
            f"{moved['rms'][k]:.2f}",
        )
        for k, name in enumerate(THETA_NAMES)
    ]
    return (
        f"<p>{c['n_tiles']} tiles of {c['n_sims']} simulations ({escape(c['tiles'])}); errors are a bootstrap over "
        f"simulations.{optimistic} Were every covariance s times as large, the FoM would be {c['fom_over_s']:.0f}.</p>"
        + _table(("", "mean z", "scatter of z", "augmentation moves a summary by (σ, rms)"), rows)
    )


def _compressor(result: dict[str, Any]) -> str:
    c = result["compressor"]
    return (
        f"<p>{escape(c['config']['backbone'])}, frozen, from epoch {c['epoch']}; mean squared error of normalised "
        f"theta on the validation split {c['val_mse']:.4f} (1 is to know nothing).</p>"
    )


def _compressor_pictures(compressor_run: Path) -> list[str]:
    path = compressor_run / "predicted_vs_true.png"
    return [_picture(path, "narrow")] if path.exists() else [f'<p class="grey">{escape(str(path))} is not there.</p>']


def _training(result: dict[str, Any]) -> str:
    npe, ensemble = result["npe"], result["ensemble"]
    medians = ", ".join(f"{m:.0f}" for m in ensemble["fom_fiducial_medians"])
    return (
        f"<p>{npe['n_train_tiles']} tiles train the posterior, {npe['n_test_tiles']} stop it; best epoch "
        f"{npe['best_epoch']} of {npe['epochs']} ({npe['stopped']}). FoM of the {ensemble['n_members']} members, which "
        f"differ in their initial weights alone: {medians}.</p>"
    )


def _audit(audit: dict[str, Any]) -> str:
    rows = [
        (
            name,
            p["n_tiles"],
            _percent(p["twin"], p["twin_fraction"]),
            _percent(p["twin_or_sky"], p["twin_or_sky_fraction"]),
        )
        for name, p in audit["partners"].items()
    ]
    covered = audit["covered_patches"]
    outliers, outside = audit["n_variance_outliers"] or "no", audit["fiducial"]["outside"]
    inside = f"outside it in {', '.join(outside)}" if outside else "inside it in every parameter"
    return (
        f"<p>{audit['n_tiles']} tiles of {audit['n_sims']} simulations; the sky that a simulation's tiles cover is "
        f"{'unknown' if covered is None else f'that of {covered:.1f} tiles'}. {outliers} tiles are far from the "
        f"variance of their simulation. The range of the cosmologies stands below; the fiducial lies {inside}."
        + (f" They are not what lmax says: {escape(audit['band_limit'])}." if audit["band_limit"] else "")
        + "</p>"
        + _table(("split", "tiles", "with a twin in an earlier split", "with a twin or most of their sky"), rows)
        + _table(
            ("", *audit["ranges"]),
            [(end, *(f"{r[k]:.4g}" for r in audit["ranges"].values())) for k, end in enumerate(("from", "to"))],
        )
    )


def _configuration(result: dict[str, Any]) -> str:
    where = ("compressor_checkpoint", "manifest_sha256", "folder", "elapsed_s", "device", "precision")
    of_run = _table(("", ""), [(key, result[key]) for key in where] + list(result["versions"].items()))
    stage_1 = _table(("stage 1", ""), _options(result["compressor"]["config"]))
    stage_2 = _table(("stage 2", ""), _options(result["config"]))
    return f'<div class="small">{of_run}{_two(stage_1, stage_2)}</div>'


def _options(config: dict[str, Any]) -> list[tuple[str, Any]]:
    return [(name, "not given" if value in ("", None) else value) for name, value in config.items()]


# ---------------------------------------------------------------- pieces


def _worst(partners: dict[str, Any]) -> float:
    return max(partners["twin_fraction"], partners["twin_or_sky_fraction"] or 0.0)


def _percent(count: int | None, fraction: float | None) -> str:
    return "unknown" if fraction is None else f"{count} ({fraction:.1%})"


def _section(title: str, *parts: str) -> str:
    return f"<section><h2>{escape(title)}</h2>{''.join(parts)}</section>"


def _card(text: str, below: str, *, look: bool = False) -> str:
    return f'<div class="card{" look" if look else ""}"><b>{escape(text)}</b><span>{escape(below)}</span></div>'


def _table(head: tuple[str, ...], rows: Iterable[tuple[Any, ...]]) -> str:
    header = "".join(f"<th>{escape(h)}</th>" for h in head) if any(head) else ""
    body = "".join("<tr>" + "".join(f"<td>{escape(str(cell))}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table>{f'<tr>{header}</tr>' if header else ''}{body}</table>"


def _loss_curves(*runs: Path) -> list[str]:
    return [_picture(path) for run in runs if (path := run / "loss_curves.png").exists()]


def _picture(path: Path, kind: str = "") -> str:
    data = base64.b64encode(path.read_bytes()).decode()
    return f'<figure class="{kind}"><img src="data:image/png;base64,{data}" alt="{escape(path.stem)}"></figure>'


def _two(*parts: str) -> str:
    return f'<div class="two">{"".join(f"<div>{part}</div>" for part in parts)}</div>'
