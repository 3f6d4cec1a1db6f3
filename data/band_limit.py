"""Up to which multipole do tiles have power? It shows a wrong lmax where the shards do not state it."""

import numpy as np

N_TILES = 24  # to look at
SMALLEST_LMAX = 64  # below it the bands are narrower than the window's resolution
RESOLVED = 3.0  # multipoles per pixel of a side: along an axis the shortest wave, two pixels, has ell = 3.09 N
# Bands of ell / lmax: well inside, just inside and just outside of what the tiles should have.
INSIDE, BELOW, ABOVE = (0.5, 0.65), (0.82, 0.92), (1.12, 1.25)
# Power per mode relative to the band before. Mock tiles from lmax 64 to 1000, noiseless to des_y3, have 0.55 to 0.95
# below and at most 0.09 above; if their lmax is 1.25 times too large they have 0.5 and more above, if it is 1.25 times
# too small 0.18 and less below.
EDGE = 0.3


def band_limit_problem(kappa: np.ndarray, lmax: int) -> str:
    """What contradicts that tiles (n, bins, N, N) have the multipoles up to lmax and no others; empty if nothing does.

    It notices an lmax that is off by a fifth or more.
    """
    some = kappa[:: max(1, len(kappa) // N_TILES)][:N_TILES]
    some = some[(np.ptp(some, axis=(2, 3)) > 0).all(axis=1)]  # a constant bin has no spectrum, and is an outlier
    resolved = RESOLVED * kappa.shape[-1] / lmax
    if lmax < SMALLEST_LMAX or BELOW[1] > resolved or not len(some):
        return ""
    inside, below, above = power_in_bands(some, lmax)
    if ABOVE[1] <= resolved and above > EDGE * below:
        return f"they have power beyond lmax {lmax}"
    return f"they have next to no power just below lmax {lmax}" if below < EDGE * inside else ""


def power_in_bands(kappa: np.ndarray, lmax: int) -> list[float]:
    """Mean power per mode of tiles (n, bins, N, N) in the bands INSIDE, BELOW and ABOVE, in units of all modes' mean.

    It looks at the middle of a face, where pixel (y, x) of an equatorial one lies (x - y) pi / (4 N) rad east and
    (x + y - N) 2 / (3 N) rad north of the centre (Gorski et al. 2005, ApJ 622, 759, equations 8 and 9), so that a
    plane wave over the pixels has one ell, to a few per cent.
    """
    nside = kappa.shape[-1]
    middle = slice(nside // 4, nside - nside // 4)
    pixels = kappa[:, :, middle, middle].astype(np.float64)  # (n, bins, M, M)
    hann = np.hanning(pixels.shape[-1])
    pixels = (pixels - pixels.mean(axis=(2, 3), keepdims=True)) * np.outer(hann, hann)
    power = np.square(np.abs(np.fft.fft2(pixels)))  # (n, bins, M, M)
    power = (power / power.mean(axis=(2, 3), keepdims=True)).mean(axis=(0, 1))  # (M, M)
    k = 2 * np.pi * np.fft.fftfreq(len(hann))  # rad per pixel
    ell = np.hypot((k[None, :] - k[:, None]) * 2 * nside / np.pi, (k[None, :] + k[:, None]) * 3 * nside / 4)
    return [float(power[(ell >= low * lmax) & (ell < high * lmax)].mean()) for low, high in (INSIDE, BELOW, ABOVE)]
