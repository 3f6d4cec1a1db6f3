"""Nuisances of a survey, shear calibration, source redshifts and intrinsic alignments: their priors and physics."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy.special import hyp2f1, ndtri

from common.errors import UserError
from data.config import kinds_of
from data.schema import A_IA, N_ORIENTATIONS, NUISANCE, in_order

C1_RHO_CRIT = 0.0134  # Bridle & King 2007, arXiv:0705.0166: 5e-14 Mpc^3 / (h^2 solar masses) times rho_crit today
PIVOT_Z = 0.62  # Secco, Samuroff et al. 2022, arXiv:2105.13544
MAX_LOST_SOURCES = 0.02  # of a bin, that a shift may move below z = 0 or beyond the last z
LARGEST = 20.0  # number in a table of priors; pixels of stronger alignments would be infinite

# DES Y3: shear calibration of Amon et al. 2022, arXiv:2105.13543 (its means are calibrated away); redshifts of Myles et
# al. 2021, arXiv:2012.08566; alignments of Secco, Samuroff et al. 2022, arXiv:2105.13544.
DES_Y3 = """
m_1 normal 0 0.0091
m_2 normal 0 0.0078
m_3 normal 0 0.0076
m_4 normal 0 0.0076
dz_1 normal 0 0.018
dz_2 normal 0 0.015
dz_3 normal 0 0.011
dz_4 normal 0 0.017
A_IA flat -5 5
eta_IA flat -5 5
"""
LINE = (
    "a line is like `m_1 normal 0 0.0091` (mean, sigma) or `A_IA flat -5 5` (lower, upper), with numbers up to "
    f"{LARGEST:g}, and names m_1, dz_1 and so on, A_IA, eta_IA"
)


class PriorsTooWideError(UserError):
    """A draw from the priors cannot be simulated."""


@dataclass(frozen=True)
class Prior:
    """Prior of one nuisance: "normal" with mean a and standard deviation b, or "flat" from a to b."""

    shape: str
    a: float
    b: float

    @property
    def centre(self) -> float:
        """Its mean, which the fiducial simulation has."""
        return self.a if self.shape == "normal" else (self.a + self.b) / 2

    def quantile(self, u: np.ndarray) -> np.ndarray:
        """Values at cumulative probabilities u."""
        return self.a + self.b * ndtri(u) if self.shape == "normal" else self.a + (self.b - self.a) * u


@dataclass(frozen=True)
class Nuisance:
    """What the nuisances are in one sky.

    Attributes:
        m: multiplicative shear bias of each bin, (n_bins,): kappa -> (1 + m) kappa.
        dz: shift of each bin's redshifts, (n_bins,): n(z) -> n(z - dz).
        a_ia, eta_ia: amplitude of the alignments, and power of their redshift dependence.
    """

    m: np.ndarray
    dz: np.ndarray
    a_ia: float
    eta_ia: float

    @property
    def kernel(self) -> bytes:
        """Redshift shifts and alignments as bytes: equal where two nuisances differ in the shear bias alone."""
        return np.array([*self.dz, self.a_ia, self.eta_ia * (self.a_ia != 0)]).tobytes()

    @property
    def changes_kernels(self) -> bool:
        """Whether anything but the scale of the maps changes."""
        return bool(self.a_ia or self.dz.any())


def names_of(kinds: tuple[str, ...], n_bins: int) -> list[str]:
    """Names of the nuisances of these kinds, in their order."""
    names = [A_IA, "eta_IA"] if "ia" in kinds else []
    return in_order(names + [f"{kind}_{a + 1}" for kind in ("dz", "m") if kind in kinds for a in range(n_bins)])


def check_varied(nuisances: Iterable[str], n_bins: int, nuisance: str, folder: Path) -> None:
    """Raise UserError if the tiles of a folder vary other nuisances than --nuisance says."""
    if list(nuisances) != names_of(kinds_of(nuisance), n_bins):
        found = f"the tiles in {folder} vary {', '.join(nuisances) or 'no nuisances'}"
        raise UserError(f"{found}, which is not --nuisance {nuisance}; give theirs, or other tiles")


def read_priors(path: str) -> dict[str, Prior]:
    """Priors by name, from a table, or of DES Y3 if path is empty.

    Raises:
        UserError: the table cannot be read, or has a senseless line.
    """
    where = f"--nuisance-priors {path}"
    try:
        text = Path(path).read_text(encoding="utf-8-sig") if path else DES_Y3
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{where} cannot be read ({error}); give a table of priors") from None
    priors: dict[str, Prior] = {}
    for number, line in enumerate(text.splitlines(), 1):
        words = line.partition("#")[0].split()
        if words:
            name, prior = _parsed(words, f"{where}, line {number}")
            if name in priors:
                raise UserError(f"{where}, line {number}: {name} is there twice; leave one out")
            priors[name] = prior
    return priors


def priors_of(nuisance: str, priors: dict[str, Prior], n_bins: int) -> dict[str, Prior]:
    """Those that one --nuisance varies in so many bins; UserError if one is missing."""
    names = names_of(kinds_of(nuisance), n_bins)
    if missing := [name for name in names if name not in priors]:
        cure = f"give all of {', '.join(names)} as --nuisance-priors"
        raise UserError(f"there is no prior of {missing[0]} for --nuisance {nuisance} with {n_bins} bins; {cure}")
    return {name: priors[name] for name in names}


def described(nuisance: str, priors: dict[str, Prior]) -> dict[str, Any]:
    """What a shard says of its nuisances and the priors that they were drawn from; nothing if none vary."""
    as_in_table = {name: list(vars(prior).values()) for name, prior in priors.items()}
    return {"nuisance": nuisance, "nuisance_priors": as_in_table} if priors else {}


def _parsed(words: list[str], where: str) -> tuple[str, Prior]:
    try:
        name, shape, a, b = words[0], words[1], float(words[2]), float(words[3])
        good = len(words) == 4 and NUISANCE.fullmatch(name) and abs(a) <= LARGEST and abs(b) <= LARGEST
    except (IndexError, ValueError):
        good = None
    if not good or shape not in ("normal", "flat"):
        raise UserError(f"{where} is {' '.join(words)[:60]!r}; {LINE}")
    if (b < 0) if shape == "normal" else (b < a):
        what = "sigma is negative" if shape == "normal" else "lower end is above its upper end"
        raise UserError(f"{where}: in the prior of {name}, the {what}; {LINE}")
    return name, Prior(shape, a, b)


def draw(priors: dict[str, Prior], seed: int, sim_id: int, *, fiducial: bool) -> dict[str, np.ndarray]:
    """Nuisances of one simulation by name, (3,) each: one draw per orientation, from a generator of its own.

    A nuisance has the same draw whichever others are varied. The fiducial simulation has the centres of the priors.
    PriorsTooWideError for a shear bias of -1 or less.
    """
    values = {}
    for name, prior in priors.items():
        # A generator for every name, so that a nuisance is drawn alike whatever else is.
        u = np.random.default_rng([seed, sim_id, *name.encode()]).random(N_ORIENTATIONS)
        values[name] = np.full(N_ORIENTATIONS, prior.centre) if fiducial else prior.quantile(u)
        if name.startswith("m_") and (lowest := values[name].min()) <= -1:
            raise PriorsTooWideError(f"{name} = {lowest:.2f} turns the signal's sign; give narrower --nuisance-priors")
    return values


def nuisance_of(values: dict[str, np.ndarray], orientation: int, n_bins: int) -> Nuisance:
    """The nuisances of an orientation; those that are not varied are zero."""

    def value(name: str) -> float:
        return float(values[name][orientation]) if name in values else 0.0

    m, dz = (np.array([value(f"{kind}_{a + 1}") for a in range(n_bins)]) for kind in ("m", "dz"))
    return Nuisance(m, dz, value(A_IA), value("eta_IA"))


def check_shifts(z: np.ndarray, nz: np.ndarray, draws: list[dict[str, np.ndarray]], z_end: float = np.inf) -> None:
    """Raise PriorsTooWideError if a shift among the draws is too large for sources nz (n_bins, n_z) at z."""
    for a, n in enumerate(nz):
        shifts = np.concatenate([[0.0], *(values[f"dz_{a + 1}"] for values in draws if f"dz_{a + 1}" in values)])
        for shift in (shifts.min(), shifts.max()):
            check_shift(z, n, a, float(shift), z_end)


def check_shift(z: np.ndarray, n: np.ndarray, a: int, shift: float, z_end: float) -> None:
    """Raise PriorsTooWideError if a shift moves too many sources of bin a, n (n_z,) at z, below 0 or beyond z_end."""
    for where, outside in (("below z = 0", z < -shift), (f"beyond z = {z_end:.2f}", z > z_end - shift)):
        lost = np.trapezoid(np.where(outside, n, 0), z) / np.trapezoid(n, z)
        if lost > MAX_LOST_SOURCES:
            found = f"dz_{a + 1} = {shift:.3f} moves {lost:.0%} of the sources of bin {a + 1} {where}"
            raise PriorsTooWideError(f"{found}; give narrower --nuisance-priors")


def growth(z: np.ndarray, omega_m: float, w: float) -> np.ndarray:
    """Linear growth D(z), one today: flat, constant w (e.g. Silveira & Waga 1994, Phys. Rev. D 50, 4890)."""

    def unnormalised(z: np.ndarray) -> np.ndarray:
        ratio = (1 - omega_m) / omega_m * (1 + z) ** (3 * w)  # of dark energy to matter
        return hyp2f1(-1 / (3 * w), (w - 1) / (2 * w), 1 - 5 / (6 * w), -ratio) / (1 + z)

    return unnormalised(np.asarray(z, dtype=np.float64)) / unnormalised(np.zeros(1))


def alignment(z: np.ndarray, nuisance: Nuisance, omega_m: float, w: float) -> np.ndarray:
    """F(z) of the non-linear alignment model, at z (n_z,): aligned galaxies have the convergence F delta; (n_z,).

    -A C_1 rho_crit Omega_m / D(z) ((1 + z) / (1 + z_0))^eta (Bridle & King 2007, arXiv:0705.0166; eta and pivot z_0 as
    in Secco, Samuroff et al. 2022, arXiv:2105.13544). It is negative because galaxies point at what is dense, and
    lensing shears them around it.
    """
    evolution = ((1 + z) / (1 + PIVOT_Z)) ** nuisance.eta_ia
    return -nuisance.a_ia * C1_RHO_CRIT * omega_m / growth(z, omega_m, w) * evolution
