"""Members of stage 2: each learns as if alone; their mixture and divergence against direct integration."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from npe.combine import combine_runs
from scipy.stats import multivariate_normal
from test_npe import CPU, LinearGaussian, MeanCompressor, Splits

from common.artifacts import sealed, write_json
from common.device import seeded_generator
from common.errors import UserError
from common.resume import LastCheckpoint
from npe.compressed import CompressedTileDataModule
from npe.config import NPEConfig
from npe.ensemble import gaussian_kl, mixture, worst_divergence
from npe.model import Posterior, load_npe
from npe.train import fit


def posterior(mu: list[float], cov: list[list[float]]) -> Posterior:
    return Posterior(np.array([mu]), np.array([cov]), 1 / np.sqrt(np.linalg.det(np.array([cov]))))


ONE = posterior([0.30, 0.80], [[0.0009, -0.0004], [-0.0004, 0.0008]])
OTHER = posterior([0.33, 0.78], [[0.0012, -0.0007], [-0.0007, 0.0007]])


def train(folder: Path, n_members: int) -> list[dict[str, torch.Tensor]]:
    folder.mkdir()
    toy = LinearGaussian(np.array([[0.9, 0.2], [-0.3, 0.7]]), np.array([[0.10, 0.12], [0.12, 0.20]]))
    splits = Splits(toy.draw(600, 1), toy.draw(100, 2), toy.draw(20, 3))
    compressed = CompressedTileDataModule(splits, MeanCompressor(), seeded_generator(0, "augment"))  # type: ignore[arg-type]
    # So little patience that members stop at different epochs.
    config = NPEConfig(ckpt="none", max_epochs=120, patience=3, learning_rate=1e-2, n_members=n_members)
    fit(compressed, config, "none", LastCheckpoint(folder, {}, "npe_best.ckpt", CPU), CPU)
    return [npe.state_dict() for npe in load_npe(folder / "npe_best.ckpt", CPU)]


def test_a_member_learns_the_same_alone_and_among_others(tmp_path: Path) -> None:
    alone, several = train(tmp_path / "alone", 1), train(tmp_path / "several", 4)
    assert len(several) == 4
    for name, tensor in alone[0].items():
        assert torch.equal(tensor, several[0][name]), name
        for other in several[1:]:
            assert not torch.equal(tensor, other[name]), name


def test_mixture_and_divergence_agree_with_draws() -> None:
    rng = np.random.default_rng(0)
    p, q = (multivariate_normal(x.mu[0], x.cov[0], seed=rng) for x in (ONE, OTHER))
    draws = p.rvs(400_000)
    assert gaussian_kl(ONE, OTHER)[0] == pytest.approx(np.mean(p.logpdf(draws) - q.logpdf(draws)), rel=0.01)
    assert gaussian_kl(ONE, ONE)[0] == pytest.approx(0, abs=1e-12)
    assert worst_divergence([ONE, OTHER]) == max(gaussian_kl(ONE, OTHER)[0], gaussian_kl(OTHER, ONE)[0])

    both = np.concatenate([draws, q.rvs(400_000)])
    mixed = mixture([ONE, OTHER])
    np.testing.assert_allclose(mixed.mu[0], both.mean(axis=0), atol=2e-4)
    np.testing.assert_allclose(mixed.cov[0], np.cov(both.T), rtol=0.01)
    assert mixed.fom[0] == pytest.approx(1 / np.sqrt(np.linalg.det(mixed.cov[0])))
    assert mixed.fom[0] < min(ONE.fom[0], OTHER.fom[0])  # disagreement costs information


def test_combining_runs_recovers_their_scatter_and_refuses_strangers(tmp_path: Path) -> None:
    def run(name: str, seed: int, scale: float, **changed: object) -> Path:
        mu, cov = [[0.3, 0.8]] * 3, (np.array([ONE.cov[0]] * 3) / scale).tolist()
        fom = (1 / np.sqrt(np.linalg.det(cov))).tolist()
        result = {
            "lmax": 200,
            "noise_level": "des_y3",
            "manifest_sha256": "abc",
            "compressor_checkpoint": f"{name}/best.ckpt",
        }
        result |= {"config": {"seed": seed}, "fiducial": {"mu": mu, "cov": cov}, "fom_fiducial_all": fom, **changed}
        (tmp_path / name).mkdir()
        write_json(tmp_path / name / "fom_result.json", sealed(result))
        return tmp_path / name

    runs = [run(f"seed_{i}", i, scale) for i, scale in enumerate((0.9, 1.0, 1.1))]
    combined = combine_runs(runs)
    assert combined["fom_fiducial_mean"] == pytest.approx(ONE.fom[0])
    assert combined["fom_fiducial_std"] == pytest.approx(0.1 * ONE.fom[0])
    # Equal means: the mixture's covariance is the mean of theirs.
    assert combined["ensemble"]["mixture"]["fom_fiducial_median"] == pytest.approx(
        ONE.fom[0] / np.mean([1 / 0.9, 1, 1 / 1.1])
    )
    for stranger, said in (
        (run("other_split", 7, 1.0, manifest_sha256="def"), "manifest_sha256"),
        (run("other_lmax", 8, 1.0, lmax=400), "lmax"),
        (run("twin", 1, 1.0, compressor_checkpoint="seed_1/best.ckpt"), "twice"),
    ):
        with pytest.raises(UserError, match=said):
            combine_runs([*runs, stranger])
    with pytest.raises(UserError, match="two or more"):
        combine_runs(runs[:1])
