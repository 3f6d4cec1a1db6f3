"""The power backbone sees power spectra and nothing else, on all its grids; moments sees third moments as well."""

from __future__ import annotations

import pytest
import torch

from compress.power import FILTERS_PER_SCALE, N_SCALES, PowerFilters, SquaresAndCubes

NSIDE = 64


def random_phases(generator: torch.Generator) -> torch.Tensor:
    """exp(i phi) of a real field: complex (N, N // 2 + 1)."""
    modes = torch.fft.rfft2(torch.randn(NSIDE, NSIDE, generator=generator, dtype=torch.float64))
    return modes / modes.abs()


def log_powers(tile: torch.Tensor, skewness: bool = False) -> torch.Tensor:
    """What goes into the MLP, (N_SCALES * FILTERS_PER_SCALE,), twice as many with skewness."""
    torch.manual_seed(0)
    network = PowerFilters(4, skewness).double().eval()
    seen = []
    network.mlp.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        network(tile[None])
    return seen[0][0]


@pytest.mark.parametrize(("largest", "n_scales"), [(NSIDE, 1), (NSIDE // 32 - 1, N_SCALES)])
def test_common_phases_do_not_matter_and_relative_ones_do(largest: int, n_scales: int) -> None:
    """At full resolution for every mode; at the halved ones for those that no halving folds onto others."""
    generator = torch.Generator().manual_seed(1)
    modes = torch.fft.rfft2(torch.randn(4, NSIDE, NSIDE, generator=generator, dtype=torch.float64))
    k = torch.fft.fftfreq(NSIDE, 1 / NSIDE).abs()
    modes = modes * ((k[:, None] <= largest) & (k[None, : NSIDE // 2 + 1] <= largest))
    one = torch.fft.irfft2(modes)
    common = torch.fft.irfft2(modes * random_phases(generator))
    relative = torch.fft.irfft2(modes * torch.stack([random_phases(generator) for _ in range(4)]))
    kept = slice(n_scales * FILTERS_PER_SCALE)
    expected = log_powers(one)[kept]
    torch.testing.assert_close(log_powers(common)[kept], expected, rtol=1e-8, atol=1e-8)
    assert (log_powers(relative)[kept] - expected).abs().max() > 0.03


def test_halving_hardly_mixes_scales() -> None:
    """Rolls by one pixel would change nothing if the halved grids lost nothing: they move a power by few per cent."""
    tile = torch.randn(4, NSIDE, NSIDE, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    original, rolled = log_powers(tile), log_powers(tile.roll((1, 1), (1, 2)))
    torch.testing.assert_close(rolled[:FILTERS_PER_SCALE], original[:FILTERS_PER_SCALE], rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(log_powers(tile.roll(16, 1)), original, rtol=1e-8, atol=1e-8)
    second = slice(FILTERS_PER_SCALE, 2 * FILTERS_PER_SCALE)
    assert (rolled - original)[second].abs().max() < 0.1


def test_turns_and_flips_change_nothing() -> None:
    tile = torch.randn(4, NSIDE, NSIDE, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    original = log_powers(tile)
    for turns in range(4):
        for flipped in (tile, tile.flip(1)):
            torch.testing.assert_close(log_powers(flipped.rot90(turns, (1, 2))), original, rtol=1e-8, atol=1e-8)


def test_third_moments_change_sign_with_the_tile_and_vanish_without_its_phases() -> None:
    generator = torch.Generator().manual_seed(4)
    gaussian = torch.randn(4, NSIDE, NSIDE, generator=generator, dtype=torch.float64)
    skewed = gaussian.exp() - gaussian.exp().mean()
    random = torch.fft.irfft2(torch.fft.rfft2(skewed) * random_phases(generator))
    of_skewed, of_turned, of_random = (
        log_powers(tile, skewness=True).reshape(N_SCALES, 2, FILTERS_PER_SCALE) for tile in (skewed, -skewed, random)
    )
    torch.testing.assert_close(of_turned * torch.tensor([1, -1])[:, None], of_skewed, rtol=1e-8, atol=1e-8)
    # At full resolution, which has 4096 pixels: measured 0.39 and 0.057, of which sampling is 0.04.
    assert of_skewed[0, 1].abs().mean() > 5 * of_random[0, 1].abs().mean()


def test_the_gradient_of_squares_and_cubes_is_that_of_finite_differences() -> None:
    response = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    assert torch.autograd.gradcheck(SquaresAndCubes.apply, response.requires_grad_())
