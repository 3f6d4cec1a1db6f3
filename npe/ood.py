"""Out-of-distribution check: does a tile look like those that a posterior was learnt from?"""

from dataclasses import dataclass, fields
from functools import reduce
from itertools import product
from operator import mul
from pathlib import Path

import numpy as np
import torch
from scipy.spatial import cKDTree

from common.artifacts import atomic_path, sha256_of_file
from common.errors import UserError
from common.progress import Progress
from data.spectra import spectra_of
from npe.compressed import CompressedTileDataset

REFERENCE_NAME = "reference.npz"
N_BANDS = 5  # of equal width up to lmax, and one beyond it, where a tile should have next to nothing
DEGREE = 3  # of the polynomial that predicts a tile's spectra from its summary
N_FOLDS = 10
N_NEIGHBOURS = 10
WARN_BELOW = 0.01  # tail probability


@dataclass(frozen=True)
class Reference:
    """The tiles that the NPE learnt from, not augmented: what an ordinary tile looks like."""

    summary: np.ndarray  # (n, d), normalised units
    spectra: np.ndarray  # (n, n_features), from spectra_of
    theta: np.ndarray  # (n, d), physical units
    sim_id: np.ndarray  # (n,); tiles of one simulation share their cosmology


def columns_of_tests(n_bins: int) -> dict[str, slice]:
    """Which columns of the spectra each test looks at: a bin's bands, those of all pairs of bins, all together."""
    per_bin = N_BANDS + 1
    tests = {f"bin {i + 1}": slice(i * per_bin, (i + 1) * per_bin) for i in range(n_bins)}
    if n_bins > 1:
        tests["between bins"] = slice(n_bins * per_bin, None)
    return tests | {"together": slice(None)}


def look_at(dataset: CompressedTileDataset, lmax: int, batch_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Summaries (n, d) and spectra (n, n_features) of tiles that are not augmented."""
    summaries, spectra = [], []
    with Progress("looking at tiles", len(dataset), "tiles") as progress:
        for positions in torch.arange(len(dataset)).split(batch_size):
            kappa, _ = dataset.tiles.__getitems__(positions)  # (B, n_bins, N, N)
            summaries.append(dataset.compress(kappa).float().cpu())
            spectra.append(spectra_of(kappa, lmax, N_BANDS, tapered=True).cpu())
            progress.advance(len(positions))
    return torch.cat(summaries).double().numpy(), torch.cat(spectra).double().numpy()


def save_reference(path: Path, reference: Reference) -> str:
    """Write reference.npz; returns its SHA-256, by which fom_result.json knows that it is unchanged."""
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        np.savez(file, **vars(reference))
    return sha256_of_file(path)


def load_reference(path: Path, sha256: str) -> Reference:
    """Read reference.npz; UserError if it is missing, or not the one with this hash."""
    if not path.exists() or sha256_of_file(path) != sha256:
        raise UserError(f"{path} is missing or not what stage 2 wrote; run stage 2 again")
    with np.load(path) as content:
        return Reference(**{field.name: content[field.name] for field in fields(Reference)})


class OutOfDistributionCheck:
    """Tail probabilities of tiles among the reference tiles.

    The summary is tested by the distance to its N_NEIGHBOURS-th neighbour. The spectra are tested by their
    Mahalanobis distance from what a polynomial in the summary predicts, with the covariance of the reference around
    it. Each distance is ranked among those of the reference tiles, each held out with its simulation, so no
    distribution is assumed. The smallest of a tile's probabilities is ranked in the same way, which gives `all`.
    """

    def __init__(self, reference: Reference, n_bins: int) -> None:
        self.reference, self.tests = reference, columns_of_tests(n_bins)
        fold = np.unique(reference.sim_id, return_inverse=True)[1] % N_FOLDS  # (n,)
        held_out = {name: np.empty(len(fold)) for name in ("summary", *self.tests)}
        for k in np.unique(fold):
            inside, outside = fold == k, fold != k
            some = Reference(*(values[outside] for values in vars(reference).values()))
            distances = _distances(some, reference.summary[inside], reference.spectra[inside], self.tests)
            for name, distance in distances.items():
                held_out[name][inside] = distance
        self.ordered = {name: np.sort(distance) for name, distance in held_out.items()}
        self.smallest = np.sort(np.min([self._tail(*one) for one in held_out.items()], axis=0))

    def _tail(self, name: str, distance: np.ndarray) -> np.ndarray:
        """Share of reference tiles at this distance or beyond, the tile itself counted: (m,)."""
        ordered = self.ordered[name]
        return (len(ordered) - np.searchsorted(ordered, distance) + 1) / (len(ordered) + 1)

    def tail_probabilities(self, summary: np.ndarray, spectra: np.ndarray) -> dict[str, np.ndarray]:
        """Tail probabilities (m,) for every test and `all`, of summaries (m, d) and spectra (m, n_features)."""
        distances = _distances(self.reference, summary, spectra, self.tests)
        found = {name: self._tail(name, distance) for name, distance in distances.items()}
        rank = np.searchsorted(self.smallest, np.min(list(found.values()), axis=0), side="right")
        return {"all": (rank + 1) / (len(self.smallest) + 1), **found}


def _distances(
    reference: Reference, summary: np.ndarray, spectra: np.ndarray, tests: dict[str, slice]
) -> dict[str, np.ndarray]:
    """Distances (m,) of tiles from a reference, by test."""
    tree = cKDTree(reference.summary)
    k = min(N_NEIGHBOURS, len(reference.summary))
    found = {"summary": tree.query(summary, k=[k])[0][:, 0]}
    scale = np.abs(reference.summary).max(axis=0)
    design, here = (_monomials(s / scale) for s in (reference.summary, summary))  # (n, n_terms), (m, n_terms)
    coefficients, *_ = np.linalg.lstsq(design, reference.spectra, rcond=None)
    around = reference.spectra - design @ coefficients  # (n, n_features)
    off = spectra - here @ coefficients  # (m, n_features)
    for name, columns in tests.items():
        inverse = np.linalg.pinv(np.cov(around[:, columns], rowvar=False))
        found[name] = np.sqrt(np.einsum("mi,ij,mj->m", off[:, columns], inverse, off[:, columns]))
    return found


def _monomials(summary: np.ndarray) -> np.ndarray:
    """All products of total degree at most DEGREE: (n, d) -> (n, n_terms)."""
    exponents = [e for e in product(range(DEGREE + 1), repeat=summary.shape[1]) if sum(e) <= DEGREE]
    return np.stack([reduce(mul, (s**p for s, p in zip(summary.T, e, strict=True))) for e in exponents], axis=1)
