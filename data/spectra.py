"""Binned power spectra of tiles, as features."""

import math
from itertools import combinations

import torch
from torch.nn import functional

TILE_SIDE = math.sqrt(math.pi / 3)  # [rad]: a base face has pi / 3 sr
SOFTENING = 1e-9  # of a normalised tile's variance, far below rounding: keeps the logarithm of zero power finite


def spectra_of(kappa: torch.Tensor, lmax: float, n_bands: int, *, tapered: bool) -> torch.Tensor:
    """Binned spectra of normalised tiles (B, n_bins, N, N): (B, n_features), float32.

    First bin by bin the logarithm of the power in `n_bands` bands of equal width up to `lmax` and in one beyond, then
    for each pair of bins their correlation coefficient in the first `n_bands`, as artanh. The tile is treated as flat,
    so these are no C_ell, but all tiles are treated alike. It may be tapered by a Hann window: without, its edges leak
    power into empty bands; with, three quarters of its modes are lost.
    """
    nside = kappa.shape[-1]
    window = torch.hann_window(nside, device=kappa.device) if tapered else torch.ones(nside, device=kappa.device)
    modes = torch.fft.rfft2(kappa.float() * window[:, None] * window).flatten(2)  # (B, n_bins, n_modes)
    of_band = _weights_of_bands(nside, lmax, n_bands, kappa.device)  # (n_modes, n_bands + 1)
    power = (modes.abs().square() / window.square().sum() ** 2) @ of_band + SOFTENING  # (B, n_bins, n_bands + 1)
    features = [power.log().flatten(1)]
    for i, j in combinations(range(kappa.shape[1]), 2):
        cross = (modes[:, i] * modes[:, j].conj()).real / window.square().sum() ** 2 @ of_band  # (B, n_bands + 1)
        features.append((cross / (power[:, i] * power[:, j]).sqrt())[:, :n_bands].clamp(-0.999, 0.999).atanh())
    return torch.cat(features, dim=1)


def _weights_of_bands(nside: int, lmax: float, n_bands: int, device: torch.device) -> torch.Tensor:
    """Weights (n_modes, n_bands + 1) that average over the modes of each band, modes in the layout of rfft2."""
    ell_x = 2 * math.pi / TILE_SIDE * torch.arange(nside // 2 + 1, device=device)
    ell_y = 2 * math.pi / TILE_SIDE * nside * torch.fft.fftfreq(nside, device=device)
    ell = torch.hypot(ell_y[:, None], ell_x)  # (N, N / 2 + 1)
    edges = torch.linspace(0, lmax, n_bands + 1, device=device)
    band = (torch.bucketize(ell, edges[1:]) + (ell == 0) * (n_bands + 1)).flatten()  # the mean is in none
    of_band = functional.one_hot(band, n_bands + 2)[:, : n_bands + 1].float()  # (n_modes, n_bands + 1)
    both_signs = torch.full((nside // 2 + 1,), 2.0, device=device)  # a real field has each mode with -ell as well;
    both_signs[0] = both_signs[-1] = 1  # in these columns that one is present itself
    of_band = of_band * both_signs.expand(nside, -1).reshape(-1, 1)
    return of_band / of_band.sum(dim=0).clamp(min=1)
