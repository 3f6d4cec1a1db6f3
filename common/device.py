"""Device, precision, and what goes to the device."""

import hashlib
import os
import platform
from collections.abc import Sequence
from contextlib import AbstractContextManager

import torch

from common.errors import UserError
from common.machine import Device, Precision, free_memory, keep_freed_memory

DTYPES: dict[Precision, torch.dtype] = {"float32": torch.float32, "bf16": torch.bfloat16}


def pick_device(name: Device) -> torch.device:
    """The torch device for --device; UserError if it is not there."""
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    kind = next(kind for kind, here in available.items() if here) if name == "auto" else name
    if not available[kind]:
        raise UserError(
            f"--device {name}: PyTorch {torch.__version__} sees none here; use cpu or another PyTorch wheel"
        )
    torch.backends.cudnn.deterministic = True  # same seed, same machine, same result
    torch.backends.cudnn.allow_tf32 = False  # float32 means float32, in convolutions too
    if kind == "cpu":
        keep_freed_memory()
    if kind == "cuda" and torch.distributed.is_torchelastic_launched():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))  # a GPU for each process
        return torch.device(kind, torch.cuda.current_device())
    return torch.device(kind)


def name_of_dtype(dtype: torch.dtype) -> str:
    """As results and checkpoints have it: float32 or bfloat16."""
    return str(dtype).removeprefix("torch.")


def precision_of(name: str) -> Precision:
    """The option that a dtype is chosen by, from name_of_dtype."""
    return next(option for option, dtype in DTYPES.items() if name_of_dtype(dtype) == name)


def check_compiler(device: torch.device) -> None:
    """Raise UserError if torch.compile cannot build for this device, as where there is no C++ compiler."""
    try:
        torch.compile(lambda x: x + 1)(torch.zeros(8, device=device))
    except Exception as error:
        why = " ".join(str(error).split()[:20])
        raise UserError(f"--compile does not work here ({why}); install a C++ compiler, or leave it out") from None


def free_memory_of(device: torch.device) -> int:
    """Bytes that this process may take there: on a CPU, its share among those that torchrun started on this machine."""
    if device.type == "cuda":  # a GPU for each
        return torch.cuda.mem_get_info(device)[0]
    return free_memory() // int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def to_device(tensors: Sequence[torch.Tensor], device: torch.device) -> list[torch.Tensor]:
    """Tensors from the CPU on the device, those with the widest elements first.

    On CUDA they go in one copy from pinned memory, for which nobody waits. A copy from memory that is not pinned waits
    until the GPU has finished all earlier work.
    """
    if device.type != "cuda":
        return [tensor.to(device) for tensor in tensors]
    flat = [tensor.contiguous().view(-1).view(torch.uint8) for tensor in tensors]  # (n_bytes,) each
    packed = torch.cat(flat).pin_memory().to(device, non_blocking=True)
    parts = packed.split([len(part) for part in flat])
    return [part.view(t.dtype).view(t.shape) for part, t in zip(parts, tensors, strict=True)]


def autocast(device: torch.device, dtype: torch.dtype) -> AbstractContextManager[object]:
    """torch.amp.autocast to bf16; with float32 it does nothing."""
    return torch.amp.autocast(device.type, dtype=torch.bfloat16, enabled=dtype is torch.bfloat16)


def seeded_generator(seed: int, purpose: str) -> torch.Generator:
    """An independent CPU generator per purpose: what one draws never shifts what another does."""
    digest = hashlib.sha256(f"{seed}:{purpose}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def describe_device(device: torch.device) -> str:
    """Name of the hardware, for results."""
    on_cpu = f"{device.type} ({platform.machine()}, {torch.get_num_threads()} threads)"
    return torch.cuda.get_device_name(device) if device.type == "cuda" else on_cpu
