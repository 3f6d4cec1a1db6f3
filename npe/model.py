"""GaussianNPE: a Gaussian posterior for theta whose mean and full covariance depend on the summary."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

from common.checkpoint import load_checkpoint, save_checkpoint
from common.errors import UserError
from data.norm_stats import NormStats
from data.schema import THETA_NAMES
from npe.config import NPEConfig

N_THETA = len(THETA_NAMES)
HIDDEN = 64
CHECKPOINT_NAME = "npe_best.ckpt"
KIND = "npe"
CURE = "run stage 2 again, with --restart"


class GaussianNPE(nn.Module):
    """Summary s -> q(theta | s) = N(mu(s), Cov(s)), everything in normalised theta.

    The network gives mu and the lower Cholesky factor L of the precision, Cov^-1 = L L^T, with the
    logarithm of L's diagonal as output. Then for d parameters

        -ln q = |L^T (theta - mu)|^2 / 2 - sum_i ln L_ii + (d / 2) ln(2 pi)
        1 / sqrt(det Cov) = prod_i L_ii

    so neither the loss nor the Figure of Merit needs an inverse.
    """

    _below: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        n_offdiagonal = N_THETA * (N_THETA - 1) // 2
        self.mlp = nn.Sequential(
            nn.Linear(N_THETA, HIDDEN),
            nn.SiLU(),
            nn.Linear(HIDDEN, HIDDEN),
            nn.SiLU(),
            nn.Linear(HIDDEN, 2 * N_THETA + n_offdiagonal),
        )
        self.register_buffer("_below", torch.tril_indices(N_THETA, N_THETA, -1), persistent=False)

    def forward(self, summary: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Summaries (B, 2) -> mu (B, 2) and the precision's Cholesky factor L (B, 2, 2)."""
        mu, log_diagonal, offdiagonal = self.mlp(summary).split([N_THETA, N_THETA, self._below.shape[1]], dim=-1)
        factor = torch.diag_embed(log_diagonal.exp())  # (B, 2, 2)
        factor[:, self._below[0], self._below[1]] = offdiagonal
        return mu, factor

    def nll(self, summary: torch.Tensor, theta: torch.Tensor) -> torch.Tensor:
        """-ln q(theta | summary) per tile, (B,), in nats for normalised theta."""
        mu, factor = self(summary)
        residual = (factor.mT @ (theta - mu)[:, :, None]).squeeze(-1)  # (B, 2, 2) @ (B, 2, 1) -> (B, 2)
        log_det_factor = factor.diagonal(dim1=-2, dim2=-1).log().sum(dim=-1)  # (B,)
        return 0.5 * residual.square().sum(dim=-1) - log_det_factor + 0.5 * N_THETA * math.log(2 * math.pi)


@dataclass(frozen=True)
class Posterior:
    """Gaussian posteriors in physical units: mu (n, 2), cov (n, 2, 2), fom (n,); float64."""

    mu: np.ndarray
    cov: np.ndarray
    fom: np.ndarray


@torch.no_grad()
def predict_posterior(npe: GaussianNPE, summary: torch.Tensor, norm_stats: NormStats) -> Posterior:
    """Posteriors of (Omega_m, S8) for summaries (n, 2)."""
    mu, factor = (t.cpu().double().numpy() for t in npe(summary))  # (n, 2), (n, 2, 2)
    theta_std = np.array(norm_stats.theta_std)
    inverse = np.linalg.inv(factor)  # (n, 2, 2)
    cov = inverse.transpose(0, 2, 1) @ inverse * np.outer(theta_std, theta_std)  # (n, 2, 2)
    return Posterior(norm_stats.physical_theta(mu), cov, predict_fom(npe, summary, norm_stats))


@torch.no_grad()
def predict_fom(npe: GaussianNPE, summary: torch.Tensor, norm_stats: NormStats) -> np.ndarray:
    """Figure of Merit 1 / sqrt(det Cov(Omega_m, S8)) in physical units, float64 (n,).

    With theta = theta_mean + theta_std * normalised, sqrt(det Cov) grows by prod(theta_std).
    """
    _, factor = npe(summary)
    fom_normalised = factor.cpu().double().diagonal(dim1=-2, dim2=-1).prod(dim=-1)  # (n,)
    return fom_normalised.numpy() / np.prod(norm_stats.theta_std)


def save_npe(
    path: Path,
    weights: list[dict[str, torch.Tensor]],
    config: NPEConfig,
    compressor_checkpoint: str,
    epoch: int,
    test_nll: float,
) -> None:
    """Write npe_best.ckpt: the weights of every member, and when the first was at its best."""
    content = {
        "members": weights,
        "config": asdict(config),
        "compressor_checkpoint": compressor_checkpoint,
        "epoch": epoch,
        "test_nll": test_nll,
    }
    save_checkpoint(path, KIND, content)


def load_npe(path: Path, device: torch.device) -> list[GaussianNPE]:
    """Read npe_best.ckpt: the members in evaluation mode; the Figure of Merit is that of the first.

    Raises:
        UserError: not an NPE checkpoint.
    """
    content = load_checkpoint(path, KIND, ("members", "config"), CURE)
    members = [GaussianNPE().to(device).eval() for _ in content["members"]]
    try:
        for npe, weights in zip(members, content["members"], strict=True):
            npe.load_state_dict(weights)
    except (RuntimeError, TypeError):
        raise UserError(f"{path} does not fit this version's network; {CURE}") from None
    return members
