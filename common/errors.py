"""UserError, the exception for a user's mistake; lines on stderr; exit codes."""

import functools
import os
import sys
from collections.abc import Callable
from typing import NoReturn, ParamSpec

from common.interrupt import Interrupted, listening

P = ParamSpec("P")


class UserError(Exception):
    """A user's mistake: its text is one line that names the file or option and the cure."""


def n_processes() -> int:
    """How many processes torchrun started for this command; 1 if it did not."""
    return int(os.environ["WORLD_SIZE"]) if "TORCHELASTIC_RUN_ID" in os.environ else 1


def leads() -> bool:
    """Whether this process is the first of those, which alone talks."""
    return n_processes() == 1 or os.environ["RANK"] == "0"


def exit_on_user_error(command: Callable[P, None]) -> Callable[P, None]:
    """Let a command end with one line on stderr, no traceback: code 2 for a UserError, 130 or 143 for a signal."""

    @functools.wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            with listening():
                command(*args, **kwargs)
        except UserError as error:
            _die(f"error: {error}", 2)
        except Interrupted as stop:
            _die(str(stop), stop.exit_code)
        except RuntimeError as error:
            if type(error).__name__ != "OutOfMemoryError":  # that of torch, which is not imported here
                raise
            _die("error: the GPU's memory is full; give a smaller --batch-size, or --tiles-on disk", 2)
        except OSError as error:  # the disk is full, gone, or not ours
            _die(f"error: {error.filename or 'a file'}: {error.strerror or error}; see to the disk and start again", 2)

    return run


def warn(message: str) -> None:
    """One line that the user should see, on stderr."""
    say(f"warning: {message}")


def say(message: str) -> None:
    """One line on stderr, as progress; of several processes that torchrun started, from the first alone."""
    if leads():
        print(message, file=sys.stderr, flush=True)


def _die(message: str, code: int) -> NoReturn:
    say(message)
    raise SystemExit(code)
