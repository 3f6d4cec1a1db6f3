"""The table of a suite's cosmologies, as the Gower Street site serves it."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np

from common.errors import UserError
from data.schema import PARAM_NAMES, s8_of

SIM_ID_COLUMN = "Serial Number"
# Columns of the table, which has two header rows, the second with these names. S8 follows from two of them.
COLUMNS = {
    "Omega_m": "Omega_m", "sigma_8": "sigma_8", "w": "w", "h": "little_h", "n_s": "n_s", "Omega_b": "Omega_b",
    "m_nu": "m_nu",
}  # fmt: skip
HEADER_ROWS = 2


def read_parameters(path: Path) -> dict[int, np.ndarray]:
    """Cosmology of every simulation: sim_id -> float64 (8,) in the order of PARAM_NAMES.

    Raises:
        UserError: the table is missing, lacks a column, repeats a simulation, or holds what is no number; names the
            line and the cure.
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
        cells = dict(zip(names, row, strict=False))
        try:
            sim_id = int(cells[SIM_ID_COLUMN])
            value = {name: float(cells[column]) for name, column in COLUMNS.items()}
        except (KeyError, ValueError):
            raise UserError(f"--params {path}, line {number}: a cell is empty or no number; mend the table") from None
        value["S8"] = float(s8_of(np.array(value["sigma_8"]), np.array(value["Omega_m"])))
        of_sim = np.array([value[name] for name in PARAM_NAMES])
        if not np.isfinite(of_sim).all() or value["Omega_m"] <= 0:
            raise UserError(f"--params {path}, line {number}: a cell is not a sensible number; mend the table")
        if sim_id in parameters:
            raise UserError(f"--params {path}, line {number}: simulation {sim_id} stands there twice; mend the table")
        parameters[sim_id] = of_sim
    if not parameters:
        raise UserError(f"--params {path} has no simulation in it; give gower_street_runs.csv")
    return parameters
