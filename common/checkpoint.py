"""Checkpoints: tensors and plain values, written whole, read without running code."""

from __future__ import annotations

import hashlib
import io
from pathlib import Path
from typing import Any

import torch

from common.artifacts import atomic_path
from common.errors import UserError

FORMAT = 2


def save_checkpoint(path: Path, kind: str, content: dict[str, Any]) -> None:
    """Write a checkpoint atomically, with a hash of its content.

    Args:
        path: the file.
        kind: what it holds ("compressor", "npe"); checked when it is loaded.
        content: tensors, numbers, strings, None, and dicts, lists and tuples of them.
    """
    content = {"format": FORMAT, "kind": kind, **content}
    whole = io.BytesIO()  # torch's own writer does not say what went wrong with a file
    torch.save(content | {"sha256": _sha256(content)}, whole)
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
        UserError: missing, unreadable, changed since it was written, of another kind or without one of `keys`.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        intact = isinstance(content, dict) and content.pop("sha256", "") == _sha256(content)
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; {cure}") from None
    except Exception as error:  # torch raises many kinds here; all mean the same to the user
        raise UserError(
            f"{path} is not a checkpoint of this program, or it is damaged ({type(error).__name__}); {cure}"
        ) from None
    if not intact:  # a zip file's own checksums are not looked at by torch
        raise UserError(f"{path} is not what this program wrote (its hash does not fit); {cure}")
    if content.get("kind") != kind or content.get("format") != FORMAT:
        raise UserError(f"{path} is not a {kind} checkpoint of format {FORMAT}; {cure}")
    if missing := [key for key in keys if key not in content]:
        raise UserError(f"{path} lacks {', '.join(missing)}; {cure}")
    return content


def _sha256(content: object) -> str:
    """Hash of nested dicts, lists and tuples of tensors and plain values, wherever the tensors are."""
    digest = hashlib.sha256()

    def add(value: object) -> None:
        if isinstance(value, torch.Tensor):
            digest.update(f"tensor {value.dtype} {tuple(value.shape)};".encode())
            flat = value.detach().cpu().contiguous().reshape(-1)  # (n,); reshaped for tensors without dimensions
            digest.update(flat.view(torch.uint8).numpy().data)
        elif isinstance(value, dict):
            digest.update(f"dict {len(value)};".encode())
            for key, item in value.items():
                add(key)
                add(item)
        elif isinstance(value, (list, tuple)):
            digest.update(f"{type(value).__name__} {len(value)};".encode())
            for item in value:
                add(item)
        else:
            digest.update(f"{type(value).__name__} {value!r};".encode())

    add(content)
    return digest.hexdigest()
