"""Stage 2, the training loop: every member keeps its weights with the lowest loss on the test split."""

import math
import time

import torch

from common.device import seeded_generator
from common.errors import UserError
from common.progress import Progress
from common.resume import LastCheckpoint, Part, Position
from data.dataset import batches, first_bad_batch, n_batches
from npe.compressed import CompressedTileDataModule, WeightedDataset, compress_all
from npe.config import NPEConfig
from npe.ensemble import Member, bootstrap_weights, make_members
from npe.model import save_npe


def train(compressed: CompressedTileDataModule, config: NPEConfig, last: LastCheckpoint) -> list[Member]:
    """Train; write npe_best.ckpt, last.ckpt and metrics.jsonl (the first member's losses); resume from last.ckpt.

    AdamW treats every weight by itself, so members that share an optimiser and the sum of their losses learn
    exactly what each would learn alone. The loop ends when the last of them has stopped.
    """
    members = make_members(config, compressed.n_params, last.device)
    parameters = [p for member in members for p in member.npe.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=config.learning_rate, weight_decay=config.weight_decay, fused=True)
    parts: dict[str, Part] = {"optimizer": optimizer} | {f"member {k}": member for k, member in enumerate(members)}
    weight, val_weight = bootstrap_weights(config, compressed.train_sims, compressed.val_sims)
    train_ds, val_weight = WeightedDataset(compressed.train_ds, weight), val_weight.to(last.device)  # (n, n_members)
    steps_per_epoch = n_batches(len(train_ds), config.batch_size)
    at = last.restore(parts, {"augment": compressed.augment})

    with Progress("training the NPE", config.max_epochs, "epochs") as progress, last.saved_when_interrupted():
        progress.advance(at.epoch)
        val_summary, val_theta = compress_all(compressed.val_ds, config.batch_size)  # never augmented: once is enough
        while at.epoch < config.max_epochs and not all(member.stopper.should_stop() for member in members):
            epoch_start, shuffle = time.monotonic(), _shuffle(config, at.epoch)
            for summary, theta, weight in batches(train_ds, config.batch_size, shuffle, first=at.batch):
                optimizer.param_groups[0]["lr"] = config.learning_rate * falling(at, steps_per_epoch, config.max_epochs)
                nll = mean_nll(members, summary, theta, weight)  # (n_members,)
                optimizer.zero_grad(set_to_none=True)
                nll.sum().backward()
                optimizer.step()
                at.next_batch(nll)
                last.save_if_due()

            with torch.no_grad():
                test_nll = mean_nll(members, val_summary, val_theta, val_weight).cpu()
            train_nll = torch.stack(at.losses).mean(dim=0).cpu()  # (n_batches, n_members) -> (n_members,)
            _refuse_not_finite(train_nll + test_nll, at, compressed, config)
            better = [member.update(loss, at.epoch) for member, loss in zip(members, test_nll.tolist(), strict=True)]
            first = members[0].stopper
            if any(better):
                save_npe(last.best, [member.best for member in members], config, first.best_epoch, first.best_loss)
            losses = {"train_nll": float(train_nll[0]), "test_nll": float(test_nll[0])}
            last.end_epoch({"epoch": at.epoch, **losses, "seconds": round(time.monotonic() - epoch_start, 3)})
            progress.advance(1, f"test_nll {losses['test_nll']:.4f}, best {first.best_loss:.4f}")
    return members


def falling(at: Position, steps_per_epoch: int, max_epochs: int) -> float:
    """What the learning rate is multiplied by: half a cosine, from 1 to 0 (Loshchilov & Hutter, arXiv:1608.03983)."""
    return (1 + math.cos(math.pi * (at.epoch + at.batch / steps_per_epoch) / max_epochs)) / 2


def mean_nll(members: list[Member], summary: torch.Tensor, theta: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Weighted mean loss of every member, (n_members,), on summaries and theta (B, d) with weights (B, n_members)."""
    return torch.stack([(w * m.npe.nll(summary, theta)).mean() for m, w in zip(members, weight.T, strict=True)])


def _shuffle(config: NPEConfig, epoch: int) -> torch.Generator:
    return seeded_generator(config.seed, f"npe shuffle {epoch}")


def _refuse_not_finite(
    nll: torch.Tensor, at: Position, compressed: CompressedTileDataModule, config: NPEConfig
) -> None:
    """Raise UserError if a loss of the epoch is not finite; names the tiles of the first such batch."""
    if nll.isfinite().all():
        return
    where, look = "on the test split", ""
    if bad := first_bad_batch(at.losses, compressed.train_ds.tiles, config.batch_size, _shuffle(config, at.epoch)):
        where, look = f"batch {bad[0]}", f", and look at these tiles (sim/orientation/tile): {bad[1]}"
    cure = f"try --restart with a lower --learning-rate{look}"
    raise UserError(f"the NPE loss is not finite in epoch {at.epoch}, {where}; {cure}")
