"""SIGINT and SIGTERM: they stop a command at a place where nothing is half done."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)
_state = {"waiting": 0, "deferred": False}  # signals are the process's, so this is one for all


class Interrupted(KeyboardInterrupt):
    """The command was asked to stop; the text says how to go on.

    Attributes:
        signum: by which signal.
        exit_code: the shell's for it.
    """

    def __init__(self, signum: int, saved: str = "what is finished is kept") -> None:
        super().__init__(f"stopped by {signal.Signals(signum).name}: {saved}; the same command goes on from there")
        self.signum, self.exit_code = signum, 128 + signum


@contextmanager
def listening() -> Iterator[None]:
    """Within, a signal raises Interrupted; at once, or where `deferred` says.

    Threads other than the main one cannot listen: there nothing changes.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {signum: signal.signal(signum, _on_signal) for signum in SIGNALS}
    try:
        yield
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
        _state.update(waiting=0, deferred=False)


@contextmanager
def deferred() -> Iterator[None]:
    """Within, the first signal waits for `check`; a second one does not."""
    before = _state["deferred"]
    _state["deferred"] = True
    try:
        yield
    finally:
        _state["deferred"] = before
    check()


def check() -> None:
    """Raise Interrupted if a signal waits."""
    if signum := _state["waiting"]:
        _state["waiting"] = 0
        raise Interrupted(signum)


def _on_signal(signum: int, _: FrameType | None) -> None:
    if _state["deferred"] and not _state["waiting"]:
        _state["waiting"] = signum
    else:
        _state["waiting"] = 0
        raise Interrupted(signum)
