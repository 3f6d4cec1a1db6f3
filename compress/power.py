"""PowerFilters: a network that sees a tile's power spectra and nothing else, or these and third moments."""

from typing import Any

import torch
from torch import nn
from torch.nn import functional

from common.errors import UserError

N_SCALES, FILTERS_PER_SCALE, FILTER_WIDTH, HIDDEN = 5, 24, 5, 64
SMALLEST_SIDE = FILTER_WIDTH // 2 * 2 ** (N_SCALES - 1)  # pixels: the coarsest scale is then as wide as its padding
SOFTENING = 1e-4  # of the variance of a normalised pixel; keeps the logarithm finite for a constant tile
BINOMIAL = (0.125, 0.375, 0.375, 0.125)  # smooths away what a grid of half as many pixels would alias


class SymmetricConv2d(nn.Conv2d):
    """A convolution whose kernel is the mean of its weight over the eight symmetries of the square."""

    def forward(self, kappa: torch.Tensor) -> torch.Tensor:
        kernel = self.weight + self.weight.mT
        kernel = kernel + kernel.flip(2)
        kernel = (kernel + kernel.flip(3)) / 8
        return functional.conv2d(kappa, kernel)


class SquaresAndCubes(torch.autograd.Function):
    """Means over the pixels of the squares and the cubes of a response: (B, C, N, N) -> (B, C) and (B, C).

    Its gradient is written out because it needs one array as large as the response. PyTorch's own makes one for every
    power and every mean, and all of training then takes two and a half times as long.
    """

    @staticmethod
    def forward(ctx: Any, response: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        ctx.save_for_backward(response)
        powers = response.square()
        squares = powers.mean(dim=(2, 3))
        return squares, powers.mul_(response).mean(dim=(2, 3))

    @staticmethod
    def backward(ctx: Any, of_squares: torch.Tensor, of_cubes: torch.Tensor) -> torch.Tensor:
        (response,) = ctx.saved_tensors
        of_squares, of_cubes = (g[..., None, None] / response[0, 0].numel() for g in (of_squares, of_cubes))
        return (response * (3 * of_cubes)).add_(2 * of_squares).mul_(response)  # (2 r g_2 + 3 r^2 g_3) / N^2


def features_of_powers(n_powers: int) -> nn.Sequential:
    """A small network from logarithms of powers, or the like, (B, n_powers) to features (B, HIDDEN)."""
    return nn.Sequential(
        nn.BatchNorm1d(n_powers), nn.Linear(n_powers, HIDDEN), nn.SiLU(), nn.Linear(HIDDEN, HIDDEN), nn.SiLU()
    )


class PowerFilters(nn.Module):
    """Tile (B, n_bins, N, N) -> features (B, HIDDEN).

    At each of five scales, every one half as fine as the one before, linear filters mix the bins, and their responses
    are squared and averaged. These are auto- and cross-spectra in bands; the bands and the mixtures are learned. Their
    logarithms go through a small MLP. A Gaussian field on a periodic tile has no other information, and there is much
    less to learn than for a deep network. With `skewness` there is also the mean cube of every response, over its power
    to 3/2: third moments of filtered maps, auto and cross, which tell cosmologies of one spectrum apart. The filters
    have the symmetries of the square, so that turning or flipping a tile changes nothing.
    """

    def __init__(self, n_bins: int, skewness: bool = False) -> None:
        super().__init__()
        self.skewness = skewness
        self.filters = nn.ModuleList(
            SymmetricConv2d(n_bins, FILTERS_PER_SCALE, FILTER_WIDTH, bias=False) for _ in range(N_SCALES)
        )
        self.mlp = features_of_powers((1 + skewness) * N_SCALES * FILTERS_PER_SCALE)

    def forward(self, kappa: torch.Tensor) -> torch.Tensor:
        if (side := kappa.shape[-1]) < SMALLEST_SIDE:
            needs = f"--backbone power and moments need tiles of {SMALLEST_SIDE} pixels a side or more"
            raise UserError(f"{needs}, these have {side}; give another one")
        moments = []
        for number, filters in enumerate(self.filters):
            if number:
                kappa = _halved(kappa)  # (B, n_bins, N / 2^number, N / 2^number)
            response = filters(_wrapped(kappa, FILTER_WIDTH // 2, FILTER_WIDTH // 2))
            response = response.to(torch.promote_types(response.dtype, torch.float32))  # bf16 has no digits for a mean
            squares, cubes = SquaresAndCubes.apply(response)  # each (B, FILTERS_PER_SCALE)
            power = squares + SOFTENING
            moments.append(power.log())
            if self.skewness:
                moments.append(cubes / power**1.5)
        return self.mlp(torch.cat(moments, dim=1))


def _wrapped(kappa: torch.Tensor, before: int, after: int) -> torch.Tensor:
    """Continue a tile periodically by so many pixels before its first and after its last row and column."""
    wrapped = functional.pad(kappa, (before, after, before, after), mode="circular")
    return wrapped.contiguous(memory_format=torch.channels_last)


def _halved(kappa: torch.Tensor) -> torch.Tensor:
    """Every other pixel of the smoothed tile: (B, n_bins, N, N) -> (B, n_bins, N / 2, N / 2)."""
    n_bins = kappa.shape[1]
    binomial = torch.tensor(BINOMIAL, dtype=kappa.dtype, device=kappa.device)
    kernel = torch.outer(binomial, binomial).expand(n_bins, 1, -1, -1)  # (n_bins, 1, 4, 4), each bin by itself
    return functional.conv2d(_wrapped(kappa, 1, 2), kernel, stride=2, groups=n_bins)
