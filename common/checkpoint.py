"""Checkpoints: tensors and plain values, written whole, read without running code."""

import io
import zipfile
from pathlib import Path
from typing import Any

import torch

from common.artifacts import atomic_path
from common.errors import UserError

FORMAT = 3


def save_checkpoint(path: Path, kind: str, content: dict[str, Any]) -> None:
    """Write a checkpoint atomically.

    Args:
        path: the file.
        kind: what it holds ("compressor", "npe"); checked when it is loaded.
        content: tensors, numbers, strings, None, and dicts, lists and tuples of them.
    """
    whole = io.BytesIO()  # torch's own writer does not say what went wrong with a file
    torch.save({"format": FORMAT, "kind": kind, **content}, whole)
    with atomic_path(path) as temporary:
        temporary.write_bytes(whole.getvalue())  # a view of it in a traceback crashes Python 3.12.1 as it ends


def load_checkpoint(path: Path, kind: str, keys: tuple[str, ...], cure: str) -> dict[str, Any]:
    """Read a checkpoint onto the CPU with weights_only=True: a pickle that would run code is refused.

    Args:
        path: the file.
        kind: what it must hold.
        keys: of the content, that must be there.
        cure: what the user can do if the file is no good.

    Raises:
        UserError: missing, unreadable, damaged, of another kind or without one of `keys`.
    """
    try:
        # A checkpoint is a zip file. Its checksums protect from damage on a disk or in a copy; torch ignores them.
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (FileNotFoundError, IsADirectoryError):
        raise UserError(f"{path} does not exist, or is a folder; {cure}") from None
    except Exception as error:  # torch raises many kinds here; all mean the same to the user
        damaged, content = type(error).__name__, None
    if damaged or not isinstance(content, dict):
        raise UserError(f"{path} is not a checkpoint of this program, or it is damaged ({damaged}); {cure}")
    if content.get("kind") != kind or content.get("format") != FORMAT:
        raise UserError(f"{path} is not a {kind} checkpoint of format {FORMAT}; {cure}")
    if missing := [key for key in keys if key not in content]:
        raise UserError(f"{path} lacks {', '.join(missing)}; {cure}")
    return content
