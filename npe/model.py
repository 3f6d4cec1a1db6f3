"""GaussianNPE: a Gaussian posterior for theta whose mean and full covariance depend on the summary."""

import math
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

from common.checkpoint import load_checkpoint, save_checkpoint
from common.errors import UserError
from data.norm_stats import NormStats
from data.schema import FOM_PARAMS
from npe.config import NPEConfig

HIDDEN = 64
CHECKPOINT_NAME = "npe_best.ckpt"
KIND = "npe"
CURE = "run stage 2 again, with --restart"


class GaussianNPE(nn.Module):
    """Summary s -> q(theta | s) = N(mu(s), Cov(s)), everything in normalised theta.

    The network gives mu and the lower Cholesky factor L of the precision, Cov^-1 = L L^T, as the logarithm of L's
    diagonal and the rest of L. Then for d parameters

        -ln q = |L^T (theta - mu)|^2 / 2 - sum_i ln L_ii + (d / 2) ln(2 pi)
        1 / sqrt(det Cov) = prod_i L_ii

    so neither the loss nor the volume of the posterior needs an inverse. The summary has d numbers, as theta has.
    """

    _below: torch.Tensor

    def __init__(self, n_params: int) -> None:
        super().__init__()
        self.n_params = n_params
        n_offdiagonal = n_params * (n_params - 1) // 2
        self.mlp = nn.Sequential(
            nn.Linear(n_params, HIDDEN),
            nn.SiLU(),
            nn.Linear(HIDDEN, HIDDEN),
            nn.SiLU(),
            nn.Linear(HIDDEN, 2 * n_params + n_offdiagonal),
        )
        self.register_buffer("_below", torch.tril_indices(n_params, n_params, -1), persistent=False)

    def forward(self, summary: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Summaries (B, d) -> mu (B, d) and the precision's Cholesky factor L (B, d, d)."""
        sizes = [self.n_params, self.n_params, self._below.shape[1]]
        mu, log_diagonal, offdiagonal = self.mlp(summary).split(sizes, dim=-1)
        factor = torch.diag_embed(log_diagonal.exp())  # (B, d, d)
        factor[:, self._below[0], self._below[1]] = offdiagonal
        return mu, factor

    def nll(self, summary: torch.Tensor, theta: torch.Tensor) -> torch.Tensor:
        """-ln q(theta | summary) per tile, (B,), in nats for normalised theta."""
        mu, factor = self(summary)
        residual = (factor.mT @ (theta - mu)[:, :, None]).squeeze(-1)  # (B, d, d) @ (B, d, 1) -> (B, d)
        log_det_factor = factor.diagonal(dim1=-2, dim2=-1).log().sum(dim=-1)  # (B,)
        return 0.5 * residual.square().sum(dim=-1) - log_det_factor + 0.5 * self.n_params * math.log(2 * math.pi)


@dataclass(frozen=True)
class Posterior:
    """Gaussian posteriors of n tiles for d parameters in physical units, float64."""

    params: tuple[str, ...]  # names
    mu: np.ndarray  # (n, d)
    cov: np.ndarray  # (n, d, d)
    inverse_volume: np.ndarray  # 1 / sqrt(det cov), (n,)

    @property
    def of_fom(self) -> list[int]:
        """Positions of Omega_m and S8 among the parameters; the others are marginalised over."""
        return [self.params.index(name) for name in FOM_PARAMS]

    @property
    def fom(self) -> np.ndarray:
        """Figure of Merit 1 / sqrt(det Cov(Omega_m, S8)), (n,)."""
        if len(self.params) == len(FOM_PARAMS):
            return self.inverse_volume
        return 1 / np.sqrt(np.linalg.det(self.cov[:, self.of_fom][:, :, self.of_fom]))

    @property
    def sigma(self) -> np.ndarray:
        """Marginal standard deviations, (n, d)."""
        return np.sqrt(np.diagonal(self.cov, axis1=1, axis2=2))


def posterior_of_moments(params: tuple[str, ...], mu: np.ndarray, cov: np.ndarray) -> Posterior:
    """Gaussian posteriors with means (n, d) and covariances (n, d, d)."""
    return Posterior(params, mu, cov, 1 / np.sqrt(np.linalg.det(cov)))


@torch.no_grad()
def predict_posterior(
    npe: GaussianNPE, summary: torch.Tensor, params: tuple[str, ...], norm_stats: NormStats
) -> Posterior:
    """Posteriors of theta for summaries (n, d).

    With theta = theta_mean + theta_std * normalised, sqrt(det Cov) grows by prod(theta_std).
    """
    mu, factor = (t.cpu().double().numpy() for t in npe(summary))  # (n, d), (n, d, d)
    theta_std = np.array(norm_stats.theta_std)
    inverse = np.linalg.inv(factor)  # (n, d, d)
    cov = inverse.transpose(0, 2, 1) @ inverse * np.outer(theta_std, theta_std)  # (n, d, d)
    inverse_volume = np.diagonal(factor, axis1=1, axis2=2).prod(axis=1) / np.prod(theta_std)  # (n,)
    return Posterior(params, norm_stats.physical_theta(mu), cov, inverse_volume)


def save_npe(path: Path, members: list[GaussianNPE], config: NPEConfig, epoch: int, test_nll: float) -> None:
    """Write npe_best.ckpt: the weights of every member, and when the first was at its best."""
    weights = [npe.state_dict() for npe in members]
    about = {"compressor_checkpoint": config.compressor_checkpoint, "epoch": epoch, "test_nll": test_nll}
    save_checkpoint(path, KIND, {"members": weights, "config": asdict(config), **about})


def load_npe(path: Path, n_params: int, device: torch.device) -> list[GaussianNPE]:
    """Read npe_best.ckpt: the members in evaluation mode, of which the first gives the Figure of Merit.

    Raises:
        UserError: not an NPE checkpoint.
    """
    content = load_checkpoint(path, KIND, ("members", "config"), CURE)
    members = [GaussianNPE(n_params).to(device).eval() for _ in content["members"]]
    try:
        for npe, weights in zip(members, content["members"], strict=True):
            npe.load_state_dict(weights)
    except (RuntimeError, TypeError):
        raise UserError(f"{path} does not fit this version's network; {CURE}") from None
    return members
