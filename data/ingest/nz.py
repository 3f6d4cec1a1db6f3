"""Source redshift distributions n(z) from a file."""

import re
from pathlib import Path

import numpy as np
from scipy.interpolate import make_interp_spline

from common.errors import UserError

FITS_EXTENSION = "NZ_SOURCE"  # of a 2-point FITS file, such as that of the DES Y3 data release
FITS_Z = "Z_MID"
FITS_MAGIC = b"SIMPLE  ="
N_GRID = 1001  # redshifts at which n(z) is tabulated
COLUMNS = "columns: z, n_1, n_2, ... (one for each bin)"


def read_nz(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Redshifts (n_z,) and normalised n(z) per unit redshift (n_bins, n_z), linear between the points of the file.

    The file is a text table with columns z, n_1, n_2, ... (spaces or commas, # before a comment), or a 2-point FITS
    file with an NZ_SOURCE table (columns Z_MID, BIN1, BIN2, ...). The number of bins is that of its columns.

    Raises:
        UserError: the file is neither, or not a distribution: names file and cure.
    """
    try:
        with open(path, "rb") as file:
            is_fits = file.read(len(FITS_MAGIC)) == FITS_MAGIC
        table = _fits_table(path) if is_fits else _text_table(path)  # (n, 1 + n_bins)
    except OSError as error:
        raise UserError(f"--nz {path} cannot be read ({error}); give the n(z) of every bin") from None
    z, n = table[:, 0], table[:, 1:].T  # (n,), (n_bins, n)
    if not np.isfinite(table).all() or (z < 0).any() or (np.diff(z) <= 0).any():
        raise UserError(f"--nz {path}: redshifts must increase, from 0 or more, and all be finite; correct the file")
    if (n < 0).any() or not (n.max(axis=1) > 0).all():
        raise UserError(f"--nz {path}: an n(z) is negative, or zero everywhere; correct the file")
    grid = np.linspace(z[0], z[-1], N_GRID)
    on_grid = make_interp_spline(z, n, k=1, axis=1)(grid)  # (n_bins, N_GRID)
    return grid, on_grid / np.trapezoid(on_grid, grid, axis=1)[:, None]


def _text_table(path: Path) -> np.ndarray:
    try:
        text = path.read_text(encoding="utf-8").replace(",", " ")
        table = np.loadtxt(text.splitlines(), ndmin=2)
    except (UnicodeDecodeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"--nz {path} is not a table of numbers ({reason}); {COLUMNS}") from None
    if table.shape[1] < 2 or len(table) < 2:
        raise UserError(f"--nz {path} has {table.shape[1]} columns and {len(table)} rows; {COLUMNS}")
    return table


def _fits_table(path: Path) -> np.ndarray:
    from astropy.io import fits

    try:
        with fits.open(path) as file:
            data = file[FITS_EXTENSION].data
            n_bins = sum(re.fullmatch(r"BIN\d+", name.upper()) is not None for name in data.names)
            names = [FITS_Z, *(f"BIN{i}" for i in range(1, max(n_bins, 1) + 1))]
            return np.stack([np.asarray(data[name], dtype=np.float64) for name in names], axis=1)  # (n, 1 + n_bins)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        wanted = f"no table {FITS_EXTENSION} with columns {FITS_Z}, BIN1, BIN2, ..."
        raise UserError(f"--nz {path}: {wanted} ({error}); or give a text table with {COLUMNS}") from None
