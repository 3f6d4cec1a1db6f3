"""The options of every command, each defined once.

A frozen dataclass per command is the single definition: the command line and the `modal run`
signature are generated from it, and it is stored in every checkpoint and result. Free of torch, so
that launching a remote run needs none.
"""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import re
import shlex
import types
import typing
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from common.errors import UserError

NoiseLevel = Literal["noiseless", "des_y3", "lsst_y10", "des_y3_survey", "lsst_y10_survey"]
Device = Literal["auto", "cpu", "cuda", "mps"]
Precision = Literal["auto", "float32", "bf16"]
Feed = Literal["auto", "resident", "stream"]
Backbone = Literal["efficientnet_v2_s", "efficientnet_b0", "efficientnet_b2", "tiny", "power"]
SplitBy = Literal["tile", "sim"]
Geometry = Literal["disjoint", "published", "flat"]
TileGeometry = Literal["auto", "published", "disjoint"]
Field = Literal["lognormal", "gaussian"]
Vary = Literal["all", "Omega_m,S8"]
SkyGeometry = Literal["disjoint", "published"]
Ordering = Literal["auto", "RING", "NEST"]
PixelWindow = Literal["auto", "divide", "keep"]

FIDUCIAL_SIM_ID = 109
SHA256 = re.compile("[0-9a-f]{64}")
# Options that may change when an interrupted run goes on: where files lie, and what does not touch the result.
# The tiles and the compressor themselves are compared by their hashes.
FREE_TO_CHANGE = {
    "results_dir", "tiles_dir", "noiseless_tiles", "calibration_tiles", "ckpt", "tag", "restart", "feed",
    "checkpoint_seconds",
}  # fmt: skip


def option(
    default: Any, help: str
) -> Any:  # Any: as dataclasses.field, it stands where a value of the field's type does
    """A dataclass field with its default and the one sentence that --help shows."""
    return dataclasses.field(default=default, metadata={"help": help})


def required(help: str) -> Any:
    """A dataclass field without a default."""
    return dataclasses.field(metadata={"help": help})


@dataclass(frozen=True, kw_only=True)
class ResultsOptions:
    """Where a command writes."""

    results_dir: str = option("results", "folder that everything is read from and written to")

    def __post_init__(self) -> None:
        """The end of every chain of super().__post_init__()."""


@dataclass(frozen=True, kw_only=True)
class SharedOptions(ResultsOptions):
    """Where a command reads and writes."""

    tiles_dir: str = option(
        "",
        "another folder of shard_*.parquet; {lmax} and {noise_level} in it stand for the run's (default: the one for "
        "them below --results-dir)",
    )


@dataclass(frozen=True, kw_only=True)
class SeedOptions(ResultsOptions):
    """Options of a command that draws at random and writes."""

    seed: int = option(42, "seed of every random draw of this command")
    restart: bool = option(False, "delete a finished run or suite of the same name and start over")

    def __post_init__(self) -> None:
        super().__post_init__()
        _not_negative(self, "seed")


@dataclass(frozen=True, kw_only=True)
class WritingOptions(SharedOptions, SeedOptions):
    """Options of a command that reads, draws at random and writes."""


