"""report.html: whole, self-contained, and saying what fom_result.json says."""

from __future__ import annotations

import base64
import json
import shutil
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from test_pipeline import compressor_run, finished, npe_run

from npe.report import REPORT_NAME, write_report
from npe.result import read_fom_result

__all__ = ["finished"]  # the fixture, shared
VOID = {"meta", "img", "br"}


class Page(HTMLParser):
    """Pictures, outward references, text, and whether every tag is closed."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.pictures: list[bytes] = []
        self.references: list[str] = []
        self.text = ""
        self.feed(html)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in VOID:
            self.open.append(tag)
        for name, value in attrs:
            if name == "src" and value and value.startswith("data:image/png;base64,"):
                self.pictures.append(base64.b64decode(value.split(",")[1]))
            elif name in ("src", "href", "srcset", "data"):
                self.references.append(value or "")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture(scope="module")
def page(finished: Path) -> Page:
    return Page((npe_run(finished) / REPORT_NAME).read_text(encoding="utf-8"))


def test_the_report_needs_nothing_but_itself(page: Page, finished: Path) -> None:
    assert page.references == []
    html = (npe_run(finished) / REPORT_NAME).read_text(encoding="utf-8")
    assert "url(" not in html
    assert "@import" not in html
    written = [*compressor_run(finished).glob("*.png"), *npe_run(finished).glob("*.png")]
    assert sorted(page.pictures) == sorted(path.read_bytes() for path in written)


def test_the_report_says_what_the_result_says(page: Page, finished: Path) -> None:
    result = json.loads((npe_run(finished) / "fom_result.json").read_text())
    fiducial, calibration = result["fiducial"], result["calibration"]
    for number in (
        f"{result['fom_fiducial_median']:.0f}",
        f"{fiducial['fom_median_lo_16']:.0f} … {fiducial['fom_median_hi_84']:.0f}",
        f"chi²/dof {calibration['chi2_per_dof']:.2f} ± {calibration['chi2_per_dof_err']:.2f}",
        f"{result['ensemble']['mixture']['fom_fiducial_median']:.0f}",
        *(f"{fom:.0f}" for fom in result["fom_fiducial_all"]),
        result["manifest_sha256"],
        result["versions"]["torch"],
        result["versions"]["commit"],
    ):
        assert number in page.text, number
    for option, value in {**result["config"], **result["compressor"]["config"]}.items():
        assert option in page.text
        assert str(value) in page.text


def test_the_report_warns_where_there_is_something_to_warn_of(finished: Path, tmp_path: Path) -> None:
    result = read_fom_result(npe_run(finished))
    for path in npe_run(finished).glob("*.png"):
        shutil.copy(path, tmp_path)
    leak = replace(result.audit.leakage["npe_train"], duplicates_fraction=0.46, duplicates_or_sky_fraction=0.69)
    leakage = {**result.audit.leakage, "npe_train": leak}
    spoiled = replace(
        result,
        calibration=replace(result.calibration, verdict="over-confident", tiles="<b>&folder"),
        audit=replace(result.audit, band_limit="they have power beyond lmax 200", leakage=leakage),
    )
    write_report(spoiled, tmp_path, tmp_path / "moved_away")  # without the pictures of stage 1
    html = (tmp_path / REPORT_NAME).read_text(encoding="utf-8")
    before = (npe_run(finished) / REPORT_NAME).read_text(encoding="utf-8")
    assert html.count('class="card look"') == before.count('class="card look"') + 2
    text = Page(html).text
    assert "69% of a split leaks" in text
    assert "The tiles do not have the stated lmax: they have power beyond lmax 200." in text
    assert "<b>&folder" in text  # shown, not obeyed
    assert "predicted_vs_true.png is not there" in text
