"""Options of run_npe.py, run_sweep.py and run_predict.py."""

from __future__ import annotations

import shlex
from dataclasses import MISSING, dataclass, replace
from itertools import chain, product
from pathlib import Path
from typing import Any

from common.artifacts import NONE
from common.errors import UserError
from common.machine import Device
from common.options import Config, ResultsOptions, command_line, flag_of, option, parse_args
from compress.config import CompressorConfig, TrainingOptions
from data.config import NoiseLevel, kind_of, kinds_of, nuisance_list, number_list
from data.schema import NUISANCE

OF_THE_SWEEP = ("lmax", "noise_level", "nuisance", "gpus")  # of both stages, each given once; a point has one GPU
MIN_NUMBERS = 4  # of simulations, for a learning curve: one more than its law has constants


@dataclass(frozen=True, kw_only=True)
class NPEConfig(TrainingOptions):
    """Stage 2: learn the posterior from the frozen compressor's summaries; the Figure of Merit at the fiducial."""

    ckpt: str = option(MISSING, "best.ckpt of a stage-1 run; its split and normalisation lie beside it", path=True)
    results_dir: str = option("", "folder to write to (default: the one that --ckpt lies in)", may_change=True)
    tiles_dir: str = option("", "another folder of tiles (default: as stage 1)", path=True)
    lmax: int | None = option(None, "checked against the checkpoint if given")
    noise_level: str | None = option(None, "checked against the checkpoint if given")
    nuisance: str | None = option(None, "checked against the checkpoint if given")
    max_epochs: int = option(30, "train at most so many epochs; the learning rate falls to 0 over them", above=0)
    batch_size: int = option(64, "tiles per step", above=0)
    patience: int = option(30, "stop after so many epochs without a lower loss on the test split", above=0)
    learning_rate: float = option(5e-3, "learning rate of AdamW at the start", above=0)
    weight_decay: float = option(1e-5, "weight decay of AdamW", at_least=0)
    hidden_layers: int = option(
        2, "hidden layers of the NPE; 0: mean and covariance are affine in the summary", in_tag=True, at_least=0
    )
    n_members: int = option(
        5, "NPEs; the FoM is that of the first, the others learn from bootstrapped simulations", above=0
    )
    n_sims: int = option(
        0, "learn from so many of the compressor's simulations, fiducial included (0: all)", in_tag=True, at_least=0
    )
    calibration_tiles: str = option("", "fresh simulations to check the posterior on; else the test split", path=True)
    tag: str = option(
        "", "name of the run (default: that of the stage-1 run and some options)", may_change=True, plain_name=True
    )

    @property
    def compressor_checkpoint(self) -> str:
        """The checkpoint as results name it: {tag}/best.ckpt."""
        return f"{Path(self.ckpt).parent.resolve().name}/{Path(self.ckpt).name}"


