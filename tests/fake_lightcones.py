"""Lightcones of known cosmology in the Gower Street format: `python tests/fake_lightcones.py DIR --n-sims 20`.

Shells of lognormal matter from GLASS, uncorrelated with each other (which is the Limber approximation), with spectra
from pyccl, then Poisson counts. Writes DIR/sims/sim00001 ..., DIR/params.csv and DIR/nz.txt.
"""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from functools import lru_cache, partial
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import glass
import healpy
import numpy as np
import pyccl
from tqdm import tqdm

from data.ingest.born import HEADER, Shells
from data.mock.cosmology import design, params_of
from data.mock.make_theory_table import ccl_universe
from data.mock.nz import nz_of_bins
from data.mock.theory import BIN_PAIRS
from data.nuisance import Nuisance
from data.sphere.pixel_window import pixel_window

# Edges of the shells in Mpc/h, after the observer. Near shells are thin, because a shell is weighted by its middle
# (50 Mpc/h make the spectrum of bin 1 one per cent too strong, 20 make it 0.3).
THIN_SHELLS, THICK_SHELLS = np.arange(40.0, 1000.0, 20.0), np.arange(1000.0, 9000.0, 125.0)
Z_END = 2.6  # of the complete shells; one more, marked as incomplete, reaches beyond
Z_BEYOND = 4.0
PARTICLES_PER_VOLUME = 0.645  # [(h/Mpc)^3], 1080^3 in a box of 1250 Mpc/h
FIDUCIAL_SIM_ID = 109
MATTER = glass.grf.Lognormal(1.0)
# Of alignments, written here again, so that an error in the project's own numbers is seen: Bridle & King 2007,
# arXiv:0705.0166, and Secco, Samuroff et al. 2022, arXiv:2105.13544.
C1_RHO_CRIT, PIVOT_Z = 0.0134, 0.62
NO_NUISANCE = Nuisance(np.zeros(4), np.zeros(4), 0.0, 0.0)


def shells_of(cosmo: np.ndarray) -> Shells:
    """Shells for one cosmology (7,), numbered from the outermost inwards as a simulation does."""
    universe, h = ccl_universe(cosmo), cosmo[3]
    z_grid = np.linspace(0, Z_BEYOND, 4001)
    chi_grid = pyccl.comoving_radial_distance(universe, 1 / (1 + z_grid)) * h  # [Mpc/h]
    thick = THICK_SHELLS[np.interp(Z_END, z_grid, chi_grid) > THICK_SHELLS]
    chi = np.concatenate([[0], THIN_SHELLS, thick, chi_grid[-1:]])
    z = np.interp(chi, chi_grid, z_grid)
    return Shells(np.arange(len(chi) - 1, 0, -1), z[:-1], z[1:], chi[:-1], chi[1:])


def matter_cl(cosmo: np.ndarray, shells: Shells, lmax: int) -> np.ndarray:
    """C_ell (n_shells, lmax + 1) of the density contrast in every shell, averaged over its volume, Limber."""
    universe, h = ccl_universe(cosmo), cosmo[3]
    ell = np.unique(np.concatenate([np.arange(2, 12), np.geomspace(12, lmax, 50).astype(int)]))
    found = []
    for near, far in zip(shells.z_near, shells.z_far, strict=True):
        z = np.linspace(near, far, 101)
        chi = pyccl.comoving_radial_distance(universe, 1 / (1 + z)) * h
        tracer = pyccl.NumberCountsTracer(
            universe, has_rsd=False, dndz=(z, chi**2 * np.gradient(chi, z)), bias=(z, np.ones_like(z))
        )
        cl = pyccl.angular_cl(universe, tracer, tracer, ell)
        found.append(np.exp(np.interp(np.log(np.arange(lmax + 1) + 1e-9), np.log(ell), np.log(cl))))
    cl = np.array(found)
    cl[:, :2] = 0
    return cl


def lensing_cl(cosmo: np.ndarray, ell: np.ndarray, nuisance: Nuisance = NO_NUISANCE) -> np.ndarray:
    """Convergence C_ell (10, n_ell) of the four bins, straight from pyccl's kernels of lensing and alignments."""
    universe = ccl_universe(cosmo)
    z = np.linspace(1e-4, Z_BEYOND, 801)
    # pyccl takes 5e-14 times its own critical density for C_1 rho_crit, 0.0139; the survey's number is 0.0134.
    scale = C1_RHO_CRIT / (5e-14 * pyccl.physical_constants.RHO_CRITICAL)
    amplitude = nuisance.a_ia * scale * ((1 + z) / (1 + PIVOT_Z)) ** nuisance.eta_ia
    tracers = [
        pyccl.WeakLensingTracer(
            universe, dndz=(z, nz_of_bins(z - shift)[a]), ia_bias=(z, amplitude) if nuisance.a_ia else None
        )
        for a, shift in enumerate(nuisance.dz)
    ]
    # pyccl's default quadrature errs by 3 % where the kernels of two bins hardly overlap; its spline does not.
    spectrum = partial(pyccl.angular_cl, universe, ell=ell, limber_integration_method="spline")
    of_pairs = [spectrum(tracers[i], tracers[j]) for i, j in BIN_PAIRS]
    return np.stack(of_pairs) * np.array([(1 + nuisance.m[i]) * (1 + nuisance.m[j]) for i, j in BIN_PAIRS])[:, None]