@dataclass(frozen=True, kw_only=True)
class TileOptions(SharedOptions):
    """Which tiles are meant; stage 2 has these from its checkpoint instead."""

    lmax: int = option(200, "largest multipole of the tiles")
    nside: int = option(0, "pixels per side of a tile (0: those that belong to lmax, 128 at 200)")
    noise_level: NoiseLevel = option(
        "des_y3", "shape noise; des_y3 and lsst_y10 as published, *_survey at twice that power"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        _positive(self, "lmax")
        _not_negative(self, "nside")


@dataclass(frozen=True, kw_only=True)
class MockConfig(TileOptions, WritingOptions):
    """Build a mock tomographic lensing suite: shards of tiles with known cosmology."""

    n_sims: int = option(791, "number of simulations, the fiducial one among them")
    geometry: Geometry = option(
        "disjoint",
        "where the twelve tiles lie: disjoint patches, the overlapping ones of the published suite, or (flat) twelve "
        "independent periodic squares, whose posterior is known exactly",
    )
    field: Field = option("lognormal", "statistics of the convergence field")
    vary: Vary = option("all", "parameters that vary; the others stay at the fiducial")
    fresh: bool = option(
        False, "other cosmologies and skies from the same prior, without the fiducial, into {results-dir}/fresh_tiles"
    )
    workers: int = option(0, "worker processes (0: one per core); the tiles do not depend on it")
    fiducial_sim_id: int = option(FIDUCIAL_SIM_ID, "sim_id that is pinned to the fiducial cosmology")

    def __post_init__(self) -> None:
        super().__post_init__()
        _positive(self, "n_sims", "fiducial_sim_id")
        _not_negative(self, "workers")
        if self.geometry == "flat" and self.field != "gaussian":
            raise UserError("--geometry flat is made of Fourier modes, which are Gaussian; add --field gaussian")
        if self.geometry != "flat" and self.nside & (self.nside - 1):
            raise UserError(f"--nside {self.nside} is no power of two, which HEALPix needs; or take --geometry flat")


@dataclass(frozen=True, kw_only=True)
class IngestConfig(SeedOptions):
    """Make tiles from simulated lightcones (the Gower Street files) or from full-sky convergence maps."""

    lightcones: str = option(
        "", "folder of simulations (sim00042/ or sim00042.tar.gz, as served), or the URL that serves them"
    )
    kappa_maps: str = option(
        "", "in their place: pattern like 'maps/*' of FITS files with four maps, or of folders with four files"
    )
    params: str = required("table of cosmologies, as gower_street_runs.csv")
    nz: str = option("", "n(z) of the four bins: text table (z n_1 n_2 n_3 n_4), or 2-point FITS file with NZ_SOURCE")
    lmax: str = option("200", "largest multipoles, with commas between them")
    noise_level: str = option("des_y3", "shape noise, with commas between several; one realisation serves them all")
    geometry: SkyGeometry = option(
        "disjoint", "where the twelve tiles lie: disjoint patches, or the overlapping ones of the published suite"
    )
    sims: str = option("", "these simulations alone, like 1-50,109 (default: all that are there)")
    ordering: Ordering = option("auto", "order of the pixels of --kappa-maps; auto takes what the file says")
    pixel_window: PixelWindow = option(
        "auto", "divide: undo the averaging over a pixel; auto divides for lightcones, whose counts are such averages"
    )
    strict: bool = option(False, "stop at the first incomplete or damaged simulation, in place of leaving it out")
    workers: int = option(0, "worker processes (0: one per core, as far as memory goes); no tile depends on it")

    def __post_init__(self) -> None:
        super().__post_init__()
        _not_negative(self, "workers")
        if bool(self.lightcones) == bool(self.kappa_maps):
            raise UserError("give --lightcones or --kappa-maps, one of the two")
        if self.lightcones and not self.nz:
            raise UserError("--lightcones needs the sources as well; give their n(z) as --nz")
        if self.kappa_maps and self.nz:
            raise UserError("--kappa-maps are of their own sources; leave out --nz")
        known = typing.get_args(NoiseLevel)
        if unknown := [level for level in self.noise_list if level not in known]:
            raise UserError(f"--noise-level {unknown[0]!r} is none of {', '.join(known)}; several go with commas")
        self.sim_list, self.configurations  # noqa: B018  (a senseless value is refused here)

    @property
    def kind(self) -> str:
        """What the tiles are made from."""
        return "lightcones" if self.lightcones else "kappa maps"

    @property
    def noise_list(self) -> list[str]:
        """Every noise level once."""
        return list(dict.fromkeys(level.strip() for level in self.noise_level.split(",")))

    @property
    def configurations(self) -> list[tuple[int, str]]:
        """Every lmax with every noise level."""
        return [(lmax, level) for lmax in lmax_list(self.lmax) for level in self.noise_list]

    @property
    def sim_list(self) -> list[int] | None:
        """The numbers that --sims means; None for all."""
        if not self.sims:
            return None
        found: set[int] = set()
        for part in self.sims.split(","):
            first, _, last = part.partition("-")
            try:
                found |= set(range(int(first), int(last or first) + 1))
            except ValueError:
                raise UserError(f"--sims {self.sims!r} is not a list like 1-50,109") from None
        return sorted(found)


@dataclass(frozen=True, kw_only=True)
class FetchConfig(ResultsOptions):
    """Download the published Gower Street tiles of one configuration from the Hugging Face hub."""

    lmax: int = option(200, "largest multipole of the tiles")
    noise_level: str = option("des_y3", "shape noise of the tiles")
    repo: str = option("EiffL/GowerStreetDESY3", "data set on the hub")
    revision: str = option("main", "branch, tag or commit of it")
    endpoint: str = option("", "another server than huggingface.co")

    def __post_init__(self) -> None:
        super().__post_init__()
        _positive(self, "lmax")
        _plain_name(self.noise_level, "--noise-level")

    @property
    def configuration(self) -> str:
        """Name of its folder on the hub."""
        return f"lmax_{self.lmax}_{self.noise_level}"


@dataclass(frozen=True, kw_only=True)
class TrainingOptions(SharedOptions):
    """What a training computes with."""

    device: Device = option("auto", "auto takes cuda, then mps, then cpu")
    precision: Precision = option(
        "auto",
        "autocast of the compressor; auto: bf16 on a GPU that computes in it, and for efficientnet_v2_s on such a CPU, "
        "else float32, without TF32",
    )
    noiseless_tiles: str = option(
        "",
        "folder of the same tiles without noise; every training tile is then its signal with another tile's noise "
        "(stage 2: default as stage 1)",
    )
    feed: Feed = option(
        "auto", "tiles are held on the device (resident) or read batch by batch (stream); auto holds them if they fit"
    )
    checkpoint_seconds: float = option(
        60.0, "save last.ckpt at most so often; a killed run goes on from it with the same command"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        _not_negative(self, "checkpoint_seconds")


@dataclass(frozen=True, kw_only=True)
class SplitOptions(TileOptions):
    """How tiles are dealt out and audited; stage 2 has these from stage 1."""

    split_by: SplitBy = option("tile", "what is dealt out to the splits: single tiles, or whole simulations")
    split_seed: int = option(42, "seed of the split; leave it, so that runs are comparable")
    fiducial_sim_id: int = option(FIDUCIAL_SIM_ID, "simulation held out of every split")
    geometry: TileGeometry = option(
        "auto",
        "where the tiles lie, to find those that share sky; auto takes what the shards say, published ones nothing",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        _not_negative(self, "split_seed")


@dataclass(frozen=True, kw_only=True)
class CheckConfig(SplitOptions):
    """Check a folder of tiles before training: what the splits share, odd tiles, the fiducial's place in the prior."""


@dataclass(frozen=True, kw_only=True)
class CompressorConfig(SplitOptions, TrainingOptions, WritingOptions):
    """Stage 1: train the field-level compressor, an EfficientNet that learns normalised theta from a tile."""

    backbone: Backbone = option(
        "efficientnet_v2_s", "network; tiny is for laptops and tests, power sees power spectra alone"
    )
    max_epochs: int = option(500, "train at most so many epochs")
    batch_size: int = option(128, "tiles per step")
    patience: int = option(50, "stop after so many epochs without a lower validation loss")
    learning_rate: float = option(8e-3, "peak learning rate of AdamW")
    weight_decay: float = option(1e-5, "weight decay of AdamW")
    warmup_steps: int = option(500, "steps of linear warm-up to the peak learning rate")
    decay_factor: float = option(0.85, "the learning rate is multiplied by this ...")
    decay_epochs: int = option(20, "... every so many epochs")
    ema_decay: float = option(
        0.0,
        "keep an exponential moving average of the weights with this decay per step, and validate and save it (0: off)",
    )
    norm_tiles: int = option(
        0,
        "before every validation, take the BatchNorm statistics afresh from so many training tiles as they are, not "
        "turned and rolled (0: keep the running ones)",
    )
    theta_noise: float = option(0.005, "standard deviation of Gaussian noise on the normalised theta while training")
    tag: str = option("", "name of the run (default: field_mse_lmax{lmax}_{noise-level}_{backbone})")

    def __post_init__(self) -> None:
        super().__post_init__()
        _positive(self, "max_epochs", "batch_size", "patience", "learning_rate", "decay_factor", "decay_epochs")
        _not_negative(self, "weight_decay", "warmup_steps", "theta_noise", "ema_decay", "norm_tiles")
        if self.ema_decay >= 1:
            raise UserError(f"--ema-decay is {self.ema_decay}; it must be below 1")
        _plain_name(self.tag)

    @property
    def run_tag(self) -> str:
        """Name of the run's folder."""
        return self.tag or f"field_mse_lmax{self.lmax}_{self.noise_level}_{self.backbone}"


@dataclass(frozen=True, kw_only=True)
class NPEConfig(TrainingOptions, WritingOptions):
    """Stage 2: learn the posterior from the frozen compressor's summaries; the Figure of Merit at the fiducial."""

    ckpt: str = required("best.ckpt of a stage-1 run; its split and normalisation are read from beside it")
    results_dir: str = option("", "folder to read from and write to (default: the one that --ckpt lies in)")
    tiles_dir: str = option("", "another folder of shard_*.parquet (default: the tiles that stage 1 was trained on)")
    lmax: int | None = option(None, "checked against the checkpoint if given")
    noise_level: str | None = option(None, "checked against the checkpoint if given")
    max_epochs: int = option(500, "train at most so many epochs")
    batch_size: int = option(256, "tiles per step")
    patience: int = option(30, "stop after so many epochs without a lower loss on the test split")
    learning_rate: float = option(1e-3, "learning rate of AdamW")
    weight_decay: float = option(1e-5, "weight decay of AdamW")
    n_members: int = option(5, "NPEs with other initial weights on the same batches; the FoM is that of the first")
    n_views: int = option(1, "average each summary over so many turned and rolled views of the tile")
    calibration_tiles: str = option(
        "", "folder of independent simulations to check the posterior on (run_mock.py --fresh); else the test split"
    )
    tag: str = option("", "name of the run (default: that of the stage-1 run)")

    def __post_init__(self) -> None:
        super().__post_init__()
        _positive(self, "max_epochs", "batch_size", "patience", "learning_rate", "n_members", "n_views")
        _not_negative(self, "weight_decay")
        _plain_name(self.tag)


@dataclass(frozen=True, kw_only=True)
class SweepConfig(ResultsOptions):
    """Both stages for several lmax and several seeds: the Figure of Merit against lmax."""

    lmax: str = option("200,400,600", "largest multipoles, with commas between them; the tiles of each must be there")
    seeds: int = option(3, "so many seeds at every lmax")
    seed: int = option(42, "the first of them; the others follow")
    noise_level: NoiseLevel = option("des_y3", "shape noise of the tiles")
    stage_1: str = option("", "further options of run_compressor.py, in quotes")
    stage_2: str = option("", "further options of run_npe.py, in quotes")
    name: str = option("sweep", "name of the sweep; its runs are named {name}_lmax{lmax}_seed{seed}")

    def __post_init__(self) -> None:
        super().__post_init__()
        _positive(self, "seeds")
        _not_negative(self, "seed")
        _plain_name(self.name, "--name")
        for run in self.runs:  # a senseless option is refused before anything is computed
            run.compressor()
            run.npe("")

    @property
    def runs(self) -> list[SweepRun]:
        """One for every lmax and seed."""
        return [SweepRun(self, lmax, self.seed + k) for lmax in lmax_list(self.lmax) for k in range(self.seeds)]


@dataclass(frozen=True)
class SweepRun:
    """One point of a sweep."""

    sweep: SweepConfig
    lmax: int
    seed: int

    @property
    def tag(self) -> str:
        """Name of both stages' folders."""
        return f"{self.sweep.name}_lmax{self.lmax}_seed{self.seed}"

    def compressor(self) -> CompressorConfig:
        """Options of stage 1."""
        given = {"lmax": self.lmax, "noise_level": self.sweep.noise_level}
        return self._parsed(CompressorConfig, self.sweep.stage_1, given)

    def npe(self, ckpt: str) -> NPEConfig:
        """Options of stage 2."""
        return self._parsed(NPEConfig, self.sweep.stage_2, {"ckpt": ckpt})

    def _parsed(self, config_class: type[Config], text: str, given: dict[str, Any]) -> Config:
        given |= {"results_dir": self.sweep.results_dir, "seed": self.seed, "tag": self.tag}
        own = [_flag(name) for name in given]
        if twice := [word for word in text.split() if word.split("=")[0] in own]:
            raise UserError(f"{twice[0]} is the sweep's own option; leave it out of the quotes")
        flags = [word for name, value in given.items() for word in (_flag(name), str(value))]
        try:
            words = shlex.split(text)
        except ValueError as error:
            raise UserError(f"{text!r} cannot be read as options ({error}); see to its quotes") from None
        return parse_args(config_class, [*flags, *words])


@dataclass(frozen=True, kw_only=True)
class PredictConfig(ResultsOptions):
    """Answer single tiles with a finished stage-2 run: posterior, samples, and whether they look like its suite."""

    run: str = required("folder of a finished stage-2 run")
    tiles: str = required("shard_*.parquet, or .npy of shape (4, N, N) or (n, 4, N, N): whole tiles without a mask")
    results_dir: str = option("", "folder to write to (default: predictions/ in the run's)")
    n_samples: int = option(10_000, "samples of each posterior, for GetDist (0: none)")
    seed: int = option(42, "seed of the samples")
    device: Device = option("auto", "auto takes cuda, then mps, then cpu")

    def __post_init__(self) -> None:
        super().__post_init__()
        _not_negative(self, "n_samples", "seed")


Config = TypeVar("Config", bound=ResultsOptions)


def begun_with(config: ResultsOptions) -> dict[str, Any]:
    """The options that make a run what it is."""
    return {name: value for name, value in dataclasses.asdict(config).items() if name not in FREE_TO_CHANGE}


def difference(there: dict[str, Any], here: dict[str, Any]) -> str:
    """What differs between two sets of options, in words; empty if nothing does."""
    names = list(dict.fromkeys([*there, *here]))
    return ", ".join(
        f"{_flag(name)} {_shown(there.get(name))} there, {_shown(here.get(name))} here"
        for name in names
        if there.get(name) != here.get(name)
    )


def _shown(value: Any) -> str:
    text = str(value)
    return text[:12] if SHA256.fullmatch(text) else text


def lmax_list(text: str) -> list[int]:
    """The multipoles of a list with commas, smallest first.

    Raises:
        UserError: it is no such list.
    """
    try:
        values = sorted({int(part) for part in text.split(",")})
    except ValueError:
        raise UserError(f"--lmax {text!r} is not a list like 200,400,600") from None
    if values[0] <= 0:
        raise UserError(f"--lmax is {values[0]}; it must be positive")
    return values


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _positive(config: Any, *names: str) -> None:
    for name in names:
        if not getattr(config, name) > 0:
            raise UserError(f"{_flag(name)} is {getattr(config, name)}; it must be positive")


def _not_negative(config: Any, *names: str) -> None:
    for name in names:
        if not getattr(config, name) >= 0:
            raise UserError(f"{_flag(name)} is {getattr(config, name)}; it must not be negative")


def _plain_name(name: str, flag: str = "--tag") -> None:
    if name.startswith(".") or "/" in name or "\\" in name:
        raise UserError(f"{flag} {name!r} must be a plain folder name, without slashes or a leading dot")


def parse_args(config_class: type[Config], argv: list[str] | None = None) -> Config:
    """Build a command's config from the command line; one flag per field of the dataclass.

    Raises:
        UserError: an option whose value makes no sense. (argparse itself exits with code 2.)
    """
    parser = argparse.ArgumentParser(description=config_class.__doc__, allow_abbrev=False)
    types_of = typing.get_type_hints(config_class)
    for field in dataclasses.fields(config_class):
        help_text = field.metadata["help"].replace("%", "%%")
        if (
            field.default not in (dataclasses.MISSING, None, "")
            and "default" not in help_text
            and types_of[field.name] is not bool
        ):
            help_text += f" (default: {field.default})"
        annotation = types_of[field.name]
        if typing.get_origin(annotation) is types.UnionType:  # X | None is parsed as X
            annotation = next(a for a in typing.get_args(annotation) if a is not type(None))
        kwargs: dict[str, Any] = {"help": help_text, "dest": field.name}
        if annotation is bool:
            kwargs.update(action=argparse.BooleanOptionalAction, default=field.default)
        elif field.default is dataclasses.MISSING:
            kwargs.update(type=annotation, required=True)
        elif typing.get_origin(annotation) is Literal:
            kwargs.update(choices=typing.get_args(annotation), default=field.default)
        else:
            kwargs.update(type=annotation, default=field.default, metavar=annotation.__name__.upper())
        parser.add_argument(_flag(field.name), **kwargs)
    return config_class(**vars(parser.parse_args(argv)))


def with_signature_of(config_class: type) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give `def modal_main(**options)` the fields of a config as its signature, for the modal client.

    `modal run run_compressor.py --help` then lists the same options as argparse does.
    """

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        function.__signature__ = inspect.signature(config_class)  # type: ignore[attr-defined]
        function.__annotations__ = typing.get_type_hints(config_class)
        return function

    return decorate
