"""SIGINT and SIGTERM: they stop a command at a place where nothing is half done.

A signal raises Interrupted wherever the command is, and libraries swallow an exception here and there, while they are
imported or something is deleted. So it is remembered, and `check`, which every loop calls, raises it again.
"""

import signal
import threading
from collections.abc import Iterator
from concurrent.futures import Future, wait
from contextlib import contextmanager
from types import FrameType
from typing import TypeVar

SIGNALS = (signal.SIGINT, signal.SIGTERM)
SECONDS_BETWEEN_CHECKS = 0.2
Result = TypeVar("Result")
_state = {"signum": 0, "deferred": False, "together": False}  # signals are the process's, so this is one for all


class Interrupted(KeyboardInterrupt):
    """The command was asked to stop by a signal; the text says how to resume, exit_code is the shell's."""

    def __init__(self, signum: int, saved: str = "what is finished is kept") -> None:
        super().__init__(f"stopped by {signal.Signals(signum).name}: {saved}; the same command goes on from there")
        self.signum, self.exit_code = signum, 128 + signum


@contextmanager
def listening() -> Iterator[None]:
    """Within, a signal raises Interrupted, at once or where `deferred` says; in the main thread, others hear none."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {signum: signal.signal(signum, _on_signal) for signum in SIGNALS}
    try:
        yield
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
        _state.update(signum=0, deferred=False)


@contextmanager
def deferred(together: bool = False, follower: bool = False) -> Iterator[None]:
    """Within, the first signal waits for `check`, a second one does not; together, all wait for common.processes.

    A follower of another process answers none that came to itself.
    """
    before = _state.copy()
    _state.update(deferred=True, together=together)
    try:
        yield
    finally:
        _state.update(deferred=before["deferred"], together=before["together"])
        if follower:
            _state["signum"] = 0
    check()


def signal_that_came() -> int:
    """Its number; 0 if none has come."""
    return _state["signum"]


def check() -> None:
    """Raise Interrupted if a signal has come, and this is the main thread."""
    if _state["together"]:
        return
    if (signum := _state["signum"]) and threading.current_thread() is threading.main_thread():
        raise Interrupted(signum)


def result_of(future: Future[Result]) -> Result:
    """The result of a future, however long it takes, unless a signal comes."""
    while not future.done():
        check()
        wait([future], SECONDS_BETWEEN_CHECKS)
    return future.result()


def _on_signal(signum: int, _: FrameType | None) -> None:
    first, _state["signum"] = not _state["signum"], signum
    if not _state["together"] and not (first and _state["deferred"]):
        raise Interrupted(signum)
