"""Options of run_mock.py."""

from dataclasses import dataclass
from typing import Literal

from common.artifacts import NONE
from common.errors import UserError
from common.options import SeedOptions, option
from data.config import FIDUCIAL_SIM_ID, NUISANCE_HELP, TileOptions, check_priors_are_used, nuisance_list

Geometry = Literal["disjoint", "published", "flat"]
Field = Literal["lognormal", "gaussian"]
Vary = Literal["all", "Omega_m,S8"]


@dataclass(frozen=True, kw_only=True)
class MockConfig(TileOptions, SeedOptions):
    """Build a mock tomographic lensing suite: shards of tiles with known cosmology."""

    n_sims: int = option(791, "number of simulations, including the fiducial one", above=0)
    geometry: Geometry = option("disjoint", "disjoint patches, overlapping as published, or flat periodic squares")
    field: Field = option("lognormal", "statistics of the convergence field")
    vary: Vary = option("all", "parameters that vary; the others keep their fiducial values")
    fresh: bool = option(False, "new simulations of the same prior, without the fiducial, in {results-dir}/fresh_tiles")
    nuisance: str = option(NONE, f"{NUISANCE_HELP}; several with commas")
    nuisance_priors: str = option("", "table of their priors, one a line (default: DES Y3)", path=True)
    workers: int = option(0, "worker processes (0: one per core); the tiles do not depend on it", at_least=0)
    fiducial_sim_id: int = option(FIDUCIAL_SIM_ID, "sim_id of the simulation with the fiducial cosmology", above=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(nuisance_list(self.nuisance)) > 1 and self.tiles_dir and "{nuisance}" not in self.tiles_dir:
            raise UserError(f"--tiles-dir {self.tiles_dir} is one folder for several suites; put {{nuisance}} in it")
        check_priors_are_used(self.nuisance_priors, self.nuisance)
        if self.geometry == "flat" and self.field != "gaussian":
            raise UserError("--geometry flat has independent Fourier modes, which are Gaussian; add --field gaussian")
        if self.geometry != "flat" and self.nside & (self.nside - 1):
            raise UserError(f"--nside {self.nside} is not a power of two, as HEALPix needs; or add --geometry flat")
