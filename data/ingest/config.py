"""Options of run_ingest.py."""

from __future__ import annotations

import dataclasses
import typing
from dataclasses import dataclass
from typing import Literal

from common.errors import UserError
from common.options import SeedOptions, option
from data.config import NoiseLevel, lmax_list

SkyGeometry = Literal["disjoint", "published"]
Ordering = Literal["auto", "RING", "NEST"]
PixelWindow = Literal["auto", "divide", "keep"]


@dataclass(frozen=True, kw_only=True)
class IngestConfig(SeedOptions):
    """Make tiles from simulated lightcones (the Gower Street files) or from full-sky convergence maps."""

    lightcones: str = option(
        "", "folder of simulations (sim00042/ or sim00042.tar.gz, as served), or the URL that serves them"
    )
    kappa_maps: str = option(
        "", "in their place: pattern like 'maps/*' of FITS files with a map per bin, or of folders with a file per bin"
    )
    params: str = option(dataclasses.MISSING, "table of cosmologies, as gower_street_runs.csv")
    nz: str = option("", "n(z) of the bins: text table (z n_1 n_2 ...), or 2-point FITS file with NZ_SOURCE")
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
    workers: int = option(
        0, "worker processes (0: one per core, as far as memory goes); no tile depends on it", at_least=0
    )

    def __post_init__(self) -> None:
        super().__post_init__()
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
