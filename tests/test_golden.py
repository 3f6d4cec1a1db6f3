"""No number changes in silence: small runs of every command give what they gave when golden.json was written."""

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
# On another processor, or with another version of torch, the last digits differ and training makes more of them.
ELSEWHERE = {"rel": 0.05, "abs": 0.01}


def leaves(content: Any, name: str) -> Iterator[tuple[str, Any]]:
    if isinstance(content, (dict, list)):
        for key, value in content.items() if isinstance(content, dict) else enumerate(content):
            yield from leaves(value, f"{name}/{key}")
    else:
        yield name, content


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
        assert name in found
        if same_machine or isinstance(value, (int, type(None))):
            assert found[name] == value, name
        elif isinstance(value, float):
            assert found[name] == pytest.approx(value, **ELSEWHERE), name
