"""Figures of Merit of a set of tiles: medians, scatter, bootstrap errors; what augmentation does to summaries."""

import numpy as np
import torch

from data.augment import draw_symmetries, gather_augmented
from npe.compressed import CompressedTileDataset
from npe.model import Posterior
from npe.result import Shift

N_BOOTSTRAP = 2000
N_AUGMENTATIONS = 8  # draws per tile


def bootstrap_median(values: np.ndarray, group: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Medians (N_BOOTSTRAP,) of resamples of values (n,), drawn by group: the tiles of a group are not independent.

    The group (n,) is sim_id for tiles whose cosmologies differ, the patch of sky for those of one simulation.
    """
    groups = [values[group == one] for one in np.unique(group)]
    picks = rng.integers(len(groups), size=(N_BOOTSTRAP, len(groups)))
    return np.array([np.median(np.concatenate([groups[g] for g in pick])) for pick in picks])


def scatter(values: np.ndarray) -> float | None:
    """Sample standard deviation of values (n,); None for one alone, which has none."""
    return float(np.std(values, ddof=1)) if len(values) > 1 else None


def augmentation_shift(
    dataset: CompressedTileDataset,
    posterior: Posterior,
    theta_std: np.ndarray,
    batch_size: int,
    generator: torch.Generator,
) -> dict[str, Shift]:
    """How far augmentation moves the summaries of tiles that are not augmented, in units of their posteriors' sigma.

    A summary estimates normalised theta, so its shift times theta_std (d,) over sigma is the shift of the estimate in
    standard deviations. A compressor that is blind to the symmetries gives zero; what is left comes from the seams that
    a roll makes and from turns not being isometries of a HEALPix face.

    Returns:
        for "turns" (and flips), "rolls" and "all".
    """
    sigma = torch.from_numpy(posterior.sigma / theta_std)  # (n, d), normalised
    result = {}
    for name, turns, rolls in (("turns", True, False), ("rolls", False, True), ("all", True, True)):
        shifts = []
        for positions in torch.arange(len(dataset)).split(batch_size):
            kappa, _ = dataset.tiles.__getitems__(positions)  # (B, n_bins, N, N)
            original, rows = dataset.compress(kappa), torch.arange(len(kappa))  # (B, d), (B,)
            for _ in range(N_AUGMENTATIONS):
                symmetries = draw_symmetries(len(rows), kappa.shape[-1], generator, turns=turns, rolls=rolls)
                moved = dataset.compress(gather_augmented(kappa, rows, symmetries))
                shifts.append((moved - original).cpu().double() / sigma[positions])
        shift = torch.cat(shifts)  # (n * N_AUGMENTATIONS, d)
        result[name] = Shift(rms=shift.square().mean(dim=0).sqrt().tolist(), mean=shift.mean(dim=0).tolist())
    return result
