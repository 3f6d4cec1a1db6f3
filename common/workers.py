"""Worker processes with one thread each, and their results in order."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import Any, TypeVar

from common.errors import UserError
from common.interrupt import SIGNALS

Job = TypeVar("Job")
Result = TypeVar("Result")


@contextmanager
def worker_pool(n_workers: int) -> Iterator[ProcessPoolExecutor]:
    """Single-threaded worker processes; the environment that they inherit is put back afterwards."""
    saved = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = "1"  # spawned workers read it when they import numpy
    context = multiprocessing.get_context("spawn")
    try:
        with ProcessPoolExecutor(
            n_workers, mp_context=context, initializer=_serve_the_parent_alone, initargs=(os.getpid(),)
        ) as pool:
            try:
                yield pool
            except BrokenProcessPool:
                raise UserError(
                    "a worker process died, most likely for want of memory; give fewer as --workers, what is finished "
                    "is kept"
                ) from None
            except BaseException:  # a job may take minutes, and nothing that it leaves is half written
                for process in list(pool._processes.values()):
                    process.kill()
                pool.shutdown(cancel_futures=True)
                raise
    finally:
        if saved is None:
            del os.environ["OMP_NUM_THREADS"]
        else:
            os.environ["OMP_NUM_THREADS"] = saved


def _serve_the_parent_alone(parent: int) -> None:
    """Signals reach the whole group, and the parent alone answers them; when it dies, so does this process."""
    for signum in SIGNALS:
        signal.signal(signum, signal.SIG_IGN)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def in_order(
    pool: ProcessPoolExecutor, function: Callable[[Job], Result], jobs: Iterable[Job], ahead: int
) -> Iterator[Result]:
    """Results in the order of the jobs, with at most `ahead` of them waiting in memory."""
    pending: deque[Any] = deque()
    for job in jobs:
        pending.append(pool.submit(function, job))
        if len(pending) > ahead:
            yield pending.popleft().result()
    while pending:
        yield pending.popleft().result()
