"""What redshift errors and intrinsic alignments change in the spectra of lensing.

theory.py has the spectra of lensing alone. Here are integrals along the line of sight (Limber) over the kernels of the
bins and the matter power spectrum, from which only the ratio is taken. Lengths are in c / H_0.
"""

from collections.abc import Sequence

import numpy as np
from scipy.integrate import cumulative_trapezoid
from scipy.interpolate import CubicSpline

from data.mock.matter_power import matter_power
from data.mock.nz import N_BINS, nz_of_bins
from data.mock.shift import Z_MAX
from data.mock.theory import BIN_PAIRS, COSMO_NAMES
from data.nuisance import Nuisance, alignment

Z = np.linspace(0, np.sqrt(Z_MAX), 301)[1:] ** 2  # of lenses and sources, dense where alignments of the near ones are
N_NODES = 32  # multipoles that are integrated; the ratio is smooth between them
FIRST, SECOND = np.array(BIN_PAIRS).T  # bins of each pair


def spectra_ratio(cosmo: np.ndarray, nuisances: Sequence[Nuisance], ell: np.ndarray) -> np.ndarray:
    """Spectra with the nuisances' dz and alignments over those of lensing, for one cosmology (7,): (n, 10, n_ell).

    Pairs as in BIN_PAIRS; ell (n_ell,) are multipoles >= 2. A nuisance without either gives exactly one.
    """
    given = dict(zip(COSMO_NAMES, cosmo, strict=True))
    omega_m, w = given["Omega_m"], given["w"]
    expansion = np.sqrt(omega_m * (1 + Z) ** 3 + (1 - omega_m) * (1 + Z) ** (3 * (1 + w)))  # H / H_0, (n_z,)
    chi = cumulative_trapezoid(1 / expansion, Z, initial=0) + Z[0]  # H = H_0 up to the first
    nodes = np.geomspace(2, max(ell.max(), 4), N_NODES)
    power = matter_power(cosmo, (nodes[:, None] + 0.5) / chi, Z) / (chi**2 * expansion)  # (N_NODES, n_z)

    def kernel(dz: np.ndarray, nuisance: Nuisance | None) -> np.ndarray:
        nz = np.stack([nz_of_bins(Z - shift)[a] for a, shift in enumerate(dz)])  # (4, n_z)
        nz /= np.trapezoid(nz, Z)[:, None]
        lensing = lensing_kernel(nz, chi, omega_m)
        if nuisance is None or not nuisance.a_ia:
            return lensing
        return lensing + alignment(Z, nuisance, omega_m, w) * nz * expansion

    def spectra(of_bins: np.ndarray) -> np.ndarray:
        return np.trapezoid(power[:, None] * of_bins[FIRST] * of_bins[SECOND], Z).T  # (10, N_NODES)

    bare = spectra(kernel(np.zeros(N_BINS), None))
    ratio = np.ones((len(nuisances), len(BIN_PAIRS), len(ell)))
    for one, nuisance in zip(ratio, nuisances, strict=True):
        if nuisance.changes_kernels:
            curve = CubicSpline(np.log(nodes), spectra(kernel(nuisance.dz, nuisance)) / bare, axis=1)
            one[:] = curve(np.log(ell))
    return ratio


def lensing_kernel(nz: np.ndarray, chi: np.ndarray, omega_m: float) -> np.ndarray:
    """(3/2) Omega_m (1 + z) chi g(chi) of every bin, from normalised nz (4, n_z) at Z and distances chi (n_z,)."""
    # g(chi) = int_chi^inf n(chi') (1 - chi / chi') dchi', from two integrals that run inwards.
    beyond, weighted = _from_far(nz), _from_far(nz / chi)
    return 1.5 * omega_m * (1 + Z) * chi * (beyond - chi * weighted)


def _from_far(y: np.ndarray) -> np.ndarray:
    """Integral from every Z to the last: (4, n_z)."""
    inwards = cumulative_trapezoid(y, Z, initial=0)
    return inwards[:, -1:] - inwards
