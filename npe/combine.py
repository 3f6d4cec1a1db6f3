"""Combine stage-2 runs that differ in their seeds: `python -m npe.combine results/field_npe_runs/seed_*`.

The scatter over seeds is what repeating the training does to the Figure of Merit; stage 2's own members
only show what the second stage does to it.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np

from common.artifacts import read_sealed
from common.errors import UserError, exit_on_user_error
from npe.ensemble import ensemble_to_json
from npe.model import Posterior
from npe.train import RESULT_NAME

SAME = ("lmax", "noise_level", "manifest_sha256")  # runs that differ in one of these do not measure one thing


def combine_runs(folders: list[Path]) -> dict[str, Any]:
    """Figures of several stage-2 runs of one data set and split.

    Args:
        folders: of the runs, each with its fom_result.json.

    Returns:
        `runs`, `fom_fiducial_mean` and `fom_fiducial_std` over the runs' medians, the latter's error of the mean
        `fom_fiducial_err`, and `ensemble` as in fom_result.json, over the runs instead of the members.

    Raises:
        UserError: fewer than two runs, or runs that do not belong together.
    """
    if len(folders) < 2:
        raise UserError("give the folders of two or more stage-2 runs, e.g. results/field_npe_runs/seed_*")
    results = [read_sealed(folder / RESULT_NAME, "stage 2") for folder in folders]
    for folder, result in zip(folders, results, strict=True):
        for key in SAME:
            if result[key] != results[0][key]:
                raise UserError(
                    f"{folder} and {folders[0]} differ in {key} ({result[key]} and {results[0][key]}); "
                    "combine runs of one data set, one split and other seeds"
                )
    if len({(r["compressor_checkpoint"], r["config"]["seed"]) for r in results}) < len(results):
        raise UserError("the same compressor with the same --seed was given twice; leave one out")
    posteriors = [
        Posterior(*(np.array(v) for v in (r["fiducial"]["mu"], r["fiducial"]["cov"], r["fom_fiducial_all"])))
        for r in results
    ]
    ensemble = ensemble_to_json(posteriors)
    medians = ensemble["fom_fiducial_medians"]
    return {
        "runs": [str(folder) for folder in folders],
        "fom_fiducial_mean": float(np.mean(medians)),
        "fom_fiducial_std": ensemble["fom_fiducial_medians_std"],
        "fom_fiducial_err": ensemble["fom_fiducial_medians_std"] / np.sqrt(len(medians)),
        "ensemble": ensemble,
    }


@exit_on_user_error
def main() -> None:
    """Parse, combine, print."""
    parser = argparse.ArgumentParser(prog="python -m npe.combine", description="Combine stage-2 runs of other seeds.")
    parser.add_argument("runs", nargs="+", type=Path, help="folders with a fom_result.json")
    result = combine_runs(parser.parse_args().runs)
    ensemble = result["ensemble"]
    for run, median in zip(result["runs"], ensemble["fom_fiducial_medians"], strict=True):
        print(f"{median:8.0f}  {run}")
    print(
        f"{result['fom_fiducial_mean']:8.0f}  mean of {len(result['runs'])} runs, +- {result['fom_fiducial_err']:.0f}; "
        f"scatter from run to run {result['fom_fiducial_std']:.0f}\n"
        f"{ensemble['mixture']['fom_fiducial_median']:8.0f}  mixture of their posteriors, tile by tile; "
        f"worst divergence {ensemble['worst_divergence_nats']:.3f} nats"
    )


if __name__ == "__main__":
    main()
