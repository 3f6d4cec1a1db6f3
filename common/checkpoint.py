"""Checkpoints: tensors and plain values, written whole, read without running code."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import torch

from common.artifacts import atomic_path
from common.errors import UserError

FORMAT = 1


def save_checkpoint(path: Path, kind: str, content: dict[str, Any]) -> None:
    """Write a checkpoint atomically.

    Args:
        path: the file.
        kind: what it holds ("compressor", "npe"); checked when it is loaded.
        content: tensors, numbers, strings, and dicts and lists of them.
    """
    whole = io.BytesIO()  # torch's own writer does not say what went wrong with a file
    torch.save({"format": FORMAT, "kind": kind, **content}, whole)
    with atomic_path(path) as temporary:
        temporary.write_bytes(whole.getbuffer())


def load_checkpoint(path: Path, kind: str, keys: tuple[str, ...]) -> dict[str, Any]:
    """Read a checkpoint onto the CPU with weights_only=True: a pickle that would run code is refused.

    Raises:
        UserError: missing, unreadable, of another kind or without one of `keys`.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; give the best.ckpt of a stage-1 run") from None
    except Exception as error:  # torch raises many kinds here; all mean the same to the user
        raise UserError(
            f"{path} is not a checkpoint of this program, or it is damaged ({type(error).__name__}); "
            "give the best.ckpt of a stage-1 run, or run the stage that writes it again"
        ) from None
    if not isinstance(content, dict) or content.get("kind") != kind or content.get("format") != FORMAT:
        raise UserError(f"{path} is not a {kind} checkpoint of format {FORMAT}; give the file that this program wrote")
    if missing := [key for key in keys if key not in content]:
        raise UserError(f"{path} lacks {', '.join(missing)}; run the stage that writes it again")
    return content
