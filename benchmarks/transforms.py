"""Parts of one mock simulation by themselves. Worker processes import this file, so it imports little."""

from __future__ import annotations

import ducc0
import numpy as np

from common.machine import keep_freed_memory
from data.mock.fields import band_of
from data.mock.nz import N_BINS
from data.schema import nside_of
from data.sphere.harmonics import white_alm
from data.sphere.tiles import tiles_of_alm


def transforms(lmax: int) -> int:
    """Spherical-harmonic transforms and rotations of made-up coefficients; the number of tiles."""
    keep_freed_memory()
    band = band_of(lmax, "lognormal")
    n_alm = (band + 1) * (band + 2) // 2
    alm = np.ones((1, n_alm), dtype=np.complex128)
    n_phi = ducc0.fft.good_size(2 * band + 1, True)
    kappa = []
    for _ in range(N_BINS):
        sky = ducc0.sht.synthesis_2d(alm=alm, spin=0, lmax=band, geometry="GL", ntheta=band + 1, nphi=n_phi, nthreads=1)
        kappa.append(ducc0.sht.analysis_2d(map=sky, spin=0, lmax=lmax, geometry="GL", nthreads=1)[0])
    return len(tiles_of_alm(np.stack(kappa), lmax, nside_of(lmax), "disjoint"))


def random_numbers(lmax: int) -> int:
    """What is drawn for one sky and its noise; how many coefficients."""
    rng = np.random.default_rng(0)
    return sum(white_alm(N_BINS, band, rng).size for band in (band_of(lmax, "lognormal"), lmax))
