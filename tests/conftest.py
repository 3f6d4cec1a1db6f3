"""Shared data: a small mock suite, and a way to run a command as a user does."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable
from pathlib import Path

# Before numpy and torch are imported: tests run side by side, and pools of threads would hinder each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pytest

from data.config import NoiseLevel
from data.mock.config import MockConfig
from data.mock.cosmology import design
from data.mock.simulation import Simulation, simulate
from data.mock.suite import build_suite
from data.schema import PARAM_NAMES, nside_of
from data.tiles import Tiles
from data.write_shards import open_shard

GUARD_S = 600  # ends what hangs: ten times what the slowest guarded command takes on a busy machine
ROOT = Path(__file__).resolve().parent.parent
SHARED_DATA = ROOT.parent / "shared" / "data"
SMALL_LMAX = 32  # 16 x 16 pixels
SMALL_STAGE_1 = ["--lmax", SMALL_LMAX, "--noise-level", "noiseless", "--backbone", "tiny", "--device", "cpu"]
SMALL_SUITE = {"lmax": SMALL_LMAX, "n_sims": 60, "noise_level": "noiseless"}


@pytest.fixture(scope="session")
def small_suite(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Results folder with a suite of 60 simulations (two shards), fiducial among them, 16 x 16 pixels."""
    results = tmp_path_factory.mktemp("results")
    build_suite(MockConfig(results_dir=str(results), **SMALL_SUITE))
    return results


@pytest.fixture
def small_tiles_dir(small_suite: Path) -> Path:
    return small_suite / "tiles" / f"lmax_{SMALL_LMAX}_noiseless"


@pytest.fixture
def run_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    """Run `run_x.py options...` in this process: (exit code, stdout, stderr)."""

    def run(script: str, *options: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", [script, *map(str, options)])
        capsys.readouterr()
        try:
            importlib.import_module(script.removesuffix(".py")).main()
            code = 0
        except SystemExit as stop:
            code = int(stop.code or 0)
        out, err = capsys.readouterr()
        return code, out, err

    return run


def make_tiles(
    n_sims: int, nside: int, lmax: int, seed: int = 0, noise_level: str = "des_y3", n_bins: int = 4
) -> Tiles:
    """Tiles of random numbers with consistent labels, 12 a simulation, simulation 109 among them."""
    rng = np.random.default_rng(seed)
    sims = np.arange(1, n_sims + 1)
    if n_sims < 109:
        sims[-1] = 109
    sim_id = np.repeat(sims, 12)
    orientation = np.tile(np.repeat(np.arange(3), 4), n_sims)
    tile = np.tile(np.arange(4), 3 * n_sims)
    keys = np.stack([sim_id, orientation, tile], axis=1)
    per_sim = rng.uniform(0.3, 0.9, (n_sims, len(PARAM_NAMES)))
    per_sim[:, 2] = per_sim[:, 1] * np.sqrt(per_sim[:, 0] / 0.3)
    kappa = rng.standard_normal((len(keys), n_bins, nside, nside)).astype(np.float32)
    return Tiles(kappa, keys, np.repeat(per_sim, 12, axis=0), lmax, noise_level)


def simulated(
    lmax: int, noise_level: NoiseLevel, geometry: str = "disjoint", n_sims: int = 2, seed: int = 1
) -> np.ndarray:
    """Tiles (12 n_sims, 4, N, N) of mock simulations."""
    sim_ids, cosmologies = design(n_sims, 42, 109, "all")
    rest = ("lognormal", noise_level, lmax, nside_of(lmax), geometry, seed)
    return np.concatenate(
        [simulate(Simulation(int(i), cosmo, *rest)) for i, cosmo in zip(sim_ids, cosmologies, strict=True)]
    )


def write_tiles(folder: Path, tiles: Tiles, rows_per_shard: int, metadata: dict[str, str] | None = None) -> None:
    """Write tiles as compact shards of so many rows."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, start in enumerate(range(0, len(tiles.keys), rows_per_shard)):
        part = slice(start, start + rows_per_shard)
        with open_shard(folder / f"shard_{number:04d}.parquet", metadata or {}) as shard:
            shard.write(tiles.kappa[part], tiles.keys[part], tiles.params[part], tiles.noise_level)
