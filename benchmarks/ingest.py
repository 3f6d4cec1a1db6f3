"""One lightcone at the real size through run_ingest.py: `python benchmarks/ingest.py` (4 GB of disk, some minutes).

Five and ten shells of Poisson counts at nside 2048. The difference is the time of a shell, which gives that of 100
shells. From a folder and from a tar.gz, to five lmax and three noise levels at once: time and peak memory of the
command.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tarfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import numpy as np
from fake_lightcones import FIDUCIAL_SIM_ID, PARTICLES_PER_VOLUME, write_nz, write_parameters, z_values_text
from scipy.interpolate import CubicSpline

from benchmarks.measure import header
from common.artifacts import write_json
from common.device import pick_device
from data.ingest.born import Shells, comoving_distance
from data.mock.cosmology import FIDUCIAL_COSMO, params_of

NSIDE, N_SHELLS, N_REAL_SHELLS, Z_END = 2048, (5, 10), 100, 3.2
OPTIONS = ["--lmax", "200,400,600,800,1000", "--noise-level", "noiseless,des_y3,lsst_y10", "--workers", "1"]


def write_simulation(folder: Path, n_shells: int) -> None:
    """Shells of equal thickness, each with as many particles as one of 100 shells would have."""
    folder.mkdir(parents=True)
    z = np.linspace(0, Z_END, 1001)
    chi_of_z = comoving_distance(z, params_of(FIDUCIAL_COSMO[None])[0])
    chi = np.linspace(0, chi_of_z[-1], n_shells + 1)
    edges = CubicSpline(chi_of_z, z)(chi)
    shells = Shells(np.arange(n_shells, 0, -1), edges[:-1], edges[1:], chi[:-1], chi[1:])
    (folder / "z_values.txt").write_text(z_values_text(shells))
    rng = np.random.default_rng(0)
    for step, volume in zip(shells.step, shells.volume, strict=True):
        mean = PARTICLES_PER_VOLUME * volume / (12 * NSIDE**2) * n_shells / N_REAL_SHELLS
        np.save(folder / f"run.{step:05d}.lightcone.npy", rng.poisson(mean, 12 * NSIDE**2).astype(np.uint32))


def measured(home: Path, source: Path) -> tuple[float, float]:
    """Seconds that the command takes, and its peak memory in GB."""
    given = {
        "lightcones": source,
        "params": home / "params.csv",
        "nz": home / "nz.txt",
        "results-dir": home / "results",
    }
    command = [sys.executable, "-c", _RUN, str(ROOT), "run_ingest.py", *OPTIONS, "--restart"]
    command += [word for name, value in given.items() for word in (f"--{name}", str(value))]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    start = time.perf_counter()
    done = subprocess.run(command, cwd=ROOT, env=environment, check=True, stdout=subprocess.PIPE, text=True)
    return time.perf_counter() - start, float(done.stdout.split()[-1]) / 1e6


_RUN = """
import resource, runpy, sys
root, script = sys.argv[1:3]
sys.path.insert(0, root)
sys.argv = sys.argv[2:]
runpy.run_path(script, run_name="__main__")
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def main() -> None:
    """Make, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results-dir", type=Path, default=Path("build/bench"))
    options = parser.parse_args()
    home = options.results_dir / "lightcone"
    home.mkdir(parents=True, exist_ok=True)
    write_parameters(home / "params.csv", np.array([FIDUCIAL_SIM_ID]), FIDUCIAL_COSMO[None])
    write_nz(home / "nz.txt")
    found: dict[str, dict[str, float]] = {}
    for kind in ("folder", "tar.gz"):
        seconds, memory = {}, 0.0
        for n in N_SHELLS:
            sims = home / f"{n}" / kind
            simulation = sims / f"sim{FIDUCIAL_SIM_ID:05d}"
            if not sims.exists():
                write_simulation(simulation, n)
                if kind == "tar.gz":
                    with tarfile.open(f"{simulation}.tar.gz", "w:gz", compresslevel=1) as archive:
                        archive.add(simulation, simulation.name)
                    for path in simulation.iterdir():
                        path.unlink()
                    simulation.rmdir()
            seconds[n], memory = measured(home, sims)
        few, many = N_SHELLS
        per_shell = (seconds[many] - seconds[few]) / (many - few)
        of_100 = seconds[many] + per_shell * (N_REAL_SHELLS - many)
        found[kind] = {"s_with_10": seconds[many], "s_per_shell": per_shell, "s_with_100": of_100, "peak_gb": memory}
        print(
            f"{kind}: {seconds[many]:.0f} s with {many} shells, {per_shell:.2f} s per shell, so {of_100:.0f} s with "
            f"{N_REAL_SHELLS}; peak memory {memory:.2f} GB",
            flush=True,
        )
    write_json(options.results_dir / "ingest.json", header(pick_device("cpu")) | {"found": found})


if __name__ == "__main__":
    main()
