"""Worker processes: they are stopped in the middle of whatever they do, and what they raise comes back."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import pytest
from conftest import GUARD_S, ROOT

from common.artifacts import CannotWriteError
from common.errors import UserError
from data.workers import in_order, worker_pool

BIG = 3_000_000  # of 8 bytes: 24 MB, far more than a pipe holds


def big(number: int) -> np.ndarray:
    return np.full(BIG, number)


def threads_of(_: int) -> str:
    return os.environ["OMP_NUM_THREADS"]


def failing(number: int) -> int:
    if number == 3:
        raise CannotWriteError(Path("a shard"), OSError(28, "No space left on device"))
    return number


class Unsendable(Exception):
    def __init__(self, one: str, two: str) -> None:
        super().__init__(one)


def spoiled(number: int) -> object:
    if number == 1:
        raise Unsendable("the real reason", "")
    return (value for value in ())  # does not pickle


def dying(number: int) -> int:
    if number == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return number


def dying_while_sending(number: int) -> np.ndarray:
    def send_half(pipe: Connection, content: memoryview) -> None:
        os.write(pipe.fileno(), content[: len(content) // 2])
        os.kill(os.getpid(), signal.SIGKILL)

    if number == 3:
        Connection._send = send_half  # type: ignore[attr-defined]
    return big(number)


STOPPED = f"""
import signal, os, sys
sys.path.insert(0, {str(ROOT / "tests")!r})
from common.errors import exit_on_user_error
from data.workers import in_order, worker_pool
from test_workers import big
@exit_on_user_error
def main():
    with worker_pool(2) as pool:
        results = in_order(pool, big, range(20), ahead=6)
        next(results)
        STOP
if __name__ == "__main__":
    main()
"""


@pytest.mark.parametrize("stop", ["raise OSError(28, 'full')", "os.kill(os.getpid(), signal.SIGINT)"])
def test_a_pool_is_stopped_while_workers_send_what_no_pipe_holds(stop: str, tmp_path: Path) -> None:
    """The parent neither reads nor closes what it is sent; it waited for ever, four times out of four."""
    script = tmp_path / "stopped.py"
    script.write_text(STOPPED.replace("STOP", stop))
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, script], env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, timeout=GUARD_S
        )
        assert done.returncode == (2 if "raise" in stop else 130), done.stderr


def test_results_come_in_order_and_what_is_raised_comes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    with worker_pool(3) as pool:
        assert [int(array[-1]) for array in in_order(pool, big, range(7), ahead=2)] == list(range(7))
        assert pool.submit(threads_of, 0).result() == "1"
        found = in_order(pool, failing, range(5), ahead=10)
        assert [next(found) for _ in range(3)] == [0, 1, 2]
        with pytest.raises(UserError, match=r"cannot write a shard .*make room"):
            next(found)
    assert os.environ["OMP_NUM_THREADS"] == "7"


def test_what_cannot_be_sent_still_tells_the_reason() -> None:
    with worker_pool(1) as pool:
        for number, reason in ((0, "cannot pickle 'generator' object"), (1, "the real reason")):
            with pytest.raises(RuntimeError, match=reason):
                pool.submit(spoiled, number).result()


@pytest.mark.parametrize("how", [dying, dying_while_sending])
def test_a_worker_that_dies_is_an_error_with_a_cure(how: Callable[[int], object]) -> None:
    with pytest.raises(UserError, match=r"a worker process died.* lower --workers"), worker_pool(2) as pool:
        list(in_order(pool, how, range(5), ahead=10))


ORPHANED = f"""
import os, signal, sys, time
sys.path.insert(0, {str(ROOT / "tests")!r})
from data.workers import worker_pool
from test_workers import pid_and_sleep
with worker_pool(2) as pool:
    for number in range(2):
        pool.submit(pid_and_sleep, number)
    time.sleep({GUARD_S})
"""


def pid_and_sleep(number: int) -> None:
    Path(f"{number}.tmp").write_text(str(os.getpid()))
    Path(f"{number}.tmp").rename(f"{number}.pid")
    time.sleep(GUARD_S)


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_workers_end_when_their_parent_is_killed(tmp_path: Path) -> None:
    """In the middle of a job, where nothing tells them but their own watch."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    parent = subprocess.Popen([sys.executable, "-c", ORPHANED], cwd=tmp_path, env=environment)
    deadline = time.monotonic() + GUARD_S
    while len(started := list(tmp_path.glob("*.pid"))) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    parent.kill()
    parent.wait()
    workers = [int(path.read_text()) for path in started]
    while any(map(alive, workers)):
        assert time.monotonic() < deadline
        time.sleep(0.05)
