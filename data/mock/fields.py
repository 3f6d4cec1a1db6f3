"""Full-sky convergence of a cosmology as spherical-harmonic coefficients alm, in the order of data.sphere.harmonics."""

from collections.abc import Sequence
from functools import cache

import ducc0
import numpy as np

from data.mock.limber import spectra_ratio
from data.mock.shift import lognormal_shift
from data.mock.theory import BIN_PAIRS, cl_matrix, theory_cl, theory_cl_at
from data.nuisance import Nuisance
from data.sphere.harmonics import ell_of_alm, gaussian_alm, mixed

# The lognormal field lives on multipoles up to this times lmax, so that its transform to the
# Gaussian field and back loses nothing that reaches the tiles' own multipoles.
BAND_MARGIN = 1.5


def covariance_root(cl: np.ndarray) -> np.ndarray:
    """Matrices R with R R^T = C_ell: cl (10, n_ell) -> (n_ell, 4, 4).

    A C_ell that is not positive, which rounding or the lognormal transform can cause, is replaced by
    the nearest one that is.
    """
    value, vector = np.linalg.eigh(cl_matrix(cl))  # (n_ell, 4), (n_ell, 4, 4)
    return vector * np.sqrt(np.maximum(value, 0))[:, None, :]


@cache
def _legendre(lmax: int) -> tuple[np.ndarray, np.ndarray]:
    """Gauss-Legendre weights (n,) and P_ell at the nodes (n, lmax + 1); n leaves room for the logarithm's products."""
    node, weight = np.polynomial.legendre.leggauss(2 * lmax + 1)
    return weight, np.polynomial.legendre.legvander(node, lmax)


def gaussian_cl_of_lognormal(cl: np.ndarray, shift: np.ndarray) -> np.ndarray:
    """Spectra of the Gaussian fields g whose lognormal fields lambda (exp(g - var/2) - 1) have spectra cl.

    xi_g = ln(1 + xi_ij / (lambda_i lambda_j)) at every angle (e.g. Hilbert et al. 2011, eq. 27), with
    Legendre transforms on either side. Spectra are (10, lmax + 1), shift is (4,).
    """
    lmax = cl.shape[-1] - 1
    weight, legendre = _legendre(lmax)
    ell = np.arange(lmax + 1)
    xi = (cl * (2 * ell + 1) / (4 * np.pi)) @ legendre.T  # (10, n_nodes)
    scale = np.array([shift[i] * shift[j] for i, j in BIN_PAIRS])[:, None]  # (10, 1)
    return 2 * np.pi * (np.log1p(xi / scale) * weight) @ legendre


def lognormal_alm(cl: np.ndarray, shift: np.ndarray, lmax: int, rng: np.random.Generator) -> np.ndarray:
    """Coefficients (4, n_alm(lmax)) of correlated lognormal fields with spectra cl (10, band + 1) and shift (4,).

    The spectra reach up to a band >= lmax.
    """
    band = cl.shape[-1] - 1
    ell = np.arange(band + 1)
    root = covariance_root(gaussian_cl_of_lognormal(cl, shift))  # (band + 1, 4, 4)
    variance = (2 * ell + 1) / (4 * np.pi) @ np.square(root).sum(axis=2)  # (4,) of the fields that are drawn
    n_phi = ducc0.fft.good_size(2 * band + 1, True)
    alm = []
    for g_alm, lam, var in zip(gaussian_alm(root, rng), shift, variance, strict=True):
        g = ducc0.sht.synthesis_2d(
            alm=g_alm[None], spin=0, lmax=band, geometry="GL", ntheta=band + 1, nphi=n_phi, nthreads=1
        )  # (1, n_theta, n_phi)
        kappa = lam * np.expm1(g - var / 2)
        alm.append(ducc0.sht.analysis_2d(map=kappa, spin=0, lmax=lmax, geometry="GL", nthreads=1)[0])
    return np.stack(alm)  # (4, n_alm)


def band_of(lmax: int, field: str) -> int:
    """Largest multipole that theory is needed for."""
    return int(np.ceil(BAND_MARGIN * lmax)) if field == "lognormal" else lmax


def signal_alm(cosmo: np.ndarray, field: str, lmax: int, rng: np.random.Generator) -> np.ndarray:
    """Convergence of one sky without noise, (4, n_alm(lmax)), for a cosmology (7,) and "lognormal" or "gaussian"."""
    cl = theory_cl(cosmo, band_of(lmax, field))[0]  # (10, band + 1)
    if field == "gaussian":
        return gaussian_alm(covariance_root(cl), rng)
    return lognormal_alm(cl, lognormal_shift(cosmo), lmax, rng)


def transport(cl: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Matrices T with T C T = C', from spectra cl to the target (10, n_ell): symmetric, (n_ell, 4, 4).

    Of all that turn fields of covariance C into fields of covariance C' it moves them least: the optimal transport of
    one Gaussian to another, C^-1/2 (C^1/2 C' C^1/2)^1/2 C^-1/2.
    """
    value, vector = np.linalg.eigh(cl_matrix(cl))  # (n_ell, 4), (n_ell, 4, 4)
    root, inverse = ((vector * value[:, None] ** power) @ vector.mT for power in (0.5, -0.5))
    value, vector = np.linalg.eigh(root @ cl_matrix(target) @ root)
    middle = (vector * np.sqrt(np.maximum(value, 0))[:, None]) @ vector.mT
    return inverse @ middle @ inverse


def responses(cosmo: np.ndarray, nuisances: Sequence[Nuisance], ell: np.ndarray) -> list[np.ndarray | None]:
    """For every nuisance the matrices (n_ell, 4, 4) that give a sky of lensing its spectra; None if nothing changes.

    The sky's random phases stay what they are. A lognormal sky stays lognormal only nearly, its bins being mixed.
    """
    if not any(nuisance.changes_kernels or nuisance.m.any() for nuisance in nuisances):
        return [None] * len(nuisances)
    cl, found = theory_cl_at(cosmo, ell)[0], []
    for nuisance, ratio in zip(nuisances, spectra_ratio(cosmo, nuisances, ell), strict=True):
        matrix = transport(cl, cl * ratio) if nuisance.changes_kernels else np.eye(len(nuisance.m))
        found.append((1 + nuisance.m[:, None]) * np.broadcast_to(matrix, (len(ell), *matrix.shape[-2:])))
    return found


def with_nuisances(alm: np.ndarray, cosmo: np.ndarray, nuisances: Sequence[Nuisance], lmax: int) -> np.ndarray:
    """The sky of every nuisance (n, 4, n_alm), from that of lensing alone (4, n_alm), of a cosmology (7,)."""
    place = np.maximum(ell_of_alm(lmax), 2) - 2  # ell = 0 and 1, which have no power, as 2
    found = responses(cosmo, nuisances, np.arange(2, lmax + 1))
    return np.stack([alm if r is None else mixed(alm, r.transpose(1, 2, 0)[..., place]) for r in found])