@dataclass(frozen=True, kw_only=True)
class SweepConfig(ResultsOptions):
    """Both stages for several lmax, nuisances and seeds: the Figure of Merit of each, or a learning curve."""

    lmax: str = option("200,400,600", "largest multipoles, with commas between them; the tiles of each must be there")
    nuisance: str = option(NONE, "nuisances that the tiles vary, as run_mock.py has them; several with commas")
    seeds: int = option(3, "so many seeds of each", above=0)
    seed: int = option(42, "the first of them; the others follow", at_least=0)
    noise_level: NoiseLevel = option("des_y3", "shape noise of the tiles")
    stage_1: str = option("", "further options of run_compressor.py, in quotes", quotes=CompressorConfig)
    stage_2: str = option("", "further options of run_npe.py, in quotes", quotes=NPEConfig)
    n_sims: str = option("", "learning curve: train on subsets of so many simulations, with commas between them")
    name: str = option(
        "sweep",
        "name of the sweep; its runs are {name}_lmax{lmax}_seed{seed}, or {name}_lmax{lmax}_{nuisance}_seed{seed}",
        plain_name=True,
    )
    dry_run: bool = option(False, "only print the command of every point, one a line")
    point: int = option(
        0, "run this point alone, from 1, as --dry-run numbers them (0: all, and the curve)", at_least=0
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.point > len(self.runs):
            raise UserError(f"--point {self.point}: there are {len(self.runs)} points; --dry-run prints them")
        for run in self.runs:  # a senseless option is refused before anything is computed
            run.compressor()
            npe = run.npe("")
        if self.n_sims and len(self.numbers) < MIN_NUMBERS:
            raise UserError(
                f"--n-sims {self.n_sims!r}: a learning curve needs {MIN_NUMBERS} numbers, as 100,200,400,791"
            )
        if self.n_sims and len(nuisance_list(self.nuisance)) > 1:
            raise UserError(f"--n-sims takes one --nuisance at a time, not {self.nuisance}; run one sweep for each")
        if self.n_sims and not npe.calibration_tiles:
            cure = "add --calibration-tiles in the quotes of --stage-2 (python run_mock.py --fresh makes some)"
            raise UserError(f"--n-sims compares runs on tiles that none of them has seen; {cure}")

    @property
    def numbers(self) -> list[int]:
        """The numbers of simulations of a learning curve, smallest first."""
        return number_list("--n-sims", self.n_sims)

    @property
    def rounds(self) -> list[list[SweepRun]]:
        """Its runs, one for every lmax and seed; each needs no other of its round, but what those before have made.

        A learning curve has two rounds: both stages with every number of simulations, the largest first; then stage
        2 alone, on the compressor of the largest.
        """
        seeds = range(self.seed, self.seed + self.seeds)
        points = list(product(number_list("--lmax", self.lmax), nuisance_list(self.nuisance), seeds))
        if not self.n_sims:
            return [[SweepRun(self, *point) for point in points]]
        *smaller, largest = self.numbers
        both = [SweepRun(self, *point, n, n) for point in points for n in (largest, *smaller)]
        return [both, [SweepRun(self, *point, n, largest) for point in points for n in smaller]]

    @property
    def runs(self) -> list[SweepRun]:
        """Those of all rounds."""
        return [run for runs in self.rounds for run in runs]

    @property
    def commands(self) -> list[str]:
        """A command for every point; a line between two rounds says that the second needs the first."""
        options = command_line(replace(self, dry_run=False, point=0))
        lines: list[str] = []
        number = 0
        for runs in self.rounds:
            lines += ["# when all of these have ended:"] if lines else []
            lines += [f"python run_sweep.py {options} --point {number + k + 1}" for k in range(len(runs))]
            number += len(runs)
        return lines


@dataclass(frozen=True)
class SweepRun:
    """One point of a sweep; in a learning curve with the number of simulations of each stage, else 0."""

    sweep: SweepConfig
    lmax: int
    nuisance: str
    seed: int
    n_sims: int = 0
    compressor_n_sims: int = 0

    @property
    def stage_2_alone(self) -> bool:
        """Whether its compressor is that of another point."""
        return self.n_sims != self.compressor_n_sims

    @property
    def compressor_tag(self) -> str:
        """Name of stage 1's folder."""
        subset = f"_n{self.compressor_n_sims}" if self.compressor_n_sims else ""
        nuisance = "" if self.nuisance == NONE else f"_{self.nuisance}"
        return f"{self.sweep.name}_lmax{self.lmax}{nuisance}_seed{self.seed}{subset}"

    @property
    def tag(self) -> str:
        """Name of stage 2's folder, and of the point."""
        return self.compressor_tag + (f"_npe{self.n_sims}" if self.stage_2_alone else "")

    def compressor(self) -> CompressorConfig:
        """Options of stage 1.

        A nuisance in --params is inferred at the points whose tiles vary it. In a learning curve every seed has its own
        split and subsets, so that the scatter over seeds has what other simulations would change.
        """
        subset = {"n_sims": self.compressor_n_sims, "split_seed": self.seed} if self.n_sims else {}
        given = {"lmax": self.lmax, "noise_level": self.sweep.noise_level, "nuisance": self.nuisance}
        given |= {"tag": self.compressor_tag, **subset}
        config = self._parsed(CompressorConfig, "stage_1", given)
        vary = kinds_of(self.nuisance)
        inferred = [name for name in config.theta_names if not NUISANCE.fullmatch(name) or kind_of(name) in vary]
        return replace(config, params=",".join(inferred))

    def npe(self, ckpt: str) -> NPEConfig:
        """Options of stage 2."""
        subset = {"n_sims": self.n_sims if self.stage_2_alone else 0} if self.n_sims else {}
        return self._parsed(NPEConfig, "stage_2", {"ckpt": ckpt, "tag": self.tag, **subset})

    def _parsed(self, config_class: type[Config], quotes: str, given: dict[str, Any]) -> Config:
        text: str = getattr(self.sweep, quotes)
        given |= {"results_dir": self.sweep.results_dir, "seed": self.seed}
        own = {flag_of(name): str(value) for name, value in given.items()}
        try:
            words = shlex.split(text)
        except ValueError as error:
            raise UserError(f"{text!r} cannot be read as options ({error}); check its quotes") from None
        if twice := [word for word in words if word.split("=")[0] in (*own, *map(flag_of, OF_THE_SWEEP))]:
            raise UserError(f"{twice[0]} is the sweep's own option; leave it out of the quotes")
        program = f"run_sweep.py {flag_of(quotes)}"
        return parse_args(config_class, [*chain(*own.items()), *words], program)


@dataclass(frozen=True, kw_only=True)
class PredictConfig(ResultsOptions):
    """Answer single tiles with a finished stage-2 run: posterior, samples, and an out-of-distribution check."""

    run: str = option(MISSING, "folder of a finished stage-2 run", path=True)
    tiles: str = option(MISSING, "shard_*.parquet, or .npy (bins, N, N) or (n, bins, N, N), without a mask", path=True)
    results_dir: str = option("", "folder to write to (default: predictions/ in the run's)")
    n_samples: int = option(10_000, "samples of each posterior, for GetDist (0: none)", at_least=0)
    seed: int = option(42, "seed of the samples", at_least=0)
    device: Device = option("auto", "auto takes cuda, then mps, then cpu")
