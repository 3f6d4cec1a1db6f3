"""Losses of stage 1: what makes a summary a good one."""

import torch
from torch import nn
from torch.nn import functional

from compress.config import Loss
from compress.gaussian import CholeskyFactor, gaussian_nll

HIDDEN = 64


class MeanSquaredError(nn.Module):
    """Mean squared error of the summary as an estimate of normalised theta, over tiles and parameters."""

    def __init__(self, n_params: int) -> None:
        super().__init__()
        self.terms_per_tile = n_params

    def forward(self, summary: torch.Tensor, theta: torch.Tensor, reduction: str = "mean") -> torch.Tensor:
        """The "mean" or "sum" of the terms of a batch, from (B, d) and (B, d)."""
        return functional.mse_loss(summary, theta, reduction=reduction)


class GaussianNLL(nn.Module):
    """-ln N(theta | summary, Cov(summary)) in nats: the mean is the summary, a small MLP of it gives the covariance.

    Variational mutual information maximisation (Jeffrey, Alsing & Lanusse 2021, arXiv:2009.08459): the
    smaller this loss, the more the summary knows of theta. The mean squared error spends itself on the parameter that
    is badly known; this weighs every direction by how well it is known. Stage 2 learns a posterior of its own.
    """

    terms_per_tile = 1

    def __init__(self, n_params: int) -> None:
        super().__init__()
        self.factor = CholeskyFactor(n_params)
        self.mlp = nn.Sequential(nn.Linear(n_params, HIDDEN), nn.SiLU(), nn.Linear(HIDDEN, self.factor.n_numbers))

    def forward(self, summary: torch.Tensor, theta: torch.Tensor, reduction: str = "mean") -> torch.Tensor:
        """The "mean" or "sum" over the tiles of a batch, from (B, d) and (B, d)."""
        nll = gaussian_nll(summary, self.factor(self.mlp(summary)), theta)  # (B,)
        return nll.mean() if reduction == "mean" else nll.sum()


LOSSES: dict[Loss, type[MeanSquaredError] | type[GaussianNLL]] = {"mse": MeanSquaredError, "nll": GaussianNLL}
