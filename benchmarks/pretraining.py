"""How many simulations does pretraining save? `python benchmarks/pretraining.py` (two hours on two cores).

Stage 1 learns from thousands of cheap mocks, Gaussian skies of other cosmologies, and goes on with few dear ones, the
lognormal suite (--init-from); beside it stands stage 1 from scratch on the same simulations. Every training takes the
same number of steps, however many simulations it has. Stage 2 learns from the dear ones alone. Posteriors are evaluated
on fresh lognormal simulations that no run has seen. Prints a table, draws pretraining.png. A finished run is not
repeated.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np

from benchmarks.compare import NOISE_LEVEL, figures_of, mean_with_error
from benchmarks.leakage import run
from common.artifacts import COMPRESSOR_RUNS, write_json
from common.figures import BLUE, ORANGE, figure
from common.versions import versions
from compress.model import CHECKPOINT_NAME
from compress.result import RESULT_NAME

LMAX, N_CHEAP, N_FRESH = 100, 3000, 300
N_DEAR = (50, 100, 200, 400, 791)
CHEAP_SEED = 1  # of the cheap suite; the dear one has the default
FIRST_SEED = 42  # of the trainings
EPOCHS, DECAY = 20, 5  # of --recipe laptop, for all dear simulations
LOSS = "--recipe laptop --loss nll"
FINE_TUNED = "--learning-rate 2e-3"  # a quarter of the recipe's peak
STAGE_2 = "--hidden-layers 0 --learning-rate 0.05"  # two hidden layers are too many for 150 tiles
STARTS = {"scratch": BLUE, "pretrained": ORANGE}


def pretrain(results: Path) -> Path:
    """The compressor of the cheap mocks: its checkpoint."""
    cheap, tiles = results / "cheap", f"--lmax {LMAX} --noise-level {NOISE_LEVEL}"
    run(f"run_mock.py {tiles} --field gaussian --seed {CHEAP_SEED} --n-sims {N_CHEAP} --results-dir {cheap}")
    folder = cheap / COMPRESSOR_RUNS / "cheap"
    if not (folder / RESULT_NAME).exists():
        run(f"run_compressor.py {tiles} {LOSS} --results-dir {cheap} --tag cheap")
    return folder / CHECKPOINT_NAME


def options_of(start: str, n_sims: int, init_from: Path) -> str:
    """Options of stage 1, which takes the same number of steps for any number of simulations."""
    more = N_DEAR[-1] / n_sims
    epochs = f"--max-epochs {EPOCHS * more:.0f} --patience {EPOCHS * more:.0f} --decay-epochs {DECAY * more:.0f}"
    pretrained = f"{FINE_TUNED} --init-from {init_from}" if start == "pretrained" else ""
    return f"{LOSS} --n-sims {n_sims} {epochs} {pretrained}"


def table(found: dict[str, np.ndarray]) -> str:
    """A row per number of simulations, from the figures (n_numbers, n_seeds, 4) of each start."""
    columns = [f"{name}, {start}" for name in ("NLL", "chi2/dof", "FoM, recalibrated") for start in found]
    rows = [f"| simulations | {' | '.join(columns)} |", "|" + "---|" * (len(columns) + 1)]
    for i, n in enumerate(N_DEAR):
        cells = [mean_with_error(figures[i, :, k], (3, 2, 0)[k]) for k in range(3) for figures in found.values()]
        rows.append(f"| {n} | {' | '.join(cells)} |")
    return "\n".join(rows)


def enough(found: dict[str, np.ndarray]) -> float:
    """How many simulations after pretraining have the NLL of all from scratch, interpolated in ln N; else infinity."""
    nll = np.minimum.accumulate(found["pretrained"][..., 0].mean(axis=1))  # (n_numbers,), must fall with N
    return float(np.exp(np.interp(-found["scratch"][-1, :, 0].mean(), -nll, np.log(N_DEAR), right=np.inf)))


def draw(found: dict[str, np.ndarray], path: Path) -> None:
    """NLL, chi2/dof and FoM against the number of simulations."""
    with figure(path, 11.4, 3.6) as drawn:
        for axes, k, name in zip(
            drawn.subplots(1, 3), range(3), ("NLL, fresh", "chi2/dof, fresh", "FoM, recalibrated"), strict=True
        ):
            for start, figures in found.items():
                mean, n_seeds = figures[..., k].mean(axis=1), figures.shape[1]
                error = figures[..., k].std(axis=1, ddof=min(1, n_seeds - 1)) / np.sqrt(n_seeds)
                axes.errorbar(N_DEAR, mean, error, fmt="o-", color=STARTS[start], label=start)
            axes.set(xscale="log", xlabel="simulations", ylabel=name)
            axes.set_xticks(N_DEAR, labels=list(map(str, N_DEAR)), minor=False)
            axes.minorticks_off()
        axes.legend()


def main() -> None:
    """Run what is missing, print, draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--results-dir", type=Path, default=Path("build/pretraining"))
    options = parser.parse_args()
    results = options.results_dir
    suite = f"run_mock.py --lmax {LMAX} --noise-level {NOISE_LEVEL} --results-dir {results}"
    run(f"{suite} --n-sims {N_DEAR[-1]}")
    run(f"{suite} --n-sims {N_FRESH} --fresh")
    cheap = pretrain(results)
    seeds = range(FIRST_SEED, FIRST_SEED + options.seeds)
    found: dict[str, np.ndarray] = {}
    for start in STARTS:
        runs = [(n, seed, options_of(start, n, cheap)) for n in N_DEAR for seed in seeds]
        figures = [figures_of(results, f"{start}_{n}_{s}", LMAX, stage_1, STAGE_2, s) for n, s, stage_1 in runs]
        found[start] = np.array(figures).reshape(len(N_DEAR), options.seeds, -1)
    draw(found, results / "pretraining.png")
    record = {start: figures.tolist() for start, figures in found.items()}
    write_json(results / "pretraining.json", {"n_sims": N_DEAR, "runs": record, "versions": versions()})
    print("", table(found), "", sep="\n")
    print(f"{enough(found):.0f} simulations after pretraining do what {N_DEAR[-1]} do from scratch")
    print(f"picture   {results}/pretraining.png")


if __name__ == "__main__":
    main()
