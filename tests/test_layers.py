"""Imports go down the layers only, and the stages run without the sphere."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

from conftest import ROOT

LAYERS = ["common", "data", "compress", "npe"]  # each may import itself and what stands before it


def imports_of(path: Path) -> set[str]:
    """Dotted names of everything that a file imports, at any depth."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def test_imports_go_downwards_only() -> None:
    seen = 0
    for height, layer in enumerate(LAYERS):
        for path in (ROOT / layer).rglob("*.py"):
            for name in imports_of(path):
                top = name.split(".")[0]
                assert not top.startswith("run_"), f"{path} imports the command {top}"
                if top in LAYERS:
                    seen += 1
                    assert LAYERS.index(top) <= height, f"{path} imports upwards: {name}"
    assert seen > 50


def test_no_command_imports_another() -> None:
    for path in ROOT.glob("run_*.py"):
        assert not any(name.startswith("run_") for name in imports_of(path)), path


def test_only_mock_and_ingest_know_the_sphere() -> None:
    libraries, packages = ("ducc0", "healpy", "pyccl", "astropy"), ("mock", "ingest", "sphere")
    for layer in LAYERS:
        for path in (ROOT / layer).rglob("*.py"):
            names = imports_of(path)
            if path.parent.name not in packages:
                bad = {
                    n
                    for n in names
                    if n.split(".")[0] in libraries or n.startswith(tuple(f"data.{p}" for p in packages))
                }
                assert not bad, f"{path} imports {bad}"
            others = {"mock": "ingest", "ingest": "mock"}.get(path.parent.name, "no other")
            assert not {n for n in names if n.startswith(f"data.{others}")}, path


def test_both_stages_import_where_the_sphere_and_modal_are_absent(tmp_path: Path) -> None:
    for name in ("ducc0", "healpy", "pyccl", "astropy", "modal"):
        (tmp_path / f"{name}.py").write_text(f"raise ModuleNotFoundError('no module {name}', name='{name}')\n")
    modules = "compress.stage, npe.stage, data.audit, run_compressor, run_npe, run_mock, run_ingest, run_check"
    code = f"import {modules}; print(run_npe.app)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "None"
