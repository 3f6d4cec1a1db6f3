"""FieldLevelCompressor: an EfficientNet (or power spectra) with a linear head that maps a tile to normalised theta."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torchvision
from torch import nn
from torchvision.models.efficientnet import EfficientNet, FusedMBConvConfig, MBConvConfig

from common.artifacts import sha256_of_file
from common.checkpoint import load_checkpoint, save_checkpoint
from common.device import DTYPES, autocast
from common.errors import UserError
from common.machine import Precision, computes_in_bf16
from compress.config import Backbone, CompressorConfig
from compress.power import HIDDEN, PowerFilters
from data.schema import N_BINS, THETA_NAMES

CHECKPOINT_NAME = "best.ckpt"
KIND = "compressor"
CURE = "give the best.ckpt of a stage-1 run, or run stage 1 again"
HASHES = ("manifest_sha256", "norm_stats_sha256")


def pick_precision(name: Precision, device: torch.device, backbone: Backbone) -> torch.dtype:
    """The dtype that the network's arithmetic runs in, the fastest unless asked: bf16 on a GPU that computes in it.

    On a CPU with bf16 arithmetic efficientnet_v2_s takes 0.8 of the time in bf16, tiny and efficientnet_b0 1.2 of it
    (benchmarks/README.md).
    """
    if name == "auto":
        if device.type == "cuda":
            pays = torch.cuda.is_bf16_supported(including_emulation=False)
        else:
            pays = device.type == "cpu" and backbone == "efficientnet_v2_s" and computes_in_bf16()
        return torch.bfloat16 if pays else torch.float32
    return DTYPES[name]


def _tiny() -> EfficientNet:
    """A four-stage EfficientNet for laptops and tests: 0.1 million parameters."""
    stages = [
        # expansion, kernel, stride, channels in, channels out, layers
        FusedMBConvConfig(1, 3, 1, 16, 16, 1),
        FusedMBConvConfig(2, 3, 2, 16, 24, 1),
        MBConvConfig(4, 3, 2, 24, 48, 1),
        MBConvConfig(4, 3, 2, 48, 64, 1),
    ]
    return EfficientNet(stages, dropout=0.0, stochastic_depth_prob=0.0, last_channel=256)


def _backbone(name: Backbone) -> tuple[nn.Module, nn.Module, int]:
    """Features of a tile, how they are pooled, and how many there are."""
    if name == "power":
        return PowerFilters(), nn.Identity(), HIDDEN
    network = _tiny() if name == "tiny" else getattr(torchvision.models, name)(weights=None)
    network.features[0][0] = _conv_for_bins(network.features[0][0])
    return network.features, network.avgpool, network.classifier[-1].in_features


class FieldLevelCompressor(nn.Module):
    """Tile (B, 4, N, N) -> summary (B, 2), an estimate of normalised (Omega_m, S8).

    The backbone runs in `dtype` (bf16 by autocast, or float32); the head always in float32, since
    its output is the result.
    """

    def __init__(self, backbone: Backbone, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.features, self.pool, n_features = _backbone(backbone)
        self.head = nn.Linear(n_features, len(THETA_NAMES))
        self.dtype = dtype
        self.to(memory_format=torch.channels_last)

    def forward(self, kappa: torch.Tensor) -> torch.Tensor:
        with autocast(kappa.device, self.dtype):
            features = self.pool(self.features(kappa)).flatten(1)  # (B, C, 1, 1) -> (B, C)
        return self.head(features.float())  # (B, 2)


def _conv_for_bins(stem: nn.Conv2d) -> nn.Conv2d:
    """The first convolution with one input channel per tomographic bin, initialised as torchvision does."""
    conv = nn.Conv2d(N_BINS, stem.out_channels, kernel_size=3, stride=2, padding=1, bias=False)
    assert conv.stride == stem.stride, "torchvision changed its stem"
    nn.init.kaiming_normal_(conv.weight, mode="fan_out")
    return conv


@dataclass(frozen=True)
class TrainedCompressor:
    """What best.ckpt holds; `sha256` is that of the file."""

    model: FieldLevelCompressor
    config: CompressorConfig
    manifest_sha256: str
    norm_stats_sha256: str
    epoch: int
    val_mse: float
    sha256: str


def save_compressor(
    path: Path,
    model: FieldLevelCompressor,
    config: CompressorConfig,
    hashes: dict[str, str],
    epoch: int,
    val_mse: float,
) -> None:
    """Write best.ckpt; `hashes` are those of the files that belong to it, named as HASHES."""
    content = {
        "model": model.state_dict(),
        "config": asdict(config),
        **hashes,
        "epoch": epoch,
        "val_mse": val_mse,
    }
    save_checkpoint(path, KIND, content)


def load_compressor(path: Path, device: torch.device, precision: Precision) -> TrainedCompressor:
    """Read best.ckpt; the network comes in evaluation mode, on the device.

    Raises:
        UserError: not a compressor checkpoint, or one whose weights do not fit its config.
    """
    content = load_checkpoint(path, KIND, ("model", "config", *HASHES, "epoch", "val_mse"), CURE)
    try:
        config = CompressorConfig(**content["config"])
        model = FieldLevelCompressor(config.backbone, pick_precision(precision, device, config.backbone))
        model.load_state_dict(content["model"])
    except (TypeError, RuntimeError, AttributeError):
        raise UserError(f"{path}: weights and options in it do not belong together; run stage 1 again") from None
    model = model.to(device).eval()
    return TrainedCompressor(
        model,
        config,
        content["manifest_sha256"],
        content["norm_stats_sha256"],
        content["epoch"],
        content["val_mse"],
        sha256_of_file(path),
    )
