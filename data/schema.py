"""What a tile is: columns, shapes, units, noise levels."""

import re
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from common.errors import UserError

N_ORIENTATIONS = 3  # rotations of the sky per simulation
FACES = (4, 5, 6, 7)  # the equatorial HEALPix base faces; tile_id counts them from 0
TILES_PER_SIM = N_ORIENTATIONS * len(FACES)

KEY_NAMES = ("sim_id", "orientation_id", "tile_id")  # the canonical order of tiles
LABELS = {
    "Omega_m": r"\Omega_{\rm m}",
    "sigma_8": r"\sigma_8",
    "S8": "S_8",
    "w": "w",
    "h": "h",
    "n_s": r"n_{\rm s}",
    "Omega_b": r"\Omega_{\rm b}",
    "m_nu": r"m_\nu",  # in eV, the rest pure numbers
}  # of the parameters, in TeX
PARAM_NAMES = tuple(LABELS)  # the order of their columns everywhere
# Columns that only suites with nuisances have: alignments, and of every bin a redshift shift and a shear bias.
NUISANCE = re.compile(r"(A|eta)_IA|(dz|m)_[1-9]\d*")
A_IA = "A_IA"  # amplitude of the alignments
FOM_PARAMS = ("Omega_m", "S8")  # the Figure of Merit is always of these two
SIMS_PER_SHARD = 50  # as in the published shards

# nside of the published tiles (EiffL/GowerStreetDESY3); 600 is coarser than the rule in nside_of.
LMAX_TO_NSIDE = {200: 128, 400: 256, 600: 256, 800: 512, 1000: 512}


def tile_keys(sim_id: int) -> np.ndarray:
    """Keys (12, 3) of a simulation's tiles: orientation 0 with its four faces, then orientation 1, then 2."""
    tile = np.arange(TILES_PER_SIM)
    return np.stack([np.full(TILES_PER_SIM, sim_id), tile // len(FACES), tile % len(FACES)], axis=1)


def name_of_tile(key: Iterable[int]) -> str:
    """A tile as messages name it, from its key (3,)."""
    sim, orientation, tile = key
    return f"tile (sim {sim}, orientation {orientation}, tile {tile})"


def in_order(nuisances: Iterable[str]) -> list[str]:
    """Names of nuisances in their order everywhere: alignments, shifts, shear biases."""
    return sorted(nuisances, key=lambda name: (not name.endswith("_IA"), name))


def columns_of(params: np.ndarray, names: Iterable[str]) -> np.ndarray:
    """The named columns (..., d) of params (..., 8), whose columns are PARAM_NAMES."""
    return params[..., [PARAM_NAMES.index(name) for name in names]]


def label_of(name: str) -> str:
    """A parameter as pictures name it."""
    if name in LABELS:
        return f"${LABELS[name]}$"
    symbol, _, of = name.partition("_")
    symbol = {"eta": r"\eta", "dz": r"\Delta z"}.get(symbol, symbol)
    return rf"${symbol}_{{\rm {of}}}$"


def nside_of(lmax: int, nside: int = 0) -> int:
    """Pixels per side of a tile, on the sphere its HEALPix nside: `nside` if it is given, else what belongs to lmax.

    That is the published value, else the next power of two >= lmax / 2.
    """
    return nside or LMAX_TO_NSIDE.get(lmax, 1 << max(0, (lmax + 1) // 2 - 1).bit_length())


def s8_of(sigma_8: np.ndarray, omega_m: np.ndarray) -> np.ndarray:
    """S8 = sigma_8 (Omega_m / 0.3)^(1/2)."""
    return sigma_8 * np.sqrt(omega_m / 0.3)


@dataclass(frozen=True)
class Survey:
    """Source galaxies of each bin: effective density [arcmin^-2] and ellipticity dispersion per component."""

    n_eff: tuple[float, ...]
    sigma_e: tuple[float, ...]


SURVEYS = {
    # Amon et al. 2022, arXiv:2105.13543, table 1
    "des_y3": Survey((1.476, 1.479, 1.484, 1.461), (0.243, 0.262, 0.259, 0.301)),
    # LSST DESC Science Requirements Document, arXiv:1809.01669
    "lsst_y10": Survey((6.75, 6.75, 6.75, 6.75), (0.26, 0.26, 0.26, 0.26)),
}
ARCMIN2_PER_STERADIAN = (180.0 * 60.0 / np.pi) ** 2
NOISELESS = "noiseless"


def noise_cl(noise_level: str, n_bins: int) -> np.ndarray:
    """Flat noise spectrum N_ell of the convergence in each bin, shape (n_bins,), in steradian.

    `des_y3` and `lsst_y10` follow the published tiles, N_ell = sigma_e^2 / (2 n_eff). With the suffix `_survey` it is
    twice that, N_ell = sigma_e^2 / n_eff: the noise of a convergence map made from shear whose dispersion per component
    is sigma_e. `noiseless` is zero. UserError if the survey has another number of bins.
    """
    if noise_level == NOISELESS:
        return np.zeros(n_bins)
    survey = SURVEYS[noise_level.removesuffix("_survey")]
    if len(survey.n_eff) != n_bins:
        found = f"--noise-level {noise_level} has {len(survey.n_eff)} bins, but the tiles have {n_bins}"
        raise UserError(f"{found}; add a survey to SURVEYS in data/schema.py, or choose {NOISELESS}")
    power = np.square(survey.sigma_e) / (np.array(survey.n_eff) * ARCMIN2_PER_STERADIAN)
    return power if noise_level.endswith("_survey") else power / 2
