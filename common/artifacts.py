"""Where every file of a run lies, and how it is written: whole, or not at all."""

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from common.errors import UserError

COMPRESSOR_RUNS = "field_compressor_runs"
NPE_RUNS = "field_npe_runs"
SWEEPS = "sweeps"
FRESH_TILES = "fresh_tiles"
NONE = "none"  # of --nuisance


def tiles_folder(
    tiles_dir: str, results_dir: str | Path, lmax: int, noise_level: str, nuisance: str = NONE, *, fresh: bool = False
) -> Path:
    """Folder of the shards: --tiles-dir if it was given, else the one for this lmax, noise level and nuisance."""
    kind = FRESH_TILES if fresh else "tiles"
    text = tiles_dir or f"{results_dir}/{kind}/lmax_{{lmax}}_{{noise_level}}{{nuisance}}"
    return named_folder(text, lmax, noise_level, nuisance)


def named_folder(text: str, lmax: int, noise_level: str, nuisance: str = NONE) -> Path:
    """A folder of tiles as an option names it; {lmax}, {noise_level} and {nuisance} stand for those of the run.

    {nuisance} begins with an underscore, and is nothing if none varies.
    """
    last = "" if nuisance == NONE else f"_{nuisance}"
    return Path(text.replace("{lmax}", str(lmax)).replace("{noise_level}", noise_level).replace("{nuisance}", last))


class CannotWriteError(UserError):
    """A file or folder that the system will not let us write."""

    def __init__(self, path: Path, error: OSError) -> None:
        cure = "make room" if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) else "give write permission"
        cure = "give a shorter name" if error.errno == errno.ENAMETOOLONG else cure
        self.reason = error.strerror or str(error)
        super().__init__(f"cannot write {path} ({self.reason}); {cure} there, or choose another --results-dir")

    def __reduce__(self) -> tuple[type[UserError], tuple[Any, ...]]:
        """How it comes back from a worker process or a container."""
        return UserError, self.args


def make_empty_folder(folder: Path) -> None:
    """Make a folder, or empty it, once all input has proved good; UserError if it cannot be written."""
    try:
        if folder.exists():
            shutil.rmtree(folder)
        folder.mkdir(parents=True)
    except OSError as error:
        raise CannotWriteError(folder, error) from None


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` to write to; on success it is synced and takes the name `path`.

    If the disk is full, read-only or gone, it raises UserError, and the file of before is still there.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
        if os.name == "posix":  # the new name reaches the disk with the folder
            folder = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
    except OSError as error:
        raise CannotWriteError(path, error) from None
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, content: Any) -> None:
    """Write JSON, atomically; NaN and infinity are errors, not JSON."""
    text = json.dumps(content, indent=2, allow_nan=False)
    with atomic_path(path) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")


def read_json(path: Path, written_by: str = "stage 1") -> Any:
    """Read JSON that `written_by` writes; UserError if the file is missing or is not JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} is missing; {written_by} writes it, keep the files of a run together") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read as JSON ({error}); run {written_by} again, with --restart") from None


def sealed(content: dict[str, Any]) -> dict[str, Any]:
    """JSON content with `sha256`, the hash of all the rest."""
    return {**content, "sha256": sha256_of_json(content)}


def read_sealed(path: Path, written_by: str) -> dict[str, Any]:
    """Read JSON that was sealed; UserError if the file is missing, is not JSON, or was changed."""
    content = read_json(path, written_by)
    if not isinstance(content, dict) or content != sealed({k: v for k, v in content.items() if k != "sha256"}):
        raise UserError(
            f"{path} was changed after it was written (its hash does not fit); run {written_by} again, with --restart"
        )
    return content


def sha256_of_json(content: Any) -> str:
    """SHA-256 of the canonical JSON text (sorted keys, no spaces)."""
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def sha256_of_file(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
