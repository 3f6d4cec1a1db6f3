"""CompressorResult: what stage 1 has reached, and what it was made with."""

from dataclasses import dataclass
from typing import Any

from common.results import key
from data.audit import Audit

RESULT_NAME = "result.json"


@dataclass(frozen=True)
class CompressorResult:
    """The content of result.json."""

    lmax: int = key("largest multipole of the tiles")
    noise_level: str = key("shape noise of the tiles")
    backbone: str = key("network")
    train_mse: float = key(
        "mean squared error of normalised theta, best weights, training tiles as they are; 1 is to know nothing"
    )
    val_mse: float = key("the same on the validation split")
    test_mse: float = key("the same on the test split")
    train_nll: float | None = key("with --loss nll, that loss on the training tiles as they are, in nats; else null")
    val_nll: float | None = key("the same on the validation split")
    test_nll: float | None = key("the same on the test split")
    epochs: int = key("epochs of the training")
    best_epoch: int = key("epoch of the best weights, from 0")
    stopped: str = key("what ended the training: `early stopping` or `max_epochs`")
    elapsed_s: float = key("seconds of training, over all interruptions")
    init_from: str | None = key("SHA-256 of the checkpoint that --init-from named; null without")
    n_tiles: dict[str, int] = key("tiles of each split")
    n_parameters: int = key("weights of the network")
    audit: Audit = key("what the splits share, and more, see [leakage](leakage.md)")
    manifest_sha256: str = key("hash of split_manifest.json")
    folder: str = key("folder of the run")
    tiles_dir: str = key("folder of the tiles")
    fingerprints: dict[str, str | None] = key(
        "SHA-256 of the data: `tiles`, and `noiseless_tiles` (null without --noiseless-tiles)"
    )
    device: str = key("hardware")
    precision: str = key("of the network's arithmetic: float32 or bfloat16")
    versions: dict[str, str] = key(
        "`commit` of this code (with `+changes` if a tracked file differs), Python and the packages"
    )
    config: dict[str, Any] = key("every option")
