"""Does a tile look like those that a posterior was learnt from? Tail probabilities of its summary and its spectra."""

from __future__ import annotations

import io
import math
from dataclasses import dataclass, fields
from itertools import combinations
from pathlib import Path

import numpy as np
import torch
from scipy.spatial import cKDTree

from common.artifacts import atomic_path, sha256_of_file
from common.errors import UserError
from common.progress import Progress
from data.schema import N_BINS
from npe.compressed import CompressedTileDataset

REFERENCE_NAME = "reference.npz"
N_BANDS = 5  # of equal width up to lmax, and one beyond it, where a tile should have next to nothing
TILE_SIDE = math.sqrt(math.pi / 3)  # [rad]: a base face has pi / 3 sr
SOFTENING = 1e-9  # of a normalised tile's variance, far below rounding: the logarithm of nothing at all is finite
DEGREE = 3  # of the polynomial in the summary that a tile's spectra are expected to follow
N_FOLDS = 10
N_NEIGHBOURS = 10
WARN_BELOW = 0.01
PAIRS = tuple(combinations(range(N_BINS), 2))
# Columns of `spectra` that each test looks at: the bands of each bin's own spectrum, then those of all
# pairs of bins, then all of them, whose oddities may go together.
TESTS = {
    **{f"bin {i + 1}": slice(i * (N_BANDS + 1), (i + 1) * (N_BANDS + 1)) for i in range(N_BINS)},
    "between bins": slice(N_BINS * (N_BANDS + 1), N_BINS * (N_BANDS + 1) + len(PAIRS) * N_BANDS),
    "together": slice(None),
}


@dataclass(frozen=True)
class Reference:
    """Tiles that are known to be ordinary: those that the NPE learnt from, not augmented.

    Attributes:
        summary: (n, 2), normalised units.
        spectra: (n, n_features), from spectra_of.
        theta: (n, 2), physical units.
        sim_id: (n,); the tiles of a simulation have their cosmology in common.
    """

    summary: np.ndarray
    spectra: np.ndarray
    theta: np.ndarray
    sim_id: np.ndarray


