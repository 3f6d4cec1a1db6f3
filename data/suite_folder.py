"""The folder of a suite of tiles: what its shards say, which are finished, what --restart deletes, and its picture."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from common.artifacts import CannotWriteError
from common.errors import UserError
from common.options import difference
from data.cache import FOLDER as CACHE
from data.pictures import draw_suite
from data.schema import FOM_PARAMS, columns_of
from data.shard_metadata import ORIENTATIONS_KEY, description_of
from data.sky import ORIENTATIONS

RESTARTING = "restarting"  # a file in the folder, from the moment --restart has emptied it until the suite is finished


def describe(geometry: str, options: dict[str, Any]) -> str:
    """The JSON text in every shard of a suite: the options that determine its tiles, and where they lie on the sky."""
    orientations = ORIENTATIONS.get(geometry)  # a flat tile has none
    return json.dumps({"geometry": geometry, **options, ORIENTATIONS_KEY: orientations}, sort_keys=True)


def finished_shards(folder: Path, description: str, restart: bool) -> set[Path]:
    """The shards of this suite, as `describe` describes it, in its folder; with `restart`, they are deleted first.

    The folder is created. A command with --restart that is killed resumes when it is given again, instead of deleting
    its own shards.

    Raises:
        UserError: the folder has shards that this project did not write, or shards of a suite with other options.
    """
    found = {path: description_of(path) for path in sorted(folder.glob("shard_*.parquet"))}
    for path, other in found.items():
        if other is None:
            raise UserError(f"{path} was not made by this command; give another folder for these tiles")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if restart and not (folder / RESTARTING).exists():
            for path in (*found, *(folder / CACHE).glob("*")):
                path.unlink()
            (folder / RESTARTING).touch()
            return set()
    except OSError as error:
        raise CannotWriteError(folder, error) from None
    for path, other in found.items():
        if other != description:
            differs = difference(json.loads(other or ""), json.loads(description))
            raise UserError(f"{path} has other options ({differs}); add --restart to replace it, or use another folder")
    return set(found)


def finish_suite(folder: Path, params: np.ndarray, fiducial: np.ndarray | None) -> None:
    """Draw suite.png from the first tile, the params (n_sims, 8) and the fiducial (8,) if there is one.

    From now on --restart deletes the suite.
    """
    theta = columns_of(params, FOM_PARAMS)  # (n_sims, 2)
    star = None if fiducial is None else columns_of(fiducial, FOM_PARAMS)  # (2,)
    draw_suite(min(folder.glob("shard_*.parquet")), theta, star, folder / "suite.png")
    (folder / RESTARTING).unlink(missing_ok=True)
