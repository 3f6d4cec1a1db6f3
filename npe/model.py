"""GaussianNPE: a Gaussian posterior for theta whose mean and full covariance depend on the summary."""

from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from torch import nn

from common.checkpoint import load_checkpoint, save_checkpoint
from common.errors import UserError
from compress.gaussian import CholeskyFactor, gaussian_nll
from data.norm_stats import NormStats
from data.schema import FOM_PARAMS
from npe.config import NPEConfig

HIDDEN = 64
CHECKPOINT_NAME = "npe_best.ckpt"
KIND = "npe"
CURE = "run stage 2 again, with --restart"


class GaussianNPE(nn.Module):
    """Summary s -> q(theta | s) = N(mu(s), Cov(s)), everything in normalised theta.

    The network gives mu and the numbers of CholeskyFactor, the factor L of the precision. As 1 / sqrt(det Cov) is the
    product of L's diagonal, neither the loss nor the volume of the posterior needs an inverse. The summary has d
    numbers, as theta has, and is stage 1's estimate of it: training begins at mu = s. Without hidden layers mu and the
    numbers are affine in the summary.
    """

    def __init__(self, n_params: int, hidden_layers: int = 2) -> None:
        super().__init__()
        self.n_params, self.factor = n_params, CholeskyFactor(n_params)
        sizes = [n_params, *[HIDDEN] * hidden_layers]
        hidden = (layer for a, b in pairwise(sizes) for layer in (nn.Linear(a, b), nn.SiLU()))
        last = nn.Linear(sizes[-1], n_params + self.factor.n_numbers)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        self.change = nn.Sequential(*hidden, last)

    def forward(self, summary: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Summaries (B, d) -> mu (B, d) and the precision's Cholesky factor L (B, d, d)."""
        change, numbers = self.change(summary).split([self.n_params, self.factor.n_numbers], dim=-1)
        return summary + change, self.factor(numbers)

    def nll(self, summary: torch.Tensor, theta: torch.Tensor) -> torch.Tensor:
        """-ln q(theta | summary) per tile, (B,), in nats for normalised theta."""
        mu, factor = self(summary)
        return gaussian_nll(mu, factor, theta)


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
    def cov_of_fom(self) -> np.ndarray:
        """Covariance of (Omega_m, S8), (n, 2, 2)."""
        return self.cov[:, self.of_fom][:, :, self.of_fom]

    @property
    def fom(self) -> np.ndarray:
        """Figure of Merit 1 / sqrt(det Cov(Omega_m, S8)), (n,)."""
        if len(self.params) == len(FOM_PARAMS):
            return self.inverse_volume
        return 1 / np.sqrt(np.linalg.det(self.cov_of_fom))

    def squared_distances_of_fom(self, theta: np.ndarray) -> np.ndarray:
        """Squared Mahalanobis distances of the truth theta (n, d) in (Omega_m, S8), whatever the rest is: (n,)."""
        residual = (self.mu - theta)[:, self.of_fom]  # (n, 2)
        return np.einsum("ni,nij,nj->n", residual, np.linalg.inv(self.cov_of_fom), residual)

    def nll(self, theta: np.ndarray) -> np.ndarray:
        """-ln p(Omega_m, S8) of the truth theta (n, d), marginalised over the rest, physical units, in nats: (n,)."""
        return self.squared_distances_of_fom(theta) / 2 + np.log(2 * np.pi) - np.log(self.fom)

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
    try:
        layers = NPEConfig(**content["config"]).hidden_layers
        members = [GaussianNPE(n_params, layers).to(device).eval() for _ in content["members"]]
        for npe, weights in zip(members, content["members"], strict=True):
            npe.load_state_dict(weights)
    except (RuntimeError, TypeError):
        raise UserError(f"{path} does not fit this version's network; {CURE}") from None
    return members
