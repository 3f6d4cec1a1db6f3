"""A GPU that is not there: tensors that say they are on cuda:0, computed with on the CPU, and refused where they mix.

torch's own FakeTensorMode computes no values, so nothing that stops, saves or goes on by them can run in it, and it
lets 0-dimensional tensors of the CPU into `stack`. Here every tensor is an ordinary one of the CPU, and a list says
which of them pretend: so the results are those of the CPU to the bit, and an operation on tensors of both kinds is the
error that a GPU would make of it. Copies that a GPU would make its caller wait for are counted.

Only a real GPU shows what its kernels compute, how fast, and how much memory they take: `make gpu`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

CUDA, CPU = torch.device("cuda:0"), torch.device("cpu")
# A 0-dimensional tensor of the CPU may go with tensors of a GPU, but not into these.
STRICT = {"cat", "stack", "index_select", "_fused_adamw_", "_foreach_lerp_"}
INDEXING = {"index", "index_put", "index_put_"}  # take the CPU's indices, and have the caller wait for them


class Storages:
    """A set of storages; a weak reference keeps the place of one that is gone from being taken by another."""

    def __init__(self) -> None:
        self.references: dict[int, StorageWeakRef] = {}

    def add(self, tensor: torch.Tensor) -> None:
        reference = StorageWeakRef(tensor.untyped_storage())
        self.references[reference.cdata] = reference

    def __contains__(self, tensor: torch.Tensor) -> bool:
        return StorageWeakRef(tensor.untyped_storage()).cdata in self.references


class PretendCuda:
    """Which tensors pretend, and what their GPU has made somebody wait for.

    Attributes:
        waits: name of every operation that a GPU's caller would have waited for.
        made_there: whether what a function makes out of nothing is for its arguments on cuda:0.
    """

    def __init__(self) -> None:
        self.there, self.pinned = Storages(), Storages()
        self.waits: list[str] = []
        self.made_there = False

    def move(self, tensor: torch.Tensor, device: torch.device, non_blocking: bool) -> torch.Tensor:
        if (device.type == "cuda") == (tensor in self.there):
            return tensor
        if device.type != "cuda" or not (non_blocking and tensor in self.pinned):
            self.waits.append(f"copy to {device}")
        with _disable_current_modes():
            copy = tensor.detach().clone().requires_grad_(tensor.requires_grad)
        if device.type == "cuda":
            self.there.add(copy)
        return copy

    def pin(self, tensor: torch.Tensor) -> torch.Tensor:
        assert tensor not in self.there
        with _disable_current_modes():
            copy = tensor.clone()
        self.pinned.add(copy)
        return copy


class _Functions(TorchFunctionMode):
    """What Python asks of a tensor: where it is, and to go elsewhere."""

    def __init__(self, cuda: PretendCuda) -> None:
        super().__init__()
        self.cuda = cuda

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs, cuda = kwargs or {}, self.cuda
        name = getattr(func, "__name__", "")
        if func == torch.Tensor.device.__get__ and args[0] in cuda.there:  # type: ignore[attr-defined]
            return CUDA
        if name in ("numpy", "__array__") and args[0] in cuda.there:
            raise TypeError("can't convert cuda:0 device type tensor to numpy")
        if name == "tolist" and args[0] in cuda.there:
            cuda.waits.append("tolist")
        if func is torch.Tensor.cpu:
            return cuda.move(args[0], CPU, False)
        if func is torch.Tensor.to:
            named = [a for a in (*args[1:], kwargs.get("device")) if isinstance(a, (str, torch.device))]
            if named:
                moved = cuda.move(
                    args[0], torch.device(named[0]), bool(kwargs.get("non_blocking", args[3:4] == (True,)))
                )
                dtypes = [a for a in (*args[1:], kwargs.get("dtype")) if isinstance(a, torch.dtype)]
                return moved.to(dtypes[0]) if dtypes else moved
        before, cuda.made_there = (
            cuda.made_there,
            any(leaf in cuda.there for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)),
        )
        try:
            return func(*args, **kwargs)
        finally:
            cuda.made_there = before


class _Operations(TorchDispatchMode):
    """What is computed, backward passes and optimisers too."""

    def __init__(self, cuda: PretendCuda) -> None:
        super().__init__()
        self.cuda = cuda

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs, cuda, name = dict(kwargs or {}), self.cuda, func.overloadpacket.__name__
        made_there = kwargs.get("device") is not None and torch.device(kwargs["device"]).type == "cuda"
        if made_there:
            kwargs["device"] = CPU
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        made_there |= not tensors and cuda.made_there
        there = [tensor for tensor in tensors if tensor in cuda.there]
        here = [t for t in tensors if t not in cuda.there and (t.dim() > 0 or name in STRICT)]
        if (name == "copy_" and there and here) or (name in INDEXING and there and args[0] in cuda.there and here):
            cuda.waits.append(name)
        elif there and here:
            raise RuntimeError(f"{name}: expected all tensors to be on the same device, found cuda:0 and cpu")
        if name in ("_local_scalar_dense", "nonzero", "masked_select") and there:
            cuda.waits.append(name)
        result = func(*args, **kwargs)
        if made_there or (there and name != "copy_"):
            for leaf in tree_leaves(result):
                if isinstance(leaf, torch.Tensor):
                    cuda.there.add(leaf)
        return result


@contextmanager
def pretend_cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[PretendCuda]:
    """Within, cuda:0 can be computed on."""
    cuda = PretendCuda()
    with monkeypatch.context() as patch, _Functions(cuda), _Operations(cuda):
        patch.setattr(
            torch.Tensor, "pin_memory", lambda tensor: cuda.pin(tensor)
        )  # in the thread that reads ahead as well
        patch.setattr(torch.Tensor, "is_pinned", lambda tensor: tensor in cuda.pinned)
        patch.setattr(torch.cuda, "_lazy_init", lambda: None)
        patch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: False)
        patch.setattr(torch.cuda, "mem_get_info", lambda _: (1 << 36, 1 << 36))
        patch.setattr(torch.cuda, "get_device_name", lambda _: "a GPU that is not there")
        patch.setattr(torch.cuda, "get_rng_state", lambda _=None: torch.zeros(16, dtype=torch.uint8))
        patch.setattr(torch.cuda, "set_rng_state", lambda *_: None)
        for module in ("compress.stage", "npe.stage", "npe.predict"):
            patch.setattr(f"{module}.pick_device", lambda name: CUDA)
        yield cuda
