"""Nothing that is read is trusted: shards, checkpoints and JSON files that somebody has changed."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ROOT, make_tiles
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from common.artifacts import read_sealed, sealed, write_json
from common.checkpoint import load_checkpoint, save_checkpoint
from common.errors import UserError
from data.norm_stats import NormStats, read_norm_stats, write_norm_stats
from data.split import make_manifest, read_manifest, write_manifest


@dataclass(frozen=True)
class Found:
    """What reading tampered shards did."""

    tried: int
    refused: int
    equal: int
    longest_s: float
    extra_memory_mb: float

    def harmless(self) -> bool:
        """Every shard was refused or read to equal arrays, both happened, soon and in the memory of an ordinary one."""
        all_told = self.tried == self.refused + self.equal and min(self.refused, self.equal) > 0
        # 64 MB: Python and pyarrow take back what they gave up; no array doubles
        return all_told and self.longest_s < 10 and self.extra_memory_mb < 64


def fuzz(n: int, seed: int) -> Found:
    """In a process of its own, which a bad shard must not kill."""
    done = subprocess.run(
        [sys.executable, "tests/fuzz.py", str(n), str(seed)], cwd=ROOT, capture_output=True, text=True, timeout=1500
    )
    lines = done.stdout.splitlines() or [""]
    assert done.returncode == 0, f"{lines[-1]}\n{done.stderr[-2000:]}"
    return Found(**json.loads(lines[-1].replace("'", '"')))


def test_tampered_shards_are_refused_or_give_equal_arrays() -> None:
    found = fuzz(200, seed=1)
    assert found.tried == 200
    assert found.harmless(), found


@pytest.mark.slow
def test_a_thousand_tampered_shards() -> None:
    found = fuzz(1000, seed=2)
    assert found.tried == 1000
    assert found.harmless(), found


def test_tampered_checkpoints_are_refused_or_equal(tmp_path: Path) -> None:
    rng, path = np.random.default_rng(0), tmp_path / "best.ckpt"
    content = {
        "weights": torch.randn(50, generator=torch.Generator().manual_seed(0)),
        "config": {"lmax": 200, "a": "b"},
    }
    save_checkpoint(path, "test", content)
    whole = path.read_bytes()
    refused = 0
    for _ in range(300):
        changed = bytearray(whole)
        for _ in range(rng.integers(1, 4)):
            changed[rng.integers(len(changed))] ^= 1 << int(rng.integers(8))
        path.write_bytes(changed[: rng.integers(len(changed))] if rng.random() < 0.2 else changed)
        try:
            found = load_checkpoint(path, "test", ("weights", "config"), "")
        except UserError:
            refused += 1
        else:
            assert torch.equal(found["weights"], content["weights"])
            assert found["config"] == content["config"]
    assert refused > 100


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=5,
)


def places(content: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) in nested JSON."""
    items = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    return [place for key, value in items for place in [(content, key), *places(value)]]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Callable[[], Any]]]:
    """JSON files of a run, and how each is read."""
    folder = tmp_path_factory.mktemp("run")
    write_manifest(folder, make_manifest(make_tiles(6, 4, 8), 42, "tile", 109))
    write_norm_stats(folder, NormStats((0.0, 0.1, 0.2, 0.3), (1.0, 1.1, 1.2, 1.3), (0.3, 0.8), (0.1, 0.2)))
    write_json(folder / "fom_result.json", sealed({"fom_fiducial_median": 1000.0, "fiducial": {"mu": [[0.3, 0.8]]}}))
    return {
        "split_manifest.json": (folder, lambda: read_manifest(folder)),
        "norm_stats.json": (folder, lambda: read_norm_stats(folder)),
        "fom_result.json": (folder, lambda: read_sealed(folder / "fom_result.json", "stage 2")),
    }


@pytest.mark.parametrize("name", ["split_manifest.json", "norm_stats.json", "fom_result.json"])
@settings(max_examples=150, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_tampered_json_is_refused_or_read_as_it_stands(
    files: dict[str, tuple[Path, Callable[[], Any]]], name: str, data: st.DataObject
) -> None:
    """A hash refuses any change; norm_stats.json has none of its own: what it says is read, or refused.

    (A change of it that makes sense is refused by the checkpoint, which knows its hash.)
    """
    folder, read = files[name]
    path = folder / name
    whole = path.read_text()
    wanted = read()
    content = json.loads(whole)
    kind = data.draw(st.sampled_from(["value", "gone", "text", "added"]))
    if kind == "text":
        position = data.draw(st.integers(0, len(whole) - 1))
        text = whole[:position] + data.draw(st.text(max_size=3)) + whole[position + data.draw(st.integers(0, 5)) :]
    else:
        container, key = data.draw(st.sampled_from(places(content)))
        if kind == "gone":
            del container[key]
        elif kind == "added":
            content["more"] = data.draw(VALUES)
        else:
            container[key] = data.draw(VALUES)
        text = json.dumps(content)
    try:
        path.write_text(text, encoding="utf-8", errors="surrogatepass")
        found = read()
    except UserError as refusal:
        found = str(refusal)
    finally:
        path.write_text(whole)
    if isinstance(found, str):
        assert len(found.splitlines()) == 1
        return
    if name == "norm_stats.json":
        numbers = [v for field in vars(found).values() for v in field]
        assert np.isfinite(numbers).all()
        assert len(numbers) == 12
    else:
        assert found == wanted
