"""Early stopping on a validation loss."""

import math
from dataclasses import dataclass


@dataclass
class EarlyStopping:
    """Remembers the best loss and how many epochs have passed since then."""

    patience: int
    best_loss: float = math.inf
    best_epoch: int = -1
    epochs_since_best: int = 0

    def update(self, loss: float, epoch: int) -> bool:
        """Take the loss of an epoch; True if it is the best so far. A loss that is not finite is a ValueError."""
        if not math.isfinite(loss):
            raise ValueError(f"validation loss of epoch {epoch} is {loss}")
        if loss < self.best_loss:
            self.best_loss, self.best_epoch, self.epochs_since_best = loss, epoch, 0
            return True
        self.epochs_since_best += 1
        return False

    def should_stop(self) -> bool:
        """True once `patience` epochs in a row brought no new best; changes nothing."""
        return self.epochs_since_best >= self.patience

    def state_dict(self) -> dict[str, float]:
        """All that `update` changes."""
        return {name: value for name, value in vars(self).items() if name != "patience"}

    def load_state_dict(self, state_dict: dict[str, float]) -> None:
        """Back to where `state_dict` was taken."""
        vars(self).update(state_dict)
