"""Losses of stage 1, against the exact posterior of a linear-Gaussian problem."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import SMALL_LMAX
from test_npe import THREE, TWO, LinearGaussian
from test_pipeline import copy_tiles

from compress.loss import GaussianNLL
from data.dataset import TileDataset


def summaries_of(dataset: TileDataset) -> tuple[torch.Tensor, torch.Tensor]:
    """What the tiles of LinearGaussian hold beside noise, and theta: (n, d) each."""
    d = dataset.theta.shape[1]
    assert isinstance(dataset.source, torch.Tensor)
    return dataset.source[:, :d].mean(dim=(2, 3)), dataset.theta


@pytest.mark.parametrize("toy", [TWO, THREE], ids=["two", "three"])
def test_nll_reaches_the_exact_posterior_of_a_linear_gaussian_problem(toy: LinearGaussian) -> None:
    """The best summary is the posterior's mean, the best factor its precision's, and the loss its entropy."""
    d = len(toy.mixing)
    given, theta = summaries_of(toy.draw(20_000, 1))
    torch.manual_seed(0)
    network, loss = torch.nn.Linear(d, d), GaussianNLL(d)
    optimizer = torch.optim.Adam([*network.parameters(), *loss.parameters()], lr=1e-2)
    for _ in range(400):
        value = loss(network(given), theta)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()

    given, theta = summaries_of(toy.draw(20_000, 2))
    with torch.no_grad():
        summary = network(given)
        factor = loss.factor(loss.mlp(summary)).double().numpy()  # (n, d, d)
        entropy = 0.5 * np.linalg.slogdet(2 * np.pi * np.e * toy.cov)[1]
        assert float(loss(summary, theta)) == pytest.approx(entropy, abs=0.02)
        assert float(loss(summary, theta, "sum")) == pytest.approx(20_000 * float(loss(summary, theta)), rel=1e-5)
    sigma = np.sqrt(np.diag(toy.cov))
    assert (np.abs(summary.numpy() - toy.mu(given.double().numpy())) / sigma).mean() < 0.05
    cov = np.linalg.inv(factor @ factor.transpose(0, 2, 1))
    np.testing.assert_allclose(
        np.median(cov, axis=0) / np.outer(sigma, sigma), toy.cov / np.outer(sigma, sigma), atol=0.06
    )


def test_stage_1_stops_by_the_loss_that_it_trains_and_says_both(
    small_suite: Path, tmp_path: Path, run_command: Callable
) -> None:
    copy_tiles(small_suite, tmp_path)
    options = ["--lmax", SMALL_LMAX, "--noise-level", "noiseless", "--backbone", "tiny", "--max-epochs", 6]
    code, out, err = run_command("run_compressor.py", "--results-dir", tmp_path, *options, "--loss", "nll")
    assert code == 0, err
    run = tmp_path / "field_compressor_runs" / f"field_nll_lmax{SMALL_LMAX}_noiseless_tiny"
    result = json.loads((run / "result.json").read_text())
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert result["val_nll"] == pytest.approx(min(m["val_nll"] for m in metrics), rel=1e-4)
    assert "NLL" in out
    code, _, err = run_command("run_npe.py", "--ckpt", run / "best.ckpt", "--max-epochs", 2)
    assert code == 0, err
    report = (tmp_path / "field_npe_runs" / run.name / "report.html").read_text()
    assert f"{result['val_nll']:.4f} nats" in report
