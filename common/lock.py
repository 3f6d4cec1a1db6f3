"""One process at a time, by a lock that a process which dies lets go of."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from common.errors import warn

NO_LOCKS_HERE = (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK)
FOREVER = -1.0


@contextmanager
def locked(path: Path, timeout_s: float) -> Iterator[None]:
    """Within, this process has the lock file `path`; where the file system has no locks there is a warning.

    Raises:
        Timeout: another process has it, and kept it for so many seconds.
        OSError: the file cannot be made.
    """
    # Never a lock by the mere existence of a file: it would outlive its process, and a container its successor.
    lock = FileLock(path, timeout=timeout_s, fallback_to_soft=False)
    try:
        lock.acquire()
    except Timeout:
        raise
    except OSError as error:
        if error.errno not in NO_LOCKS_HERE:
            raise
        warn(f"{path.parent} is on a file system without locks: see to it that no other process writes there")
    try:
        yield
    finally:
        lock.release()
