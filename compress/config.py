"""Options of run_compressor.py, and what both stages compute with."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from common.errors import UserError
from common.machine import Device, Precision
from common.options import ResumableOptions, option, tag_suffix
from data.config import SplitOptions, TilesDirOptions, TilesOn
from data.schema import FOM_PARAMS, NUISANCE, PARAM_NAMES

Loss = Literal["mse", "nll"]
Backbone = Literal[
    "efficientnet_v2_s", "efficientnet_b0", "efficientnet_b2", "tiny", "spectra", "power", "moments",
    "efficientnet_v2_s+moments", "efficientnet_b0+moments", "efficientnet_b2+moments", "tiny+moments",
]  # fmt: skip

# Named sets of options for --recipe; the defaults below are the mission's recipe. docs/recipes.md has the evidence.
_LAPTOP = {
    **{"backbone": "tiny", "max_epochs": 20, "warmup_steps": 100, "decay_epochs": 5, "decay_factor": 0.6},
    **{"ema_decay": 0.99, "norm_tiles": 1024},
}
RECIPES: dict[str, dict[str, Any]] = {
    "laptop": _LAPTOP,
    "best": {
        **_LAPTOP,
        **{"backbone": "moments", "loss": "nll", "max_epochs": 40, "decay_epochs": 10, "weight_decay": 0.1},
    },
}


@dataclass(frozen=True, kw_only=True)
class TrainingOptions(TilesDirOptions, ResumableOptions):
    """What a training computes with."""

    device: Device = option("auto", "auto takes cuda, then mps, then cpu")
    precision: Precision = option("auto", "of the compressor; auto: bf16 where it is faster, else float32, never TF32")
    noiseless_tiles: str = option(
        "", "folder of the same tiles without noise, to exchange the noise of tiles", path=True
    )
    tiles_on: TilesOn = option(
        "auto", "hold tiles on the device, or read them from disk; auto: if they fit", may_change=True
    )


@dataclass(frozen=True, kw_only=True)
class CompressorConfig(SplitOptions, TrainingOptions):
    """Stage 1: train the field-level compressor, an EfficientNet that learns normalised theta from a tile."""

    recipe: str = option("", "named set of options, which single options override", may_change=True, recipes=RECIPES)
    params: str = option(",".join(FOM_PARAMS), "parameters to infer, columns of the shards", in_tag=True)
    loss: Loss = option("mse", "mean squared error, or a Gaussian's negative log-likelihood; best weights by it too")
    backbone: Backbone = option(
        "efficientnet_v2_s",
        "network; tiny for laptops, moments has learned second and third moments, power and spectra second",
    )
    init_from: str = option("", "best.ckpt of another run, to start from its weights and in its units", path=True)
    max_epochs: int = option(500, "train at most so many epochs", above=0)
    batch_size: int = option(128, "tiles per step", at_least=2)
    patience: int = option(50, "stop after so many epochs without a lower validation loss", above=0)
    learning_rate: float = option(8e-3, "peak learning rate of AdamW", above=0)
    weight_decay: float = option(1e-5, "weight decay of AdamW", at_least=0)
    warmup_steps: int = option(500, "steps of linear warm-up to the peak learning rate", at_least=0)
    decay_factor: float = option(0.85, "the learning rate is multiplied by this ...", above=0)
    decay_epochs: int = option(20, "... every so many epochs", above=0)
    ema_decay: float = option(
        0.0, "validate and save a moving average of the weights with this decay per step (0: off)", at_least=0, below=1
    )
    norm_tiles: int = option(
        0, "training tiles, not augmented, for BatchNorm statistics at each validation (0: running ones)", at_least=0
    )
    theta_noise: float = option(0.005, "Gaussian noise on the normalised theta while training", at_least=0)
    compile: bool = option(False, "torch.compile: a faster step after a slow start; needs a C++ compiler")
    gpus: int = option(1, "on Modal, GPUs of one container; elsewhere torchrun has them", may_change=True, above=0)
    tag: str = option(
        "", "name of the run (default: loss, lmax, noise level, backbone, more)", may_change=True, plain_name=True
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        names = self.theta_names
        if unknown := [name for name in names if name not in PARAM_NAMES and not NUISANCE.fullmatch(name)]:
            raise UserError(
                f"--params {unknown[0]!r} is none of {', '.join(PARAM_NAMES)}, and no nuisance (A_IA, dz_1, m_1, ...)"
            )
        if missing := [name for name in FOM_PARAMS if name not in names]:
            raise UserError(f"--params {self.params!r} lacks {missing[0]}; the FoM is that of {', '.join(FOM_PARAMS)}")
        if len(set(names)) < len(names):
            raise UserError(f"--params {self.params!r} names a parameter twice; leave one out")

    @property
    def theta_names(self) -> tuple[str, ...]:
        """The parameters to infer, in the order of theta."""
        return tuple(self.params.split(","))

    @property
    def run_tag(self) -> str:
        """Name of the run's folder."""
        start = f"_from_{Path(self.init_from).parent.resolve().name}" if self.init_from else ""
        name = f"field_{self.loss}_lmax{self.lmax}_{self.noise_level}_{self.backbone}"
        return self.tag or f"{name}{tag_suffix(self)}{start}"
