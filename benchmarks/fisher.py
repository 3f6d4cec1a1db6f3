"""What nuisances cost by a Gaussian Fisher forecast, for one tile: `python benchmarks/fisher.py`.

At the fiducial cosmology, spectra of the four bins from ell = 2 to lmax, with w, h, n_s and Omega_b marginalised
over with the suite's spread, m_nu fixed, and every nuisance with its prior, about the prior's centre; and the same with
the suite's prior on (Omega_m, S8), which a learnt posterior has. Where the amplitude of the alignments is zero, as by
default, their redshift dependence changes nothing here, while a suite varies it. A yardstick and not a bound.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import get_args

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np

from common.errors import UserError
from data.config import NoiseLevel
from data.mock.cosmology import FIDUCIAL_COSMO, design
from data.mock.limber import spectra_ratio
from data.mock.nz import N_BINS
from data.mock.theory import COSMO_NAMES, cl_matrix, theory_cl_at
from data.nuisance import Prior, nuisance_of, priors_of, read_priors
from data.schema import A_IA, FOM_PARAMS, noise_cl

SKY = 1 / 12  # of a tile
SUITE = 791, 42  # simulations whose spread is the prior, and their seed
FIXED = ("m_nu",)
STEP = 1e-2  # of a difference, in a parameter's spread
NUISANCES = ("none", "m", "dz", "ia", "all")


def spectra(cosmo: np.ndarray, values: dict[str, float], ell: np.ndarray) -> np.ndarray:
    """C_ell of the signal (n_ell, 4, 4), with nuisances by name."""
    nuisance = nuisance_of({name: np.array([value]) for name, value in values.items()}, 0, N_BINS)
    cl = cl_matrix(theory_cl_at(cosmo, ell)[0] * spectra_ratio(cosmo, [nuisance], ell)[0])
    return cl * np.outer(1 + nuisance.m, 1 + nuisance.m)


def spread_of(prior: Prior) -> float:
    """Its standard deviation."""
    return prior.b if prior.shape == "normal" else (prior.b - prior.a) / np.sqrt(12)


def fisher_foms(lmax: int, noise_level: str, nuisance: str, priors_path: str) -> np.ndarray:
    """1 / sqrt(det Cov(Omega_m, S8)), marginalised over the rest; without a prior on the two, and with the suite's."""
    ell = np.arange(2, lmax + 1)
    _, suite = design(*SUITE, None)
    spread = dict(zip(COSMO_NAMES, suite.std(axis=0), strict=True))
    priors = priors_of(nuisance, read_priors(priors_path), N_BINS)
    centre = {name: prior.centre for name, prior in priors.items()}
    spread |= {name: spread_of(prior) for name, prior in priors.items()}
    fixed = FIXED if centre.get(A_IA) else (*FIXED, "eta_IA")
    names = [name for name in spread if name not in fixed and spread[name]]

    def moved(name: str, sign: int) -> np.ndarray:
        cosmo, step = FIDUCIAL_COSMO.copy(), sign * STEP * spread[name]
        if name in COSMO_NAMES:
            cosmo[COSMO_NAMES.index(name)] += step
            return spectra(cosmo, centre, ell)
        return spectra(cosmo, centre | {name: centre[name] + step}, ell)

    total = spectra(FIDUCIAL_COSMO, centre, ell) + np.diag(noise_cl(noise_level, N_BINS))
    changes = [(moved(name, 1) - moved(name, -1)) / (2 * STEP * spread[name]) for name in names]
    whitened = [np.linalg.solve(total, change) for change in changes]  # (n_ell, 4, 4) each
    modes = SKY * (2 * ell + 1) / 2
    fisher = np.array([[np.einsum("l,lij,lji->", modes, a, b) for a in whitened] for b in whitened])
    both, foms = [names.index(name) for name in FOM_PARAMS], []
    for of_both in (0, 1):
        known = [spread[name] ** -2 * (of_both if name in FOM_PARAMS else 1) for name in names]
        cov = np.linalg.inv(fisher + np.diag(known))
        foms.append(np.linalg.det(cov[np.ix_(both, both)]) ** -0.5)
    return np.array(foms)


def main() -> None:
    """Compute, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lmax", type=int, default=200)
    parser.add_argument("--noise-level", choices=get_args(NoiseLevel), default="des_y3_survey")
    parser.add_argument("--nuisance-priors", default="", help="table of priors, as run_mock.py takes it")
    options = parser.parse_args()
    about = options.lmax, options.noise_level
    try:
        foms = {nuisance: fisher_foms(*about, nuisance, options.nuisance_priors) for nuisance in NUISANCES}
    except UserError as error:
        parser.error(str(error))
    print(f"lmax {options.lmax}, {options.noise_level}")
    print("| nuisances | FoM | / bare | with the suite's prior | / bare |\n|---|---|---|---|---|")
    for nuisance, (fom, informed) in foms.items():
        bare, bare_informed = foms["none"]
        print(f"| {nuisance} | {fom:.0f} | {fom / bare:.3f} | {informed:.0f} | {informed / bare_informed:.3f} |")


if __name__ == "__main__":
    main()
