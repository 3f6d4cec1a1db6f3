"""The redesign of issue 15 moved no number: small runs of every command give what the commit before it gave."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import GUARD_S

HERE = Path(__file__).parent / "golden"
# Parts of keys, old to new; CHANGELOG.md lists them.
RENAMED = {
    "audit.n_twins": "audit.n_duplicates",
    "audit.twins_across": "audit.duplicates_across",
    "audit.partners": "audit.leakage",
    ".twin_or_sky": ".duplicates_or_sky",
    ".twin": ".duplicates",
    "calibration.s_err": "calibration.chi2_per_dof_err",
    "calibration.fom_over_s": "calibration.fom_rescaled",
    "n_unlike": "n_out_of_distribution",
    "config.feed": "config.tiles_on",
}
RENAMED_WHOLE = {"calibration.s": "calibration.chi2_per_dof", "s": "chi2_per_dof"}
GONE = ("config.n_views",)
# On another processor, or with another version of torch, the last digits differ and training makes more of them.
ELSEWHERE = {"rel": 0.05, "abs": 0.01}


def leaves(content: Any, name: str) -> Iterator[tuple[str, Any]]:
    if isinstance(content, (dict, list)):
        for key, value in content.items() if isinstance(content, dict) else enumerate(content):
            yield from leaves(value, f"{name}/{key}")
    else:
        yield name, content


def renamed(name: str) -> str:
    """The name that a value has today."""
    for old, new in RENAMED.items():
        name = name.replace(old, new)
    head, _, last = name.rpartition("/")
    stem, dot, end = last.rpartition(".")
    if last in RENAMED_WHOLE or end == "s":
        last = RENAMED_WHOLE.get(last, f"{stem}{dot}chi2_per_dof")
    return f"{head}/{last}"


def test_every_command_gives_what_it_gave(tmp_path: Path) -> None:
    made = tmp_path / "golden.json"
    done = subprocess.run(
        [sys.executable, str(HERE / "make.py"), str(made)], capture_output=True, text=True, timeout=GUARD_S
    )
    assert done.returncode == 0, done.stderr
    then, now = (json.loads(path.read_text()) for path in (HERE / "golden.json", made))
    same_machine = then.pop("made_on") == now.pop("made_on")
    found = dict(leaves(now, ""))
    for name, value in leaves(then, ""):
        if name.endswith(GONE):
            continue
        name = renamed(name)
        assert name in found
        if same_machine or isinstance(value, (int, type(None))):
            assert found[name] == value, name
        elif isinstance(value, float):
            assert found[name] == pytest.approx(value, **ELSEWHERE), name
