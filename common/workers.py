"""Worker processes with one thread each, and their results."""

from __future__ import annotations

import multiprocessing
import os
import queue
import signal
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection
from types import ModuleType
from typing import Any, TypeVar

from common.errors import UserError
from common.interrupt import SIGNALS, deferred, result_of

SECONDS_BETWEEN_LOOKS = 0.2  # of a worker, whether its parent is alive

Job = TypeVar("Job")
Result = TypeVar("Result")


class WorkerPool:
    """Processes that each answer one thread of this one.

    A process and its thread have a pipe to themselves, and nobody else holds its other end: when the process is killed,
    in the middle of whatever result, the thread's recv ends. (In concurrent.futures.ProcessPoolExecutor all processes
    share a pipe that the parent holds open as well, and stopping it then waits for the rest of the result for ever.)
    """

    def __init__(self, n_workers: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._threads = ThreadPoolExecutor(n_workers, "worker")
        self._processes: list[Any] = []
        self._idle: queue.SimpleQueue[Connection] = queue.SimpleQueue()
        try:
            with _hidden_main():
                for _ in range(n_workers):
                    ours, theirs = context.Pipe()
                    process = context.Process(target=_serve, args=(theirs, os.getpid()), daemon=True)
                    process.start()
                    theirs.close()
                    self._processes.append(process)
                    self._idle.put(ours)
        except OSError as error:
            self.kill()
            raise UserError(f"cannot start {n_workers} processes ({error.strerror}); give fewer as --workers") from None

    def submit(self, function: Callable[[Job], Result], job: Job) -> Future[Result]:
        """Have a process call a function of a module; what it returns or raises comes back."""
        return self._threads.submit(self._call, function, job)

    def _call(self, function: Callable[[Job], Result], job: Job) -> Result:
        pipe = self._idle.get()
        try:
            pipe.send((function, job))
            good, result = pipe.recv()
        except (EOFError, ConnectionError):
            raise UserError(
                "a worker process died, most likely for want of memory; give fewer as --workers, what is finished is "
                "kept"
            ) from None
        finally:
            self._idle.put(pipe)
        if not good:
            raise result
        return result

    def close(self) -> None:
        """Let the processes end, which have nothing left to do."""
        self._threads.shutdown()
        while not self._idle.empty():
            self._idle.get().close()
        for process in self._processes:
            process.join()

    def kill(self) -> None:
        """End them at once, whatever they are doing."""
        for process in self._processes:
            process.kill()
        self._threads.shutdown(cancel_futures=True)
        self.close()


@contextmanager
def _hidden_main() -> Iterator[None]:
    """Within, a process that is started does not import the command's own file, and with it Modal, which it has no use
    for: it hears of its parent's death the sooner."""
    main = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


@contextmanager
def worker_pool(n_workers: int) -> Iterator[WorkerPool]:
    """Single-threaded worker processes; the environment that they inherit is put back afterwards.

    Left by an exception they are killed: a job may take minutes, and nothing that it leaves is half written.
    """
    saved = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = "1"  # spawned workers read it when they import numpy
    pool = None
    try:
        with deferred():  # a process that nobody knows of yet could not be killed
            pool = WorkerPool(n_workers)
        yield pool
        pool.close()
    except BaseException:
        if pool is not None:
            pool.kill()
        raise
    finally:
        if saved is None:
            del os.environ["OMP_NUM_THREADS"]
        else:
            os.environ["OMP_NUM_THREADS"] = saved


def _serve(pipe: Connection, parent: int) -> None:
    """In a worker process: answer until the pipe is closed.

    Signals reach the whole group, and the parent alone answers them; when it dies, so does this process.
    """
    for signum in SIGNALS:
        signal.signal(signum, signal.SIG_IGN)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(SECONDS_BETWEEN_LOOKS)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
    with suppress(EOFError, ConnectionError):  # the pipe is closed, or the parent gone
        while True:
            function, job = pipe.recv()
            try:
                pipe.send((True, function(job)))
            except ConnectionError:
                return
            except (UserError, OSError) as error:
                pipe.send((False, error))
            except Exception:  # whatever it is, and whether it could be sent or not
                pipe.send((False, RuntimeError(traceback.format_exc())))


def in_order(pool: WorkerPool, function: Callable[[Job], Result], jobs: Iterable[Job], ahead: int) -> Iterator[Result]:
    """Results in the order of the jobs, with at most `ahead` of them waiting in memory."""
    pending: deque[Future[Result]] = deque()
    for job in jobs:
        pending.append(pool.submit(function, job))
        if len(pending) > ahead:
            yield result_of(pending.popleft())
    while pending:
        yield result_of(pending.popleft())
