"""The processes that train one network together, as torchrun starts them; one, where it did not start any.

All have the same options and make the same draws. The first, the leader, alone writes, talks and answers signals.
"""

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any
from uuid import uuid4

import torch
from torch import distributed, nn
from torch.distributed.launcher.api import LaunchConfig, elastic_launch
from torch.nn.parallel import DistributedDataParallel

from common.errors import UserError, n_processes
from common.interrupt import Interrupted, check, signal_that_came

PATIENCE = timedelta(hours=6)  # with a leader that reads a suite or evaluates; one that ends is noticed at once
LOST = "another process of this training has ended; the same command goes on from what was saved last"


@dataclass(frozen=True)
class Processes:
    """How many there are, and which this is."""

    rank: int = 0
    size: int = 1

    @property
    def lead(self) -> bool:
        """Whether this is the leader."""
        return self.rank == 0

    def share(self, n: int) -> slice:
        """This process's part of n things in a row; parts differ by one at most."""
        return slice(n * self.rank // self.size, n * (self.rank + 1) // self.size)

    def weight(self, n: int) -> float:
        """What a mean over its share of n things counts in the mean over all processes, so that this is that of n."""
        return len(range(n)[self.share(n)]) * self.size / n

    def mean(self, tensors: Iterable[torch.Tensor]) -> None:
        """Replace tensors by their means over the processes."""
        if self.size > 1:
            for tensor in tensors:
                distributed.all_reduce(tensor)
                tensor /= self.size

    def mean_of(self, tensor: torch.Tensor) -> torch.Tensor:
        """Its mean over the processes, without its gradient."""
        tensor = tensor.detach().clone() if self.size > 1 else tensor
        self.mean([tensor])
        return tensor

    def of_leader(self, thing: Any) -> Any:
        """What the leader has, in all of them: plain values, and tensors on the CPU."""
        if self.size == 1:
            return thing
        box = [thing]
        distributed.broadcast_object_list(box, device=torch.device("cpu"))
        return box[0]

    def learner(self, model: nn.Module, device: torch.device, compiled: bool) -> Callable[[torch.Tensor], torch.Tensor]:
        """The model as it is to be trained: its gradients are means over the processes.

        BatchNorm normalises over all of them on GPUs. On CPUs, where PyTorch has no such layer, each normalises its
        share of a batch.
        """
        learner: nn.Module = model
        if self.size > 1:
            if device.type == "cuda":
                nn.SyncBatchNorm.convert_sync_batchnorm(model)
            learner = parallel = DistributedDataParallel(model)
            parallel.broadcast_buffers = False  # a keyword that newer versions of PyTorch deprecate
        return torch.compile(learner) if compiled else learner

    def draw_apart(self) -> None:
        """Let each of them draw other numbers from torch's own generator, as layers that are dropped do."""
        if self.rank:
            torch.manual_seed(int(torch.randint(2**62, ())) + self.rank)

    def check(self) -> None:
        """Raise Interrupted in all of them if a signal has come to the leader; all must call it."""
        check()
        if self.size > 1:
            came = torch.tensor(signal_that_came())
            distributed.broadcast(came, 0)
            if came:
                raise Interrupted(int(came))


ALONE = Processes()


@contextmanager
def joined(device: torch.device) -> Iterator[Processes]:
    """Within, the processes that torchrun started can talk to each other.

    Raises:
        UserError: one of them has ended.
    """
    if n_processes() == 1:
        yield ALONE
        return
    distributed.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout=PATIENCE)
    rank = distributed.get_rank()
    try:
        yield Processes(rank, distributed.get_world_size())
    except distributed.DistError:
        raise UserError(LOST) from None
    except (UserError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "gloo" in str(error):
            raise UserError(LOST) from None
        if rank:  # the others do not know why this one ends
            print(f"process {rank}: {error}", file=sys.stderr, flush=True)
        raise
    finally:
        distributed.destroy_process_group()


def start_together(n: int, function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function of a module in n processes, as torchrun starts them; returns what it returns in the leader."""
    here = LaunchConfig(1, 1, n, run_id=uuid4().hex, rdzv_backend="c10d", rdzv_endpoint="localhost:0", max_restarts=0)
    return elastic_launch(here, function)(*arguments)[0]
