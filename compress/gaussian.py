"""The density that both stages learn: a Gaussian with a mean and a full covariance."""

import math

import torch
from torch import nn


class CholeskyFactor(nn.Module):
    """Unconstrained numbers of a network -> the lower Cholesky factor L of a precision, Cov^-1 = L L^T.

    The numbers are the logarithms of L's diagonal, and then the rest of L row by row, so that every value of them is
    a covariance.
    """

    _below: torch.Tensor

    def __init__(self, n_params: int) -> None:
        super().__init__()
        self.n_params, self.n_numbers = n_params, n_params * (n_params + 1) // 2
        self.register_buffer("_below", torch.tril_indices(n_params, n_params, -1), persistent=False)

    def forward(self, numbers: torch.Tensor) -> torch.Tensor:
        """Numbers (B, n_numbers) -> L (B, d, d)."""
        log_diagonal, below = numbers.split([self.n_params, self._below.shape[1]], dim=-1)
        factor = torch.diag_embed(log_diagonal.exp())  # (B, d, d)
        factor[:, self._below[0], self._below[1]] = below
        return factor


def gaussian_nll(mu: torch.Tensor, factor: torch.Tensor, theta: torch.Tensor) -> torch.Tensor:
    """-ln N(theta | mu, Cov) with Cov^-1 = L L^T, (B,) in nats, for mu and theta (B, d) and the factor L (B, d, d).

    It is |L^T (theta - mu)|^2 / 2 - sum_i ln L_ii + (d / 2) ln(2 pi), so it needs no inverse.
    """
    residual = (factor.mT @ (theta - mu)[:, :, None]).squeeze(-1)  # (B, d, d) @ (B, d, 1) -> (B, d)
    log_det_factor = factor.diagonal(dim1=-2, dim2=-1).log().sum(dim=-1)  # (B,)
    return 0.5 * residual.square().sum(dim=-1) - log_det_factor + 0.5 * mu.shape[-1] * math.log(2 * math.pi)
