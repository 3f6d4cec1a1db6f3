"""Worker processes with one thread each, and their results.

Every process has a pipe of its own, whose other end is open nowhere else: when it is killed, even while it sends a
result, the parent's recv ends. In concurrent.futures and in joblib's loky, all processes share a pipe that the parent
keeps open too; it then waits forever for the rest of the result.
"""

import multiprocessing
import os
import pickle
import queue
import signal
import sys
import threading
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

Job = TypeVar("Job")
Result = TypeVar("Result")


class WorkerPool:
    """Processes, and for each a thread of this one that sends it jobs and receives the results."""

    def __init__(self, n_workers: int) -> None:
        self.n_workers = n_workers
        self._threads = ThreadPoolExecutor(n_workers)
        self._processes: list[Any] = []
        self._idle: queue.SimpleQueue[Connection] = queue.SimpleQueue()

    def start(self) -> None:
        """Start the processes; raises UserError if the system does not allow that many."""
        context = multiprocessing.get_context("spawn")
        try:
            for _ in range(self.n_workers):
                ours, theirs = context.Pipe()
                process = context.Process(target=_serve, args=(theirs,), daemon=True)
                process.start()
                theirs.close()
                self._processes.append(process)
                self._idle.put(ours)
        except OSError as error:
            raise UserError(f"cannot start {self.n_workers} processes ({error.strerror}); lower --workers") from None

    def submit(self, function: Callable[[Job], Result], job: Job) -> Future[Result]:
        """Have a process call a module's function; the future holds what it returns or raises."""
        return self._threads.submit(self._call, function, job)

    def _call(self, function: Callable[[Job], Result], job: Job) -> Result:
        pipe = self._idle.get()
        try:
            pipe.send((function, job))
            result, error = pipe.recv()
        except (EOFError, OSError):
            raise UserError("a worker process died (out of memory?); lower --workers to resume from here") from None
        finally:
            self._idle.put(pipe)
        if error is not None:
            raise error
        return result

    def stop(self, *, kill: bool) -> None:
        """End the processes: at once, whatever they are doing, or when all jobs are done."""
        for process in self._processes if kill else ():
            process.kill()
        self._threads.shutdown(cancel_futures=kill)
        while not self._idle.empty():
            self._idle.get().close()
        for process in self._processes:
            process.join()


@contextmanager
def worker_pool(n_workers: int) -> Iterator[WorkerPool]:
    """Worker processes; an exception kills them, because a job may take minutes and leaves nothing half-written."""
    pool = WorkerPool(n_workers)
    try:
        with deferred(), _hidden_main():  # an interrupted start could leave a process that nobody kills
            pool.start()
        yield pool
        pool.stop(kill=False)
    except BaseException:
        pool.stop(kill=True)
        raise


@contextmanager
def _hidden_main() -> Iterator[None]:
    """Within, a new process does not import the command's own file, nor what that imports (numpy, Modal)."""
    main, sys.modules["__main__"] = sys.modules["__main__"], ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


def _serve(pipe: Connection) -> None:
    """In a worker process: do jobs until the pipe is closed, or the parent dies."""
    os.environ["OMP_NUM_THREADS"] = "1"  # read by numpy, which the first job imports
    for signum in SIGNALS:  # the parent receives them too, and ends this process
        signal.signal(signum, signal.SIG_IGN)
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    with suppress(EOFError, ConnectionError):
        while True:
            pipe.send_bytes(_answer(*pipe.recv()))


def _exit_with_parent() -> None:
    multiprocessing.parent_process().join()  # type: ignore[union-attr]
    os._exit(1)


def _answer(function: Callable[[Job], Result], job: Job) -> bytes:
    """What the function returns and None, or None and what it raises, pickled."""
    try:
        return pickle.dumps((function(job), None))
    except (UserError, OSError) as error:
        return pickle.dumps((None, error))
    except Exception:  # some exceptions, and some results, cannot be pickled
        return pickle.dumps((None, RuntimeError(traceback.format_exc())))


def in_order(pool: WorkerPool, function: Callable[[Job], Result], jobs: Iterable[Job], ahead: int) -> Iterator[Result]:
    """Results in the order of the jobs, with at most `ahead` of them waiting in memory."""
    pending: deque[Future[Result]] = deque()
    for job in jobs:
        pending.append(pool.submit(function, job))
        if len(pending) > ahead:
            yield result_of(pending.popleft())
    while pending:
        yield result_of(pending.popleft())
