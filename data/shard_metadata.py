"""What a shard says about itself: how it was made, for which lmax, where its tiles lie, and the hash of its rows."""

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from common.errors import UserError
from data.config import TileGeometry
from data.sky import ORIENTATIONS, Orientations

METADATA_KEY = "mock_suite"  # of the JSON that says how the mock suite made a shard; published shards have none
INGEST_KEY = "ingest"  # the same for shards made from lightcones or maps
CONTENT_KEY = "content_sha256"  # of the hash of all rows; every shard that we write has it, published ones do not
ORIENTATIONS_KEY = "orientations_zyz_deg"  # in that JSON: data.sky.Orientations, or null for tiles without a common sky
CONFIGURATION = re.compile(r"lmax_(\d+)_")  # how the folder of a published configuration begins


def content_sha256(
    digests: np.ndarray, keys: np.ndarray, params: np.ndarray, noise_level: str, nuisances: dict[str, np.ndarray]
) -> str:
    """Hash of every row, however parquet lays it out: it protects from a shard that changed after it was written."""
    content = hashlib.sha256(digests.tobytes())
    content.update(keys.astype("<i8").tobytes())
    content.update(params.astype("<f8").tobytes())
    content.update(noise_level.encode())
    for name, values in nuisances.items():
        content.update(name.encode() + values.astype("<f8").tobytes())
    return content.hexdigest()


def description_of(path: Path) -> str | None:
    """The JSON text that says how we made a shard; None if we did not write this file."""
    try:
        metadata = pq.read_schema(path).metadata or {}
    except (pa.ArrowException, OSError):
        return None
    text = metadata.get(METADATA_KEY.encode(), metadata.get(INGEST_KEY.encode()))
    return None if text is None else text.decode(errors="replace")


def _description(path: Path) -> dict[str, Any]:
    """How we made a shard; empty if we did not, UserError if it is not JSON."""
    try:
        return dict(json.loads(description_of(path) or "{}"))
    except (ValueError, TypeError):
        raise UserError(f"{path} does not say in JSON how it was made; make it again") from None


def nuisance_priors_of(shard: Path) -> dict[str, Any] | None:
    """The priors that a shard's nuisances were drawn from; None if it does not say."""
    return _description(shard).get("nuisance_priors")


def check_complete(shard: Path, sim_ids: np.ndarray) -> None:
    """Raise UserError if a shard's mock suite has more simulations than those of its folder, sim_ids (n_tiles,)."""
    found, stated = len(np.unique(sim_ids)), _description(shard).get("n_sims", 0)
    if found < stated:
        lacking = f"{shard.parent} has {found} of the {stated} simulations of its suite"
        raise UserError(f"{lacking}; give its run_mock.py again to finish it (--n-sims trains on fewer)")


def nuisance_priors_in(folder: Path) -> dict[str, Any] | None:
    """Those of the first shard of a folder, whose shards all have the same."""
    return nuisance_priors_of(min(folder.glob("shard_*.parquet"), default=folder))


def check_lmax(path: Path, lmax: int) -> None:
    """Raise UserError if a shard states another lmax, or its folder's name does, since published shards state none.

    The shape of a tile does not tell: several lmax have the same number of pixels.
    """
    stated, where = _description(path).get("lmax"), path
    if stated is None:  # the folder's name as it was given, or as it is behind a link
        names = (CONFIGURATION.match(folder.name) for folder in (path.parent.absolute(), path.parent.resolve()))
        if name := next(filter(None, names), None):
            stated, where = int(name[1]), path.parent
    if stated not in (None, lmax):
        raise UserError(f"{where} holds tiles of lmax {stated}, not {lmax}; give their lmax, or other tiles")


def read_orientations(folder: Path, geometry: TileGeometry = "auto") -> Orientations | None:
    """Where the tiles of a folder lie: as the named geometry, or as its first shard says ("auto").

    Empty for tiles without a common sky, None if the shard does not say, UserError if what it says are no angles.
    """
    if geometry != "auto":
        return ORIENTATIONS[geometry]
    first = min(folder.glob("shard_*.parquet"), default=folder)
    description = _description(first)
    if ORIENTATIONS_KEY not in description:
        return None
    try:
        return tuple((float(a), float(b), float(c)) for a, b, c in description[ORIENTATIONS_KEY] or ())  # ZYZ
    except (ValueError, TypeError):
        raise UserError(f"{first} does not say where its tiles lie; make it again") from None
