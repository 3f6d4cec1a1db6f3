"""--compile: the same training, or a line that says why not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import SMALL_STAGE_1

from compress.model import load_compressor

STAGE_1 = [*SMALL_STAGE_1, "--max-epochs", 2, "--norm-tiles", 500, "--warmup-steps", 10]


def test_where_nothing_can_be_compiled_the_run_says_why(
    small_tiles_dir: Path, tmp_path: Path, run_command: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    def compiled(function: Callable) -> Callable:
        raise RuntimeError("no working C++ compiler found")  # torch would remember that there is none

    monkeypatch.setattr(torch, "compile", compiled)
    options = [*STAGE_1, "--tiles-dir", small_tiles_dir, "--results-dir", tmp_path, "--compile"]
    code, _, err = run_command("run_compressor.py", *options)
    assert code == 2
    assert "--compile does not work here (no working C++ compiler found)" in err.splitlines()[-1]
    assert not list(tmp_path.rglob("*.json"))


@pytest.mark.slow
def test_a_compiled_training_ends_with_the_same_summaries(
    small_tiles_dir: Path, tmp_path: Path, run_command: Callable
) -> None:
    options = [*STAGE_1, "--tiles-dir", small_tiles_dir, "--results-dir", tmp_path]
    for tag, more in (("plain", []), ("compiled", ["--compile"])):
        assert run_command("run_compressor.py", *options, "--tag", tag, *more)[0] == 0
    plain, compiled = (
        load_compressor(tmp_path / "field_compressor_runs" / tag / "best.ckpt", torch.device("cpu"), "float32").model
        for tag in ("plain", "compiled")
    )
    kappa = torch.randn(64, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(compiled.eval()(kappa), plain.eval()(kappa), rtol=1e-3, atol=1e-3)
