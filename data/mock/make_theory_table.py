"""Make the tables of theory from pyccl: `python -m data.mock.make_theory_table convergence matter`.

theory_table.npz has the spectra of convergence (about 16 minutes on two cores), matter_power_table.npz the power
spectrum of matter (11 minutes).

pyccl is a development dependency: `pip install pyccl`. The spectra are those of Eisenstein & Hu
(1998, astro-ph/9709112) with the halofit of Takahashi et al. (2012, arXiv:1208.2701), Limber.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # one pool: processes over cosmologies

import argparse
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import qmc
from tqdm import tqdm

from data.mock import matter_power
from data.mock.nz import nz_of_bins
from data.mock.theory import BIN_PAIRS, COSMO_NAMES, TABLE_PATH, chebyshev_basis, polynomial_exponents, table_features

# The box in (Omega_m, S8, w, h, n_s, Omega_b h^2, m_nu [eV]): the suite's ranges with a margin.
BOX_LOWER = np.array([0.115, 0.49, -1.82, 0.595, 0.940, 0.0217, 0.0595])
BOX_UPPER = np.array([0.510, 1.01, -0.32, 0.805, 0.990, 0.0231, 0.141])
ELL = np.unique(np.round(np.geomspace(2, 4096, 72)))
N_COSMOLOGIES, N_COMPONENTS, DEGREE, SEED = 6144, 20, 5, 20120810
LN_K = np.linspace(np.log(1), np.log(1e5), 121)  # [H_0 / c], of the matter power spectrum
Z = np.linspace(0, 4, 17)
N_COSMOLOGIES_OF_POWER, N_COMPONENTS_OF_POWER, DEGREE_OF_POWER = 4096, 20, 5


def ccl_universe(cosmo: np.ndarray) -> Any:
    """pyccl's Cosmology for one cosmology (7,)."""
    import pyccl

    omega_m, s8, w, h, n_s, omega_b, m_nu = cosmo
    sigma_8 = s8 / np.sqrt(omega_m / 0.3)
    options = dict(Omega_b=omega_b, h=h, n_s=n_s, sigma8=sigma_8, w0=w, m_nu=m_nu)
    options |= dict(transfer_function="eisenstein_hu", matter_power_spectrum="halofit")
    # Omega_m includes neutrinos, so the density of cold matter depends on theirs.
    trial = pyccl.Cosmology(Omega_c=omega_m - omega_b, **options)
    return pyccl.Cosmology(Omega_c=omega_m - omega_b - trial["Omega_nu_mass"], **options)


def ccl_spectra(cosmo: np.ndarray) -> np.ndarray:
    """C_ell of the ten pairs of bins at ELL from pyccl, for one cosmology (7,): shape (10, n_ell)."""
    import pyccl

    universe = ccl_universe(cosmo)
    z = np.linspace(1e-4, 4.0, 801)
    tracers = [pyccl.WeakLensingTracer(universe, dndz=(z, n)) for n in nz_of_bins(z)]
    return np.stack([pyccl.angular_cl(universe, tracers[i], tracers[j], ELL) for i, j in BIN_PAIRS])


def draw_box(n: int, seed: int) -> np.ndarray:
    """Cosmologies (n, 7) from a Sobol sequence that fills the box."""
    u = qmc.Sobol(len(COSMO_NAMES), seed=seed).random(n)
    cosmo = BOX_LOWER + u * (BOX_UPPER - BOX_LOWER)
    cosmo[:, 5] /= cosmo[:, 3] ** 2  # Omega_b h^2 -> Omega_b
    return cosmo


def ccl_matter_power(cosmo: np.ndarray, ln_k: np.ndarray, z: np.ndarray) -> np.ndarray:
    """ln P(k, z), with k and P in units of H_0 / c, from pyccl for one cosmology (7,): (n_k, n_z)."""
    import pyccl

    universe = ccl_universe(cosmo)
    hubble = universe["h"] / pyccl.physical_constants.CLIGHT_HMPC  # H_0 / c in 1/Mpc
    p = [universe.nonlin_matter_power(np.exp(ln_k) * hubble, 1 / (1 + one)) for one in z]
    return np.log(np.stack(p, axis=1) * hubble**3)


def fit(cosmo: np.ndarray, values: np.ndarray, n_components: int, degree: int) -> dict[str, np.ndarray]:
    """A polynomial of cosmologies (n, 7) for the principal components of values (n, m), as the tables hold it."""
    mean = values.mean(axis=0)
    _, _, components = np.linalg.svd(values - mean, full_matrices=False)
    components = components[:n_components]  # (n_pc, m)
    lower, upper = BOX_LOWER.copy(), BOX_UPPER.copy()
    lower[:2], upper[:2] = np.log(lower[:2]), np.log(upper[:2])
    exponents = polynomial_exponents(len(COSMO_NAMES), degree)
    basis = chebyshev_basis(table_features(cosmo, lower, upper), exponents)
    coefficients, *_ = np.linalg.lstsq(basis, (values - mean) @ components.T, rcond=None)
    residual = basis @ coefficients @ components + mean - values
    print(f"rms of the residual in the logarithm {residual.std():.1e}, largest {np.abs(residual).max():.1e}")
    table = dict(lower=lower, upper=upper, exponents=exponents.astype(np.int8), mean=mean)
    return table | dict(coefficients=coefficients.astype(np.float32), components=components.astype(np.float32))


def write(path: Path, table: dict[str, Any]) -> None:
    """Write a table, say how large it is."""
    np.savez_compressed(path, **table)
    print(f"wrote {path.name}: {path.stat().st_size / 1024:.0f} KB")


def make_convergence(pool: ProcessPoolExecutor) -> None:
    """The table of the spectra of convergence."""
    cosmo = draw_box(N_COSMOLOGIES, SEED)
    spectra = list(tqdm(pool.map(ccl_spectra, cosmo, chunksize=8), total=len(cosmo), desc="pyccl spectra"))
    ln_cl = np.log(np.array(spectra)).reshape(len(cosmo), -1)  # (n, 10 * n_ell)
    write(TABLE_PATH, fit(cosmo, ln_cl, N_COMPONENTS, DEGREE) | dict(ell=ELL))


def make_matter(pool: ProcessPoolExecutor) -> None:
    """The table of the matter power spectrum."""
    cosmo = draw_box(N_COSMOLOGIES_OF_POWER, SEED)
    power = partial(ccl_matter_power, ln_k=LN_K, z=Z)
    powers = list(tqdm(pool.map(power, cosmo, chunksize=8), total=len(cosmo), desc="matter power spectra"))
    ln_p = np.array(powers).reshape(len(cosmo), -1)  # (n, n_k * n_z)
    table = fit(cosmo, ln_p, N_COMPONENTS_OF_POWER, DEGREE_OF_POWER)
    write(matter_power.TABLE_PATH, table | dict(ln_k=LN_K, z=Z))


TABLES = {"convergence": make_convergence, "matter": make_matter}


def main() -> None:
    """Draw cosmologies, compute, fit, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tables", nargs="+", choices=list(TABLES))
    tables = parser.parse_args().tables
    with ProcessPoolExecutor() as pool:
        for table in tables:
            TABLES[table](pool)


if __name__ == "__main__":
    main()