def spectra_of(kappa: torch.Tensor, lmax: int) -> torch.Tensor:
    """Binned spectra of normalised tiles (B, 4, N, N): (B, n_features), float32, in the order of TESTS.

    Of every bin the logarithm of the power in N_BANDS bands up to lmax and in one beyond; of every pair of bins their
    correlation coefficient in the first N_BANDS, as artanh. The tile is flat here and tapered by a Hann window, so
    these are no C_ell, but the same is done to all tiles.
    """
    nside = kappa.shape[-1]
    hann = torch.hann_window(nside, device=kappa.device)
    modes = torch.fft.rfft2(kappa.float() * hann[:, None] * hann)  # (B, 4, N, N / 2 + 1)
    ell_x = 2 * math.pi / TILE_SIDE * torch.arange(nside // 2 + 1, device=kappa.device)
    ell_y = 2 * math.pi / TILE_SIDE * nside * torch.fft.fftfreq(nside, device=kappa.device)
    ell = torch.hypot(ell_y[:, None], ell_x)  # (N, N / 2 + 1)
    edges = torch.linspace(0, lmax, N_BANDS + 1, device=kappa.device)
    band = (torch.bucketize(ell, edges[1:]) + (ell == 0) * (N_BANDS + 1)).flatten()  # the mean is in none
    of_band = torch.nn.functional.one_hot(band, N_BANDS + 2)[:, : N_BANDS + 1].float()  # (n_modes, N_BANDS + 1)
    both_signs = torch.full(
        (nside // 2 + 1,), 2.0, device=kappa.device
    )  # a real field has each mode with -ell as well,
    both_signs[0] = both_signs[-1] = 1  # and in these columns that one is there itself
    of_band = of_band * both_signs.expand(nside, -1).reshape(-1, 1)
    of_band = of_band / of_band.sum(dim=0).clamp(min=1)
    modes = modes.flatten(2)  # (B, 4, n_modes)
    power = (modes.abs().square() / hann.square().sum() ** 2) @ of_band + SOFTENING  # (B, 4, N_BANDS + 1)
    features = [power.log().flatten(1)]
    for i, j in PAIRS:
        cross = (modes[:, i] * modes[:, j].conj()).real / hann.square().sum() ** 2 @ of_band  # (B, N_BANDS + 1)
        features.append((cross / (power[:, i] * power[:, j]).sqrt())[:, :N_BANDS].clamp(-0.999, 0.999).atanh())
    return torch.cat(features, dim=1)


def look_at(dataset: CompressedTileDataset, lmax: int, batch_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Summaries (n, 2) and spectra (n, n_features) of tiles as they are."""
    summaries, spectra = [], []
    with Progress("looking at tiles", len(dataset), "tiles") as progress:
        for positions in torch.arange(len(dataset)).split(batch_size):
            kappa, _ = dataset.tiles.__getitems__(positions)  # (B, 4, N, N)
            with torch.no_grad():
                summaries.append(dataset.compress(kappa).float().cpu())
            spectra.append(spectra_of(kappa, lmax).cpu())
            progress.advance(len(positions))
    return torch.cat(summaries).double().numpy(), torch.cat(spectra).double().numpy()


def save_reference(path: Path, reference: Reference) -> str:
    """Write reference.npz; returns its SHA-256."""
    content = io.BytesIO()
    np.savez(content, **{field.name: getattr(reference, field.name) for field in fields(Reference)})
    with atomic_path(path) as temporary:
        temporary.write_bytes(content.getvalue())
    return sha256_of_file(path)


def load_reference(path: Path, sha256: str) -> Reference:
    """Read reference.npz.

    Raises:
        UserError: it is missing, or not the one with this hash.
    """
    if not path.exists() or sha256_of_file(path) != sha256:
        raise UserError(f"{path} is missing or not what stage 2 wrote; run stage 2 again")
    with np.load(path) as content:
        return Reference(**{field.name: content[field.name] for field in fields(Reference)})


class Likeness:
    """Tail probabilities of tiles among the reference.

    For the summary the distance to its N_NEIGHBOURS-th neighbour. For the spectra, test by test, the Mahalanobis
    distance from what a polynomial in the summary expects, with the covariance of the reference around it. Each
    distance is ranked among those of the reference tiles, which are held out by simulation for it; so no distribution
    is assumed.
    The least of these probabilities is ranked in the same way, and that is the verdict's.
    """

    def __init__(self, reference: Reference) -> None:
        self.reference = reference
        fold = np.unique(reference.sim_id, return_inverse=True)[1] % N_FOLDS  # (n,)
        n = len(fold)
        held_out = {name: np.empty(n) for name in ("summary", *TESTS)}
        for k in np.unique(fold):
            inside, outside = fold == k, fold != k
            some = Reference(*(getattr(reference, field.name)[outside] for field in fields(Reference)))
            for name, distance in _distances(some, reference.summary[inside], reference.spectra[inside]).items():
                held_out[name][inside] = distance
        self.ordered = {name: np.sort(distance) for name, distance in held_out.items()}
        least = np.min([self._tail(name, distance) for name, distance in held_out.items()], axis=0)
        self.least = np.sort(least)

    def _tail(self, name: str, distance: np.ndarray) -> np.ndarray:
        """Share of reference tiles that are as far out, one more counted: (m,)."""
        ordered = self.ordered[name]
        return (len(ordered) - np.searchsorted(ordered, distance) + 1) / (len(ordered) + 1)

    def judge(self, summary: np.ndarray, spectra: np.ndarray) -> dict[str, np.ndarray]:
        """Tail probabilities (m,) for every test and `all`, of summaries (m, 2) and spectra (m, n_features)."""
        distances = _distances(self.reference, summary, spectra)
        found = {name: self._tail(name, distance) for name, distance in distances.items()}
        least = np.min(list(found.values()), axis=0)
        among = np.searchsorted(self.least, least, side="right")
        return {"all": (among + 1) / (len(self.least) + 1), **found}


def _distances(reference: Reference, summary: np.ndarray, spectra: np.ndarray) -> dict[str, np.ndarray]:
    """Distances (m,) of tiles from a reference, by test."""
    tree = cKDTree(reference.summary)
    k = min(N_NEIGHBOURS, len(reference.summary))
    found = {"summary": tree.query(summary, k=[k])[0][:, 0]}
    scale = np.abs(reference.summary).max(axis=0)
    design, here = (_monomials(s / scale) for s in (reference.summary, summary))  # (n, n_terms), (m, n_terms)
    coefficients, *_ = np.linalg.lstsq(design, reference.spectra, rcond=None)
    around = reference.spectra - design @ coefficients  # (n, n_features)
    off = spectra - here @ coefficients  # (m, n_features)
    for name, columns in TESTS.items():
        inverse = np.linalg.pinv(np.cov(around[:, columns], rowvar=False))
        found[name] = np.sqrt(np.einsum("mi,ij,mj->m", off[:, columns], inverse, off[:, columns]))
    return found


def _monomials(summary: np.ndarray) -> np.ndarray:
    """All products of total degree at most DEGREE: (n, 2) -> (n, n_terms)."""
    powers = [(i, j) for i in range(DEGREE + 1) for j in range(DEGREE + 1 - i)]
    return np.stack([summary[:, 0] ** i * summary[:, 1] ** j for i, j in powers], axis=1)
