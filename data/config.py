"""Options of the commands that work on tiles: run_check.py, run_fetch.py, and what the others share with them."""

from dataclasses import dataclass
from typing import Literal

from common.artifacts import NONE
from common.errors import UserError
from common.options import ResultsOptions, option

NoiseLevel = Literal["noiseless", "des_y3", "lsst_y10", "des_y3_survey", "lsst_y10_survey"]
SplitBy = Literal["tile", "sim"]
TileGeometry = Literal["auto", "published", "disjoint"]
TilesOn = Literal["auto", "device", "disk"]

FIDUCIAL_SIM_ID = 109
KINDS, ALL = ("m", "dz", "ia"), "all"  # of --nuisance
NUISANCE_HELP = (
    "what varies of the survey: m (shear bias), dz (redshifts), ia (alignments), some joined by +, all or none"
)


@dataclass(frozen=True, kw_only=True)
class TilesDirOptions(ResultsOptions):
    """Where a command finds its tiles."""

    tiles_dir: str = option(
        "",
        "folder of shards, may hold {lmax}, {noise_level}, {nuisance} (_m, …) (default: below --results-dir)",
        path=True,
    )


@dataclass(frozen=True, kw_only=True)
class TileOptions(TilesDirOptions):
    """Which tiles are meant; stage 2 has these from its checkpoint instead."""

    lmax: int = option(200, "largest multipole of the tiles", above=0)
    nside: int = option(0, "pixels per side of a tile (0: as lmax needs, 128 at 200)", at_least=0)
    noise_level: NoiseLevel = option("des_y3", "shape noise as published, or *_survey at twice that power")
    nuisance: str = option(NONE, NUISANCE_HELP, in_tag=True)


@dataclass(frozen=True, kw_only=True)
class SplitOptions(TileOptions):
    """How tiles are split and audited; stage 2 has these from stage 1."""

    split_by: SplitBy = option("tile", "split single tiles, or whole simulations")
    split_seed: int = option(42, "seed of the split; keep it, so that runs are comparable", at_least=0)
    fiducial_sim_id: int = option(FIDUCIAL_SIM_ID, "simulation held out of every split")
    geometry: TileGeometry = option("auto", "where the tiles lie on the sky; auto: as the shards say")
    n_sims: int = option(
        0, "subset of the suite: the fiducial simulation and others, so many in all (0: all)", in_tag=True, at_least=0
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        kinds_of(self.nuisance)


@dataclass(frozen=True, kw_only=True)
class CheckConfig(SplitOptions):
    """Check a folder of tiles before training: what the splits share, odd tiles, the fiducial's place in the prior."""


@dataclass(frozen=True, kw_only=True)
class FetchConfig(ResultsOptions):
    """Download the published Gower Street tiles of one configuration from the Hugging Face hub."""

    lmax: int = option(200, "largest multipole of the tiles", above=0)
    noise_level: str = option("des_y3", "shape noise of the tiles", plain_name=True)
    repo: str = option("EiffL/GowerStreetDESY3", "data set on the hub")
    revision: str = option("main", "branch, tag or commit of it")
    endpoint: str = option("", "another server than huggingface.co")

    @property
    def configuration(self) -> str:
        """Name of its folder on the hub."""
        return f"lmax_{self.lmax}_{self.noise_level}"


def kinds_of(text: str) -> tuple[str, ...]:
    """The kinds of one --nuisance: "none", "all", or some joined by +, in the order of KINDS.

    Raises:
        UserError: it is written otherwise; then one suite could have two folders.
    """
    if text in (NONE, ALL):
        return KINDS if text == ALL else ()
    given = text.lower().replace(" ", "").split("+")
    kinds = tuple(kind for kind in KINDS if kind in given)
    written = ALL if kinds == KINDS else "+".join(kinds)
    if not set(given) <= {*KINDS}:
        raise UserError(f"--nuisance {text!r} is none of {NONE}, {', '.join(KINDS)} or {ALL}; several go as m+ia")
    if written != text:
        raise UserError(f"--nuisance {text!r} is written {written}")
    return kinds


def kind_of(nuisance: str) -> str:
    """The kind of a nuisance by the name of its column, such as A_IA or dz_1."""
    return "ia" if nuisance.endswith("_IA") else nuisance.partition("_")[0]


def nuisance_list(text: str) -> list[str]:
    """The nuisances of an option that is a list with commas; UserError if one is unknown."""
    found = list(dict.fromkeys(one.strip() for one in text.split(",")))
    for one in found:
        kinds_of(one)
    return found


def check_priors_are_used(priors: str, nuisance: str) -> None:
    """Raise UserError for --nuisance-priors where no nuisance varies."""
    if priors and not any(map(kinds_of, nuisance_list(nuisance))):
        raise UserError(f"--nuisance-priors {priors} is for nuisances, of which none varies; add --nuisance all")


def number_list(flag: str, text: str) -> list[int]:
    """The numbers of an option that is a list with commas, smallest first.

    Raises:
        UserError: it is no such list.
    """
    try:
        values = sorted({int(part) for part in text.split(",")})
    except ValueError:
        raise UserError(f"{flag} {text!r} is not a list like 200,400,600") from None
    if values[0] <= 0:
        raise UserError(f"{flag} is {values[0]}; it must be positive")
    return values
