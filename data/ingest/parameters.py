"""The table of a suite's cosmologies, as the Gower Street site serves it."""

from pathlib import Path

import numpy as np
import pyarrow as pa
from pyarrow import csv

from common.errors import UserError
from data.schema import PARAM_NAMES, s8_of

ROWS_BEFORE_NAMES = 1
SIM_ID_COLUMN = "Serial Number"
COLUMN_OF = {"h": "little_h"}  # the other parameters have their own names; S8 follows from sigma_8 and Omega_m
COLUMNS = {name: COLUMN_OF.get(name, name) for name in PARAM_NAMES if name != "S8"}


def read_parameters(path: Path) -> dict[int, np.ndarray]:
    """Parameters of every simulation: sim_id -> float64 (8,) in the order of PARAM_NAMES.

    Raises:
        UserError: the table is missing, lacks a column, repeats a simulation, or has a cell that is not a number.
    """
    types = {SIM_ID_COLUMN: pa.int64(), **{column: pa.float64() for column in COLUMNS.values()}}
    try:
        table = csv.read_csv(
            path,
            csv.ReadOptions(skip_rows=ROWS_BEFORE_NAMES, use_threads=False),  # one thread: errors then name the row
            convert_options=csv.ConvertOptions(column_types=types, include_columns=list(types), null_values=[]),
        )
    except (OSError, pa.ArrowException) as error:
        reason = " ".join(str(error).split())[:160]
        raise UserError(f"--params {path}: {reason}; give gower_street_runs.csv with both its header lines") from None
    if not len(table):
        raise UserError(f"--params {path} has no simulation in it; give gower_street_runs.csv")
    value = {name: table[column].to_numpy() for name, column in COLUMNS.items()}  # (n_sims,) each
    with np.errstate(invalid="ignore"):
        value["S8"] = s8_of(value["sigma_8"], value["Omega_m"])
    params = np.stack([value[name] for name in PARAM_NAMES], axis=1)  # (n_sims, 8)
    sim_ids = table[SIM_ID_COLUMN].to_pylist()
    if (bad := ~np.isfinite(params).all(axis=1) | (value["Omega_m"] <= 0)).any():
        sim_id = sim_ids[int(bad.argmax())]
        raise UserError(f"--params {path}: simulation {sim_id} has NaN, infinity or Omega_m <= 0; correct the table")
    if twice := [sim_id for number, sim_id in enumerate(sim_ids) if sim_id in sim_ids[:number]]:
        raise UserError(f"--params {path}: simulation {twice[0]} is in the table twice; correct the table")
    return dict(zip(sim_ids, params, strict=True))
