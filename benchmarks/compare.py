"""Options of stage 1 side by side, over seeds, on simulations that no run has seen.

python benchmarks/compare.py "--recipe laptop" "--recipe laptop --loss nll"
python benchmarks/compare.py --lmax 200 --seeds 1 "--backbone power" "--backbone tiny"

Every argument is one set of options of run_compressor.py. Both stages run with each of them on the lognormal suite, and
the posterior is evaluated on fresh simulations from the same prior. Prints, as a mean over seeds with its error, the
negative log-likelihood of (Omega_m, S8) there, its difference to the first set with the same seed, chi2/dof there, the
run's Figure of Merit with every covariance chi2/dof times as large, its ratio to that of the first set, and the time of
both stages. A finished run is not repeated. If a set has --noiseless-tiles, the suite is also made without noise, in
build/compare/791/tiles/lmax_100_noiseless with the defaults.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np

from benchmarks.leakage import run
from common.artifacts import COMPRESSOR_RUNS, NPE_RUNS, tiles_folder, write_json
from common.results import read_result
from common.versions import versions
from compress.model import CHECKPOINT_NAME
from compress.result import RESULT_NAME, CompressorResult
from data.schema import NOISELESS
from npe.result import RESULT_NAME as NPE_RESULT_NAME
from npe.result import read_fom_result

NOISE_LEVEL = "des_y3"
HEADER = "options of stage 1 | fresh NLL | - first | chi2/dof | FoM, recalibrated | / first | minutes"


def name_of(words: str) -> str:
    """The words as one plain name."""
    return re.sub(r"[^\w.+]+", "_", words).strip("_")


def figures_of(results: Path, tag: str, lmax: int, options: str, stage_2: str, seed: int) -> list[float]:
    """NLL, chi2/dof and FoM by the fresh simulations, and minutes of a pair of runs, which are made if need be."""
    compressor_run, npe_run = results / COMPRESSOR_RUNS / tag, results / NPE_RUNS / tag
    fresh = tiles_folder("", results, lmax, NOISE_LEVEL, fresh=True)
    if not (compressor_run / RESULT_NAME).exists():
        run(
            f"run_compressor.py --lmax {lmax} --noise-level {NOISE_LEVEL} {options} --seed {seed} "
            f"--results-dir {results} --tag {tag}"
        )
    if not (npe_run / NPE_RESULT_NAME).exists():
        run(
            f"run_npe.py --ckpt {compressor_run / CHECKPOINT_NAME} --calibration-tiles {fresh} --seed {seed} {stage_2} "
            f"--tag {tag}"
        )
    stage_1 = read_result(compressor_run / RESULT_NAME, CompressorResult, "stage 1")
    result = read_fom_result(npe_run)
    assert result.recalibrated is not None  # there are fresh simulations
    figures = [result.calibration.nll, result.calibration.chi2_per_dof, result.recalibrated.fom_fiducial_median]
    return [*figures, (stage_1.elapsed_s + result.elapsed_s) / 60]


def table(found: dict[str, np.ndarray]) -> str:
    """A row per set of options, from its figures (n_seeds, 4)."""
    rows = [f"| {HEADER} |", "|" + "---|" * (HEADER.count("|") + 1)]
    first = next(iter(found.values()))
    for options, figures in found.items():
        nll, chi2, fom, minutes = figures.T
        cells = [mean_with_error(nll, 3), mean_with_error(nll - first[: len(nll), 0], 3), mean_with_error(chi2, 2)]
        cells += [mean_with_error(fom, 0), mean_with_error(fom / first[: len(fom), 2], 3), f"{minutes.mean():.0f}"]
        rows.append(f"| `{options}` | {' | '.join(cells)} |")
    return "\n".join(rows)


def mean_with_error(values: np.ndarray, digits: int) -> str:
    """The mean of values (n_seeds,), and its error if there are several."""
    error = f" ± {values.std(ddof=1) / np.sqrt(len(values)):.{digits}f}" if len(values) > 1 else ""
    return f"{values.mean():.{digits}f}{error}"


def main() -> None:
    """Run what is missing, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage_1", nargs="+", metavar="OPTIONS")
    parser.add_argument("--stage-2", default="", metavar="OPTIONS", help="of run_npe.py, for all")
    parser.add_argument("--lmax", type=int, default=100)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--seed", type=int, default=42, help="the first")
    parser.add_argument("--n-sims", type=int, default=791)
    parser.add_argument("--n-fresh", type=int, default=300, help="fresh simulations")
    parser.add_argument("--results-dir", type=Path, default=Path("build/compare"))
    options = parser.parse_args()
    results = options.results_dir / str(options.n_sims)
    suite = f"run_mock.py --lmax {options.lmax} --results-dir {results} --n-sims"
    run(f"{suite} {options.n_sims} --noise-level {NOISE_LEVEL}")
    run(f"{suite} {options.n_fresh} --noise-level {NOISE_LEVEL} --fresh")
    if "--noiseless-tiles" in " ".join(options.stage_1):
        run(f"{suite} {options.n_sims} --noise-level {NOISELESS}")
    found: dict[str, np.ndarray] = {}
    for seed in range(options.seed, options.seed + options.seeds):
        for stage_1 in options.stage_1:
            stage_2 = f"npe {options.stage_2}" if options.stage_2 else ""  # both stages have options of one name
            tag = name_of(f"lmax{options.lmax} {stage_1} {stage_2} {seed}")
            figures = figures_of(results, tag, options.lmax, stage_1, options.stage_2, seed)
            found[stage_1] = np.array([*found.get(stage_1, []), figures])
        print(f"\nup to seed {seed}\n{table(found)}\n", flush=True)
    record = {name: figures.tolist() for name, figures in found.items()}
    about = vars(options) | {"results_dir": str(results), "runs": record, "versions": versions()}
    write_json(options.results_dir / "compare.json", about)


if __name__ == "__main__":
    main()
