"""--noiseless-tiles: every training tile is its own signal with the noise of another tile of its split."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_tiles, simulated, write_tiles

from common.errors import UserError
from data.config import NoiseLevel, SplitOptions, TilesOn
from data.dataset import batches
from data.mock.config import MockConfig
from data.mock.suite import build_suite
from data.module import SplitTiles, TileDataModule
from data.noiseless import LARGEST_SLOPE, slope_on_signal
from data.read_shards import read_tiles
from data.schema import FOM_PARAMS, noise_cl

CPU = torch.device("cpu")
LMAX, NSIDE = 32, 16


def coded_suite(folder: Path) -> tuple[Path, Path]:
    """Tiles and their signals: of tile i the signal is i everywhere, the noise a checkerboard of i/1000 and -i/1000."""
    tiles = make_tiles(10, NSIDE, LMAX)
    number = np.arange(120, dtype=np.float32)[:, None, None, None]
    checkers = (-1.0) ** np.add.outer(np.arange(NSIDE), np.arange(NSIDE))
    signal = number + 0 * tiles.kappa
    write_tiles(folder / "signal", replace(tiles, kappa=signal, noise_level="noiseless"), 50)
    write_tiles(folder / "noisy", replace(tiles, kappa=(signal + number / 1000 * checkers).astype(np.float32)), 50)
    return folder / "noisy", folder / "signal"


def split_tiles(tiles_dir: Path, noiseless_dir: Path | None, tiles_on: TilesOn = "auto") -> SplitTiles:
    options = SplitOptions(lmax=LMAX, noise_level="des_y3", split_seed=1)
    module = TileDataModule(tiles_dir, options, FOM_PARAMS, device=CPU, tiles_on=tiles_on, noiseless_dir=noiseless_dir)
    return module.setup()


@pytest.mark.parametrize("tiles_on", ["device", "disk"])
def test_signals_keep_their_theta_and_noise_comes_from_the_whole_split_and_nowhere_else(
    tmp_path: Path, tiles_on: TilesOn
) -> None:
    data = split_tiles(*coded_suite(tmp_path), tiles_on)
    stats = data.norm_stats
    train = data.compressor_train_ds
    pairs: list[tuple[int, int]] = []
    augmented = train.augmented(torch.Generator().manual_seed(0))
    for _ in range(30):
        order = torch.Generator().manual_seed(len(pairs))
        for kappa, theta in batches(augmented, 32, order):
            physical = kappa.permute(0, 2, 3, 1) * torch.tensor(stats.tile_std) + torch.tensor(stats.tile_mean)
            signal = physical.mean(dim=(1, 2, 3)).round().long()
            noise = (1000 * (physical - signal[:, None, None, None])).abs().mean(dim=(1, 2, 3)).round().long()
            assert torch.equal(theta, train.theta[signal])
            pairs += zip(signal.tolist(), noise.tolist(), strict=True)
    members = set(train.rows.tolist())
    assert {signal for signal, _ in pairs} == members
    assert {noise for _, noise in pairs} == members
    same = sum(signal == noise for signal, noise in pairs)
    assert same < 4 * len(pairs) / len(members)  # chance

    plain = split_tiles(tmp_path / "noisy", None)
    for name in ("npe_train_ds", "test_ds", "compressor_train_ds"):  # what is not augmented is left alone
        ours, theirs = (getattr(one, name) for one in (data, plain))
        assert torch.equal(ours.__getitems__(range(4))[0], theirs.__getitems__(range(4))[0])


def test_a_mock_suite_and_its_noiseless_one_differ_by_noise_of_the_stated_power(tmp_path: Path) -> None:
    folders = {}
    for level in ("des_y3", "noiseless"):
        folders[level] = tmp_path / level
        build_suite(MockConfig(tiles_dir=str(tmp_path / level), lmax=LMAX, n_sims=12, noise_level=level))
    split_tiles(folders["des_y3"], folders["noiseless"])  # accepted
    noisy, clean = (read_tiles(folder, LMAX, level) for level, folder in folders.items())
    noise = (noisy.kappa - clean.kappa).astype(np.float64)
    ell = np.arange(LMAX + 1)
    expected = noise_cl("des_y3", 4) * (2 * ell + 1).sum() / (4 * np.pi)  # (4,) variance of white noise up to lmax
    np.testing.assert_allclose(noise.var(axis=(0, 2, 3)), expected, rtol=0.02)


@pytest.mark.parametrize("noise_level", ["lsst_y10", "des_y3", "des_y3_survey"])
@pytest.mark.parametrize("lmax", [32, 100])
def test_noise_is_known_from_another_sky_however_weak_it_is(lmax: int, noise_level: NoiseLevel) -> None:
    for seed in range(6):
        noisy, clean, other = (
            simulated(lmax, level, n_sims=6, seed=s)
            for level, s in ((noise_level, seed), ("noiseless", seed), ("noiseless", seed + 100))
        )
        assert np.abs(slope_on_signal(noisy, clean)).max() < 0.5 * LARGEST_SLOPE
        assert (slope_on_signal(noisy, other) < -1.5 * LARGEST_SLOPE).all()


@pytest.mark.parametrize("change", ["sky", "simulations", "fewer"])
def test_other_skies_and_other_simulations_are_refused(
    change: str, tmp_path: Path, run_command: Callable[..., tuple[int, str, str]]
) -> None:
    options = {"lmax": LMAX, "n_sims": 30}
    build_suite(MockConfig(tiles_dir=str(tmp_path / "noisy"), **options))  # type: ignore[arg-type]
    other = {"sky": {}, "simulations": {"seed": 43}, "fewer": {"n_sims": 29}}[change]
    clean = tmp_path / "clean"
    build_suite(MockConfig(tiles_dir=str(clean), noise_level="noiseless", **options | other))  # type: ignore[arg-type]
    if change == "sky":  # the same labels on another sky
        tiles = read_tiles(clean, LMAX, "noiseless")
        for path in clean.glob("*.parquet"):
            path.unlink()
        write_tiles(clean, replace(tiles, kappa=np.roll(tiles.kappa, 5, axis=2)), 100)
    code, _, err = run_command(
        "run_compressor.py", "--lmax", LMAX, "--tiles-dir", tmp_path / "noisy", "--noiseless-tiles", clean,
        "--backbone", "tiny", "--results-dir", tmp_path / "results", "--max-epochs", 1,
    )  # fmt: skip
    assert code == 2
    assert "--noiseless-tiles" in err.splitlines()[-1]
    assert "one suite" in err
    assert not (tmp_path / "results").exists()


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    noisy, _ = coded_suite(tmp_path)
    with pytest.raises(UserError, match=r"--noiseless-tiles .*nowhere has no shard"):
        split_tiles(noisy, tmp_path / "nowhere")
