"""BandPowers: a network on the plain power spectra of a tile, the yardstick for all others."""

import torch
from torch import nn

from common.device import autocast
from compress.power import features_of_powers
from data.band_limit import RESOLVED
from data.spectra import spectra_of

N_BANDS = 8  # of equal width, up to what the pixels resolve; with 24 the MLP learns the training tiles by heart


class BandPowers(nn.Module):
    """Tile (B, n_bins, N, N) -> features (B, HIDDEN): auto- and cross-spectra in fixed bands through a small MLP.

    What two-point statistics give with the same data, loss and stage 2. Nothing is learned but what the spectra mean.
    """

    def __init__(self, n_bins: int) -> None:
        super().__init__()
        n_powers = n_bins * (N_BANDS + 1) + n_bins * (n_bins - 1) // 2 * N_BANDS
        self.mlp = features_of_powers(n_powers)

    def forward(self, kappa: torch.Tensor) -> torch.Tensor:
        with autocast(kappa.device, torch.float32):  # bf16 has no digits for a Fourier transform
            powers = spectra_of(kappa, RESOLVED * kappa.shape[-1], N_BANDS, tapered=False)  # (B, n_powers)
        return self.mlp(powers)
