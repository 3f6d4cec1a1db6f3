"""The one exception that means: the user can mend this."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import NoReturn, ParamSpec

P = ParamSpec("P")


class UserError(Exception):
    """A user's mistake: its text is one line that names the file or option and the cure."""


def exit_on_user_error(command: Callable[P, None]) -> Callable[P, None]:
    """Run a command so that a UserError becomes one line on stderr and exit code 2, no traceback.

    Ctrl-C likewise: one line and exit code 130, the shell's code for it.
    """

    @functools.wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            command(*args, **kwargs)
        except UserError as error:
            _die(f"error: {error}", 2)
        except KeyboardInterrupt:
            _die("interrupted", 130)

    return run


def warn(message: str) -> None:
    """One line that the user should see, on stderr."""
    print(f"warning: {message}", file=sys.stderr, flush=True)


def _die(message: str, code: int) -> NoReturn:
    print(message, file=sys.stderr)
    raise SystemExit(code)