def z_values_text(shells: Shells) -> str:
    """z_values.txt; the columns in units of the box are not read, and are zero here."""
    lines = [HEADER + ",delta_cmd(Mpc/h),cmd/box_far,cmd/box_near,delta_cmd/box"]
    for k in np.argsort(shells.step):
        z_far, z_near, far, near = shells.z_far[k], shells.z_near[k], shells.chi_far[k], shells.chi_near[k]
        numbers = [z_far, z_near, z_far - z_near, far, near, far - near, 0, 0, 0]
        lines.append(",".join([str(shells.step[k]), *(f"{number:.6f}" for number in numbers)]))
    return "\n".join(lines) + "\n"


@lru_cache(maxsize=2)
def gaussian_spectra(cosmo: tuple[float, ...], nside: int) -> list[list[np.ndarray]]:
    """Spectra of the Gaussian fields behind the matter of each shell, computed once for all skies of a cosmology."""
    shells = shells_of(np.array(cosmo))
    # Particles are counted over whole pixels, hence the window; pixels of a synthesised map are points.
    cls = matter_cl(np.array(cosmo), shells, 2 * nside) * pixel_window(nside, 2 * nside) ** 2
    with np.errstate(divide="ignore", invalid="ignore"), warnings.catch_warnings():
        # The solver divides by multipoles that are zero, and cannot make a lognormal field quite as clustered as the
        # matter in the first shell (0.4 % of the power of bin 1 at ell = 350, less elsewhere).
        warnings.filterwarnings("ignore", message="Gaussian spectrum .* did not converge")
        return [[np.maximum(gl, 0) for gl in glass.solve_gaussian_spectra([MATTER], [cl])] for cl in cls]


def write_lightcone(folder: Path, cosmo: np.ndarray, nside: int, rng: np.random.Generator) -> None:
    """One simulation: z_values.txt, the counts of every shell, the outermost marked as incomplete."""
    folder.mkdir(parents=True)
    shells = shells_of(cosmo)
    (folder / "z_values.txt").write_text(z_values_text(shells))
    spectra = gaussian_spectra(tuple(cosmo), nside)
    n_pixels = healpy.nside2npix(nside)
    for step, gls, volume in zip(shells.step, spectra, shells.volume, strict=True):
        delta = next(iter(glass.generate([MATTER], gls, nside, rng=rng)))
        counts = rng.poisson(PARTICLES_PER_VOLUME * volume / n_pixels * (1 + np.asarray(delta)))
        np.save(folder / f"run.{step:05d}.lightcone.npy", counts.astype(np.uint32))
    np.save(folder / f"run.{shells.step[-1]:05d}.incomplete.npy", np.zeros(1))


def write_parameters(path: Path, sim_ids: np.ndarray, cosmologies: np.ndarray) -> None:
    """The table of cosmologies (n, 7) with its two header rows."""
    lines = [",,,Cosmological parameters,,,,,,,Derived parameters,,,"]
    lines.append("Serial Number,Run,Job,Omega_m,sigma_8,w,Omega_b little_h^2,little_h,n_s,m_nu,Omega_b,Comment")
    for sim_id, (omega_m, sigma_8, _, w, h, n_s, omega_b, m_nu) in zip(sim_ids, params_of(cosmologies), strict=True):
        numbers = [omega_m, sigma_8, w, omega_b * h**2, h, n_s, m_nu, omega_b]
        lines.append(",".join([str(sim_id), "C", "1", *(f"{number:.10g}" for number in numbers), ""]))
    path.write_text("\n".join(lines) + "\n")


def write_nz(path: Path) -> None:
    """n(z) of the mock suite as a text table."""
    z = np.linspace(0, 3, 301)
    np.savetxt(path, np.column_stack([z, nz_of_bins(z).T]), header="z n_1 n_2 n_3 n_4")


def main() -> None:
    """Write a folder of simulations."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--n-sims", type=int, default=20)
    parser.add_argument("--nside", type=int, default=128)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    sim_ids, cosmologies = design(options.n_sims, options.seed, FIDUCIAL_SIM_ID)
    options.folder.mkdir(parents=True, exist_ok=True)
    write_parameters(options.folder / "params.csv", sim_ids, cosmologies)
    write_nz(options.folder / "nz.txt")
    for sim_id, cosmo in zip(sim_ids, tqdm(cosmologies, desc="lightcones"), strict=True):
        rng = np.random.default_rng([options.seed, int(sim_id)])
        write_lightcone(options.folder / "sims" / f"sim{sim_id:05d}", cosmo, options.nside, rng)


if __name__ == "__main__":
    main()
