"""--init-from: start a training from the weights of another run."""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from common.errors import UserError, warn
from common.options import flag_of
from compress.config import CompressorConfig
from compress.model import FieldLevelCompressor, TrainedCompressor, load_compressor
from data.module import SplitTiles
from data.norm_stats import NORM_STATS_NAME, NormStats, read_norm_stats
from data.split import MANIFEST_NAME, SplitManifest, read_manifest

SAME = 1e-3  # relative: cosmologies that agree so far in every parameter are one; tables round them


@dataclass(frozen=True)
class Pretrained:
    """The compressor that a run starts from, and the units that its weights were learned in.

    The run takes over these units, tiles and theta, instead of those of its own training split: a pixel then means the
    convergence that the weights expect, and the summary the theta that the head was taught.
    """

    path: Path
    compressor: TrainedCompressor
    norm_stats: NormStats
    manifest: SplitManifest

    def give_weights(self, model: FieldLevelCompressor) -> None:
        """Copy all weights; those of the loss only if it is the same."""
        other = self.compressor.model
        same_loss = type(other.loss) is type(model.loss)
        taken = {k: v for k, v in other.state_dict().items() if same_loss or not k.startswith("loss.")}
        model.load_state_dict(model.state_dict() | taken)

    def seen_with(self, data: SplitTiles) -> SplitTiles:
        """The data, whose `seen` now also has what the pretraining saw.

        Raises:
            UserError: the pretraining saw the fiducial cosmology, or learnt from tiles of this run's other splits.
        """
        seen, fiducial = self.compressor.seen, data.tiles.params[data.fiducial_ds.rows[:1].numpy()]
        if len(_shared(fiducial, seen)):
            raise UserError(
                f"--init-from {self.path} was trained on the cosmology of the fiducial simulation "
                f"{data.manifest.fiducial_sim_id}; train it with that simulation held out (--fiducial-sim-id)"
            )
        if self.manifest.fingerprint == data.manifest.fingerprint:
            learnt, splits = set(map(tuple, self.manifest.splits["compressor_train"])), data.manifest.splits
            if leaked := sum(tuple(key) in learnt for key in [*splits["npe_train"], *splits["test"]]):
                raise UserError(
                    f"--init-from {self.path} has learnt from {leaked} tiles of this run's NPE and test splits; train "
                    "it with this run's --split-seed, --split-by and --n-sims"
                )
        if shared := len(_shared(data.seen, seen)):
            warn(
                f"--init-from {self.path} was trained on {shared} of this run's {len(data.seen)} cosmologies; if their "
                "tiles are the same, the validation loss is too low and the posterior too narrow"
            )
        return replace(data, seen=np.unique(np.concatenate([data.seen, seen]), axis=0))


def read_pretrained(config: CompressorConfig, device: torch.device) -> Pretrained:
    """The run that --init-from names.

    Raises:
        UserError: no checkpoint, a file beside it is missing or changed, or it has another backbone or parameters.
    """
    path = Path(config.init_from)
    compressor = load_compressor(path, device, config.precision)
    norm_stats, manifest = read_norm_stats(path.parent), read_manifest(path.parent)
    for name, found, wanted in (
        (NORM_STATS_NAME, norm_stats.sha256, compressor.norm_stats_sha256),
        (MANIFEST_NAME, manifest.sha256, compressor.manifest_sha256),
    ):
        if found != wanted:
            raise UserError(f"{path.parent / name} is not what --init-from was trained with; restore it")
    for name in ("backbone", "params"):
        there, here = getattr(compressor.config, name), getattr(config, name)
        if there != here:
            raise UserError(
                f"--init-from {path} has {flag_of(name)} {there}, this run {here}; give the same, or another checkpoint"
            )
    return Pretrained(path, compressor, norm_stats, manifest)


def _shared(some: np.ndarray, others: np.ndarray) -> np.ndarray:
    """The rows of some (n, 8) that are also in others (m, 8)."""
    return np.array([row for row in some if np.isclose(row, others, rtol=SAME, atol=0).all(axis=1).any()])
