"""FieldLevelCompressor: an EfficientNet (or power spectra) with a linear head that maps a tile to normalised theta."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torchvision
from torch import nn
from torchvision.models.efficientnet import EfficientNet, FusedMBConvConfig, MBConvConfig

from common.artifacts import sha256_of_file
from common.checkpoint import load_checkpoint, save_checkpoint
from common.device import DTYPES, autocast
from common.errors import UserError
from common.machine import Precision, computes_in_bf16
from compress.config import Backbone, CompressorConfig, Loss
from compress.loss import LOSSES
from compress.power import HIDDEN, PowerFilters
from compress.spectra import BandPowers

CHECKPOINT_NAME = "best.ckpt"
KIND = "compressor"
CURE = "give the best.ckpt of a stage-1 run, or run stage 1 again"


def pick_precision(name: Precision, device: torch.device, backbone: Backbone) -> torch.dtype:
    """The dtype of the network's arithmetic; auto takes the fastest: bf16 on a GPU that computes in it.

    On a CPU with bf16 arithmetic efficientnet_v2_s takes 0.8 of the time in bf16, tiny and efficientnet_b0 1.2 times
    the time (benchmarks/README.md).
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


def _backbone(name: Backbone, n_bins: int) -> tuple[nn.Module, nn.Module, int]:
    """The layers that make features of a tile, their pooling, and the number of features."""
    if "+" in name:
        parts = [_backbone(cast(Backbone, part), n_bins) for part in name.split("+")]
        networks = (nn.Sequential(features, pool) for features, pool, _ in parts)
        return SideBySide(*networks), nn.Identity(), sum(n for *_, n in parts)
    if name in ("power", "moments"):
        return PowerFilters(n_bins, skewness=name == "moments"), nn.Identity(), HIDDEN
    if name == "spectra":
        return BandPowers(n_bins), nn.Identity(), HIDDEN
    network = _tiny() if name == "tiny" else getattr(torchvision.models, name)(weights=None)
    network.features[0][0] = _conv_for_bins(network.features[0][0], n_bins)
    return network.features, network.avgpool, network.classifier[-1].in_features


def _conv_for_bins(stem: nn.Conv2d, n_bins: int) -> nn.Conv2d:
    """The first convolution with one input channel per tomographic bin, initialised as torchvision does."""
    conv = nn.Conv2d(n_bins, stem.out_channels, kernel_size=3, stride=2, padding=1, bias=False)
    assert conv.stride == stem.stride, "torchvision changed its stem"
    nn.init.kaiming_normal_(conv.weight, mode="fan_out")
    return conv


class SideBySide(nn.Module):
    """The features of two networks, one after the other: tile (B, n_bins, N, N) -> (B, C_1 + C_2)."""

    def __init__(self, *networks: nn.Module) -> None:
        super().__init__()
        self.networks = nn.ModuleList(networks)

    def forward(self, kappa: torch.Tensor) -> torch.Tensor:
        return torch.cat([network(kappa).flatten(1).float() for network in self.networks], dim=1)


class FieldLevelCompressor(nn.Module):
    """Tile (B, n_bins, N, N) -> summary (B, n_params), an estimate of normalised theta.

    The backbone runs in `dtype` (bf16 by autocast, or float32); the head always in float32, since
    its output is the result. `loss` compares summaries with the truth, and may have weights of its own.
    """

    def __init__(
        self, backbone: Backbone, n_bins: int, n_params: int, dtype: torch.dtype = torch.float32, loss: Loss = "mse"
    ) -> None:
        super().__init__()
        self.features, self.pool, n_features = _backbone(backbone, n_bins)
        self.head = nn.Linear(n_features, n_params)
        self.loss = LOSSES[loss](n_params)
        self.n_bins, self.dtype = n_bins, dtype
        self.to(memory_format=torch.channels_last)

    def forward(self, kappa: torch.Tensor) -> torch.Tensor:
        with autocast(kappa.device, self.dtype):
            features = self.pool(self.features(kappa)).flatten(1)  # (B, C, 1, 1) -> (B, C)
        return self.head(features.float())  # (B, n_params)


@dataclass(frozen=True)
class TrainedCompressor:
    """What best.ckpt holds."""

    model: FieldLevelCompressor  # in evaluation mode, on its device
    config: CompressorConfig
    manifest_sha256: str  # of the split and the normalisation that it was trained with
    norm_stats_sha256: str
    epoch: int
    val_loss: float
    seen: np.ndarray  # (n, 8) cosmologies of the simulations behind the weights, in the order of PARAM_NAMES
    sha256: str  # of the file; results name the compressor by it


def save_compressor(
    path: Path,
    model: FieldLevelCompressor,
    config: CompressorConfig,
    provenance: dict[str, Any],
    epoch: int,
    val_loss: float,
) -> None:
    """Write best.ckpt; the provenance is that of SplitTiles."""
    content = {"model": model.state_dict(), "n_bins": model.n_bins, "config": asdict(config)}
    save_checkpoint(path, KIND, content | provenance | {"epoch": epoch, "val_loss": val_loss})


def load_compressor(path: Path, device: torch.device, precision: Precision) -> TrainedCompressor:
    """Read best.ckpt; UserError if it is no compressor checkpoint, or its weights do not fit its options."""
    plain = ("manifest_sha256", "norm_stats_sha256", "epoch", "val_loss")
    content = load_checkpoint(path, KIND, ("model", "n_bins", "config", "seen", *plain), CURE)
    try:
        config = CompressorConfig(**content["config"])
        dtype = pick_precision(precision, device, config.backbone)
        model = FieldLevelCompressor(config.backbone, content["n_bins"], len(config.theta_names), dtype, config.loss)
        model.load_state_dict(content["model"])
    except (TypeError, RuntimeError, AttributeError):
        raise UserError(f"{path}: its weights and options do not fit together; run stage 1 again") from None
    some = {name: content[name] for name in plain} | {"seen": content["seen"].numpy()}
    return TrainedCompressor(model=model.to(device).eval(), config=config, **some, sha256=sha256_of_file(path))
