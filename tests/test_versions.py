"""Every result names the commit that made it, and whether the tree was clean."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

import common.versions
from common.versions import COMMIT_VARIABLE, commit


def git(folder: Path, *words: str) -> str:
    identity = ["-c", "user.name=n", "-c", "user.email=e@example.org"]
    return subprocess.run(["git", *identity, *words], cwd=folder, capture_output=True, text=True, check=True).stdout


def test_the_commit_is_that_of_this_code_and_changes_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(COMMIT_VARIABLE, raising=False)
    monkeypatch.setattr(common.versions, "ROOT", tmp_path)
    git(tmp_path, "init")
    (tmp_path / "code.py").write_text("a = 1\n")
    git(tmp_path, "add", "code.py")
    git(tmp_path, "commit", "-m", "first")
    head = git(tmp_path, "rev-parse", "HEAD").strip()
    (tmp_path / "results").write_text("not part of the code")
    assert commit() == head
    (tmp_path / "code.py").write_text("a = 2\n")
    assert commit() == f"{head}+changes"

    inside = tmp_path / "unpacked"  # into somebody else's repository
    inside.mkdir()
    monkeypatch.setattr(common.versions, "ROOT", inside)
    assert commit() == "unknown"
    monkeypatch.setenv(COMMIT_VARIABLE, "said by the client")
    assert commit() == "said by the client"
