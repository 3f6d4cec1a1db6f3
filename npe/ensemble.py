"""Several NPEs that learn from the same batches with other weights: how far they differ, and their mixture."""

import copy
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from common.device import seeded_generator
from common.early_stopping import EarlyStopping
from npe.config import NPEConfig
from npe.fom import scatter
from npe.model import GaussianNPE, Posterior, posterior_of_moments
from npe.result import Ensemble, Mixture

BOOTSTRAP = 3  # of the seed: evaluate.py has 1 and 2


@dataclass
class Member:
    """One NPE with its own initial weights and early stopping; `best` has its weights of the lowest loss."""

    npe: GaussianNPE
    best: GaussianNPE
    stopper: EarlyStopping

    def update(self, loss: float, epoch: int) -> bool:
        """Keep the weights if the validation loss is the best; a member that has stopped does not change."""
        if self.stopper.should_stop() or not self.stopper.update(loss, epoch):
            return False
        self.best.load_state_dict(self.npe.state_dict())
        return True

    def state_dict(self) -> dict[str, Any]:
        """Weights, best weights and the state of early stopping."""
        return {name: part.state_dict() for name, part in vars(self).items()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Back to where `state_dict` was taken."""
        for name, part in vars(self).items():
            part.load_state_dict(state_dict[name])


def make_members(config: NPEConfig, n_params: int, device: torch.device) -> list[Member]:
    """Members with initial weights of their own; the first is the same whatever their number."""
    members = []
    for k in range(config.n_members):
        torch.manual_seed(seeded_generator(config.seed, f"npe member {k}").initial_seed())
        npe = GaussianNPE(n_params, config.hidden_layers).to(device)
        members.append(Member(npe, copy.deepcopy(npe), EarlyStopping(config.patience)))
    return members


def bootstrap_weights(config: NPEConfig, *sim_ids: np.ndarray) -> list[torch.Tensor]:
    """Weights of tiles in the loss of every member, float32 (n, n_members), for each array of their sim_ids (n,).

    The first member has weights of one. The others have a Bayesian bootstrap (Rubin 1981, Annals of Statistics 9, 130):
    every simulation draws a weight from an exponential distribution, the same for all its tiles, so that how far these
    members differ says how far a posterior would be another one if it had been learnt from other simulations. The
    weights of an array have mean one; those of a member do not depend on the number of members.
    """
    sims = np.unique(np.concatenate(sim_ids))
    weight = np.ones((config.n_members, len(sims)))
    weight[1:] = np.random.default_rng([config.seed, BOOTSTRAP]).exponential(size=weight[1:].shape)
    of_tiles = [weight[:, np.searchsorted(sims, ids)] for ids in sim_ids]  # (n_members, n)
    return [torch.from_numpy((w / w.mean(axis=1, keepdims=True)).T.astype(np.float32)) for w in of_tiles]


def mixture(posteriors: list[Posterior]) -> Posterior:
    """The Gaussian with the moments of the equal-weight mixture, tile by tile.

    mu = <mu_k>, Cov = <Cov_k + mu_k mu_k^T> - mu mu^T: what the members disagree about widens it.
    """
    mu = np.stack([p.mu for p in posteriors])  # (K, n, d)
    mean = mu.mean(axis=0)  # (n, d)
    spread = mu - mean  # (K, n, d)
    cov = np.stack([p.cov for p in posteriors]).mean(axis=0) + np.einsum("kni,knj->nij", spread, spread) / len(mu)
    return posterior_of_moments(posteriors[0].params, mean, cov)


def gaussian_kl(p: Posterior, q: Posterior) -> np.ndarray:
    """KL(p || q) per tile in nats, (n,), of Gaussian posteriors.

    ln q is quadratic in theta, so KL(f || q) = KL(f || p) + KL(p || q) for any density f with the moments of p.
    """
    precision, shift = np.linalg.inv(q.cov), q.mu - p.mu  # (n, d, d), (n, d)
    trace = np.einsum("nij,nji->n", precision, p.cov)
    distance = np.einsum("ni,nij,nj->n", shift, precision, shift)
    return 0.5 * (trace + distance - shift.shape[1]) + np.log(p.inverse_volume / q.inverse_volume)


def worst_divergence(posteriors: list[Posterior]) -> float:
    """Largest KL between two members, in nats, mean over tiles; 0 for one member."""
    return max((float(gaussian_kl(p, q).mean()) for p in posteriors for q in posteriors if p is not q), default=0.0)


def compare(posteriors: list[Posterior]) -> Ensemble:
    """How far posteriors of the fiducial tiles differ: those of a run's members, or of runs with other seeds."""
    medians = [float(np.median(p.fom)) for p in posteriors]
    mixed = mixture(posteriors)
    return Ensemble(
        n_members=len(posteriors),
        fom_fiducial_medians=medians,
        fom_learning_std=scatter(np.array(medians[1:])),
        mixture=Mixture(float(np.median(mixed.fom)), mixed.fom.tolist(), mixed.mu.tolist(), mixed.cov.tolist()),
        worst_divergence_nats=worst_divergence(posteriors),
    )
