"""Born approximation: what each mass shell of a lightcone contributes to the convergence of each source bin.

All distances are comoving and in Mpc/h, as in the simulations' files.
"""

from dataclasses import dataclass

import numpy as np
from scipy.integrate import cumulative_simpson, cumulative_trapezoid
from scipy.interpolate import CubicSpline

from common.errors import UserError
from data.nuisance import Nuisance, alignment, check_shift
from data.schema import PARAM_NAMES

HUBBLE_DISTANCE = 2997.92458  # c / H0 [Mpc/h]
HEADER = "# Step,z_far,z_near,delta_z,cmd_far(Mpc/h),cmd_near(Mpc/h)"  # how z_values.txt begins
EDGE_TOLERANCE = 1e-3  # relative; between the far edge of a shell and the near edge of the next
DISTANCE_TOLERANCE = 0.01  # relative; between the file's distances and the cosmology's, which leave out radiation
DISTANCE_CHECKED_TO_Z = 4.0  # where radiation is about 0.1 % of the density
MAX_UNSEEN_SOURCES = 1e-3  # of the n(z) beyond the outermost shell


@dataclass(frozen=True)
class Shells:
    """The shells of a lightcone, from the observer outwards: their edges, float64 (n,), chi in Mpc/h."""

    step: np.ndarray  # number of each, as in run.{step}.lightcone.npy, int (n,)
    z_near: np.ndarray
    z_far: np.ndarray
    chi_near: np.ndarray
    chi_far: np.ndarray

    @property
    def volume(self) -> np.ndarray:
        """(n,) in (Mpc/h)^3."""
        return 4 * np.pi / 3 * (self.chi_far**3 - self.chi_near**3)


def parse_shells(text: str, name: str, params: np.ndarray) -> Shells:
    """Read the text of z_values.txt, called `name` in messages, and check it against the simulation's params (8,).

    Raises:
        UserError: other columns, a gap, an overlap, or distances that are not those of the cosmology in Mpc/h.
    """
    first, _, _ = text.partition("\n")
    if not first.replace(" ", "").startswith(HEADER.replace(" ", "")):
        raise UserError(f"{name} begins with {first[:80]!r} instead of {HEADER!r}; use the file that is served")
    try:
        table = np.loadtxt(text.splitlines(), delimiter=",", ndmin=2)  # (n, 10)
        table = table[np.argsort(table[:, 4], kind="stable")]  # by distance, nearest first
        step, z_far, z_near, chi_far, chi_near = table[:, [0, 1, 2, 4, 5]].T  # (n,) each
    except (ValueError, IndexError):
        raise UserError(f"{name} is not a table of comma-separated numbers; use the file that is served") from None
    if not np.isfinite(table).all() or not ((chi_far > chi_near) & (z_far > z_near)).all():
        raise UserError(f"{name} has a shell whose far edge is not beyond its near one; use the file that is served")
    shells = Shells(step.astype(int), z_near, z_far, chi_near, chi_far)
    gap = np.abs(np.append(0, chi_far[:-1]) - chi_near)
    if (wrong := gap > EDGE_TOLERANCE * chi_far).any():
        k = int(np.argmax(wrong))
        raise UserError(
            f"{name}: step {shells.step[k]} begins at {chi_near[k]:.1f} Mpc/h, where the shell before it does not end; "
            "use the file that is served"
        )
    near = z_far < DISTANCE_CHECKED_TO_Z
    expected = comoving_distance(z_far[near], params)
    off = np.abs(chi_far[near] / expected - 1)
    if near.any() and off.max() > DISTANCE_TOLERANCE:
        k = int(np.argmax(off))
        raise UserError(
            f"{name}: step {shells.step[k]} ends at {chi_far[near][k]:.1f} Mpc/h, by its cosmology at "
            f"{expected[k]:.1f}; it is not in Mpc/h, or --params has another simulation under this number"
        )
    return shells


def comoving_distance(z: np.ndarray, params: np.ndarray) -> np.ndarray:
    """Comoving distance in Mpc/h of redshifts (n,), flat with constant w and without radiation: (n,)."""
    omega_m, w = (params[PARAM_NAMES.index(name)] for name in ("Omega_m", "w"))
    grid = np.linspace(0, max(float(np.max(z, initial=0)), 1e-3), 2001)
    e = np.sqrt(omega_m * (1 + grid) ** 3 + (1 - omega_m) * (1 + grid) ** (3 * (1 + w)))
    return CubicSpline(grid, HUBBLE_DISTANCE * cumulative_simpson(1 / e, x=grid, initial=0))(z)


