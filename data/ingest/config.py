"""Options of run_ingest.py."""

import dataclasses
from dataclasses import dataclass
from itertools import product
from typing import Literal, get_args

from common.artifacts import NONE
from common.errors import UserError
from common.options import SeedOptions, option
from data.config import NUISANCE_HELP, NoiseLevel, check_priors_are_used, kinds_of, nuisance_list, number_list

SkyGeometry = Literal["disjoint", "published"]
Ordering = Literal["auto", "RING", "NEST"]
PixelWindow = Literal["auto", "divide", "keep"]


@dataclass(frozen=True, kw_only=True)
class IngestConfig(SeedOptions):
    """Make tiles from simulated lightcones (the Gower Street files) or from full-sky convergence maps."""

    lightcones: str = option("", "folder of simulations (sim00042/ or sim00042.tar.gz), or the URL that serves them")
    kappa_maps: str = option("", "instead: pattern like 'maps/*' of FITS files, or of folders with a FITS file per bin")
    params: str = option(dataclasses.MISSING, "table of cosmologies, as gower_street_runs.csv")
    nz: str = option("", "n(z) of every bin: text table (z n_1 n_2 ...), or 2-point FITS file with NZ_SOURCE")
    lmax: str = option("200", "largest multipole of the tiles; several with commas")
    noise_level: str = option("des_y3", "shape noise; several with commas, which scale one realisation")
    geometry: SkyGeometry = option("disjoint", "twelve tiles as disjoint patches, or overlapping as published")
    nuisance: str = option(NONE, f"{NUISANCE_HELP}; several with commas")
    nuisance_priors: str = option("", "table of their priors, one a line (default: DES Y3)")
    sims: str = option("", "only these simulations, like 1-50,109 (default: all)")
    ordering: Ordering = option("auto", "order of the pixels of --kappa-maps; auto takes it from the file")
    pixel_window: PixelWindow = option("auto", "divide: pixels are averages, correct for it; auto: those of lightcones")
    strict: bool = option(False, "stop at the first simulation that cannot be used, instead of leaving it out")
    workers: int = option(0, "worker processes (0: as cores and memory allow); tiles do not depend on it", at_least=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if bool(self.lightcones) == bool(self.kappa_maps):
            raise UserError("give either --lightcones or --kappa-maps")
        if self.lightcones and not self.nz:
            raise UserError("--lightcones needs the source galaxies; give their n(z) as --nz")
        if self.kappa_maps and self.nz:
            raise UserError("--kappa-maps have their own source galaxies; leave out --nz")
        if self.kappa_maps and any({"dz", "ia"} & set(kinds_of(one)) for one in nuisance_list(self.nuisance)):
            raise UserError("--kappa-maps have their own source galaxies; of --nuisance only m works with them")
        check_priors_are_used(self.nuisance_priors, self.nuisance)
        self.sim_list, self.configurations  # noqa: B018  (refuses what is not a list)

    @property
    def divides_window(self) -> bool:
        """Whether to correct for the averaging over pixels."""
        return self.pixel_window == "divide" or (self.pixel_window == "auto" and bool(self.lightcones))

    @property
    def configurations(self) -> list[tuple[int, str, str]]:
        """Every lmax with every noise level and every nuisance."""
        levels, known = [level.strip() for level in self.noise_level.split(",")], get_args(NoiseLevel)
        if unknown := [level for level in levels if level not in known]:
            raise UserError(f"--noise-level {unknown[0]!r} is not in {', '.join(known)}; several go with commas")
        every = product(number_list("--lmax", self.lmax), dict.fromkeys(levels), nuisance_list(self.nuisance))
        return list(every)

    @property
    def sim_list(self) -> list[int]:
        """The numbers in --sims; empty for all simulations."""
        found: set[int] = set()
        for part in self.sims.split(",") if self.sims else ():
            first, _, last = part.partition("-")
            try:
                found |= set(range(int(first), int(last or first) + 1))
            except ValueError:
                raise UserError(f"--sims {self.sims!r} is not a list like 1-50,109") from None
        if self.sims and not found:
            raise UserError(f"--sims {self.sims!r} names no simulation; give a list like 1-50,109")
        return sorted(found)
