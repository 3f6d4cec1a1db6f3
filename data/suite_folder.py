"""The folder of a suite that is being made: which shards are finished, and what --restart does."""

from __future__ import annotations

import json
from pathlib import Path

from common.artifacts import CannotWriteError
from common.errors import UserError
from common.options import difference
from data.cache import FOLDER as CACHE
from data.shard_metadata import description_of

RESTARTING = "restarting"  # the file says that --restart has deleted what was there


def finished_shards(folder: Path, description: str, restart: bool) -> set[Path]:
    """Shards of this very suite that are there already; with --restart a suite that is there is deleted first.

    Once, that is: when that command is killed, it goes on like any other.

    Args:
        folder: of the shards; it is made.
        description: the JSON text that every shard of the suite carries.
        restart: whether --restart was given.

    Raises:
        UserError: the folder has shards that no command of ours wrote, or those of a suite with other options.
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
        if other is not None and other != description:
            raise UserError(
                f"{path} belongs to a suite with other options "
                f"({difference(json.loads(other), json.loads(description))}); "
                "add --restart to replace it, or write to another folder"
            )
    return set(found)


def end_restart(folder: Path) -> None:
    """The suite is finished: another --restart deletes it again."""
    (folder / RESTARTING).unlink(missing_ok=True)