def middle_of(shells: Shells) -> tuple[np.ndarray, np.ndarray]:
    """Distance and redshift of the middle of every shell, (n,) each."""
    chi = (shells.chi_near + shells.chi_far) / 2
    return chi, CubicSpline(np.append(0, shells.chi_far), np.append(0, shells.z_far))(chi)


def born_weights(shells: Shells, z: np.ndarray, nz: np.ndarray, omega_m: float) -> np.ndarray:
    """Weights (n_bins, n_shells): the convergence of a bin is their sum with the density contrasts of the shells.

    kappa_a = sum_k (3/2) (H0/c)^2 Omega_m (1 + z_k) chi_k g_a(chi_k) Delta chi_k delta_k, with
    g_a(chi) = int_chi^inf n_a(chi') (chi' - chi) / chi' dchi' (e.g. Bartelmann & Schneider 2001, astro-ph/9912508,
    section 6.2), chi_k the middle of a shell and z_k its redshift.

    The sources are z (n_z,) and the normalised nz (n_bins, n_z), as from read_nz. Those beyond the outermost shell
    count as at its end.
    """
    edges_z, edges_chi = np.append(0, shells.z_far), np.append(0, shells.chi_far)
    chi_source = CubicSpline(edges_z, edges_chi)(np.minimum(z, edges_z[-1]))  # (n_z,)
    chi, z_middle = middle_of(shells)
    behind = np.maximum(1 - chi[:, None] / np.maximum(chi_source, 1e-9), 0)  # (n_shells, n_z): (chi' - chi) / chi'
    g = np.trapezoid(nz[:, None] * behind, z, axis=2)  # (n_bins, n_shells)
    kernel = (1 + z_middle) * chi * (shells.chi_far - shells.chi_near)  # (n_shells,)
    return 1.5 * omega_m / HUBBLE_DISTANCE**2 * kernel * g  # (n_bins, n_shells)


def check_reach(shells: Shells, z: np.ndarray, nz: np.ndarray) -> None:
    """Raise UserError if sources, as in born_weights, lie beyond the outermost shell."""
    beyond = np.where(z > shells.z_far[-1], nz, 0)  # (n_bins, n_z)
    if (unseen := np.trapezoid(beyond, z, axis=1)).max() > MAX_UNSEEN_SOURCES:
        raise UserError(
            f"{100 * unseen.max():.1f} % of the sources of bin {int(unseen.argmax()) + 1} lie beyond z = "
            f"{shells.z_far[-1]:.2f}, where the shells end; give another --nz"
        )


def weights_with(
    nuisance: Nuisance, shells: Shells, z: np.ndarray, nz: np.ndarray, omega_m: float, w: float
) -> np.ndarray:
    """The same with shifted redshifts and alignments (not the shear bias): (n_bins, n_shells).

    An aligned galaxy of bin a has the convergence F(z) delta, so a shell adds F(z_k) times the share of the bin's
    galaxies that lie in it.

    Raises:
        PriorsTooWideError: a shift moves sources to where there are no shells.
    """
    rows = []
    for a, (shift, n) in enumerate(zip(nuisance.dz, nz, strict=True)):
        moved = z + shift  # (n_z,): n(z - dz) has its values dz farther out
        check_shift(z, n, a, float(shift), float(shells.z_far[-1]))
        n = np.where(moved >= 0, n, 0)
        n /= np.trapezoid(n, moved)
        row = born_weights(shells, np.maximum(moved, 0), n[None], omega_m)[0]  # (n_shells,)
        if nuisance.a_ia:
            of_shells = alignment(middle_of(shells)[1], nuisance, omega_m, w)  # (n_shells,)
            row += of_shells * sources_inside(shells, moved, n[None])[0]
        rows.append(row)
    return np.stack(rows)


def sources_inside(shells: Shells, z: np.ndarray, nz: np.ndarray) -> np.ndarray:
    """The share of every bin's sources that lie in every shell, (n_bins, n_shells)."""
    nearer = cumulative_trapezoid(nz, z, axis=1, initial=0)  # (n_bins, n_z)
    return np.stack([np.interp(shells.z_far, z, n) - np.interp(shells.z_near, z, n) for n in nearer])
