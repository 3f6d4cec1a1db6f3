"""The table of a suite's cosmologies, as the Gower Street site serves it."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np

from common.errors import UserError
from data.schema import PARAM_NAMES, s8_of

HEADER_ROWS = 2  # the second has the names of the columns
SIM_ID_COLUMN = "Serial Number"
COLUMN_OF = {"h": "little_h"}  # the other parameters have their own names; S8 follows from sigma_8 and Omega_m
COLUMNS = {name: COLUMN_OF.get(name, name) for name in PARAM_NAMES if name != "S8"}


def read_parameters(path: Path) -> dict[int, np.ndarray]:
    """Parameters of every simulation: sim_id -> float64 (8,) in the order of PARAM_NAMES.

    Raises:
        UserError: the table is missing, lacks a column, repeats a simulation, or has a cell that is not a number; names
            the line and the cure.
    """
    try:
        rows = list(csv.reader(path.read_text(encoding="utf-8-sig").splitlines()))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"--params {path} cannot be read ({error}); give gower_street_runs.csv") from None
    names = [name.strip() for name in rows[HEADER_ROWS - 1]] if len(rows) >= HEADER_ROWS else []
    if missing := [name for name in (SIM_ID_COLUMN, *COLUMNS.values()) if name not in names]:
        raise UserError(
            f"--params {path} has no column {', '.join(missing)} in its second line; give gower_street_runs.csv as the "
            "simulations' site serves it, with both header lines"
        )
    parameters: dict[int, np.ndarray] = {}
    for number, row in enumerate(rows[HEADER_ROWS:], start=HEADER_ROWS + 1):
        if not any(cell.strip() for cell in row):
            continue
        where, cells = f"--params {path}, line {number}", dict(zip(names, row, strict=False))
        try:
            sim_id = int(cells[SIM_ID_COLUMN])
            value = {name: float(cells[column]) for name, column in COLUMNS.items()}
        except (KeyError, ValueError):
            raise UserError(f"{where}: a cell is empty or not a number; correct the table") from None
        value["S8"] = float(s8_of(np.array(value["sigma_8"]), np.array(value["Omega_m"])))
        parameters_of_sim = np.array([value[name] for name in PARAM_NAMES])
        if not np.isfinite(parameters_of_sim).all() or value["Omega_m"] <= 0:
            raise UserError(f"{where}: a cell is infinite, NaN, or Omega_m <= 0; correct the table")
        if sim_id in parameters:
            raise UserError(f"{where}: simulation {sim_id} is in the table twice; correct the table")
        parameters[sim_id] = parameters_of_sim
    if not parameters:
        raise UserError(f"--params {path} has no simulation in it; give gower_street_runs.csv")
    return parameters
