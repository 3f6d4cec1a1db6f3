"""Exclusive locks, which a process that dies lets go of."""

import errno
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from common.artifacts import CannotWriteError
from common.errors import UserError, warn

NO_LOCKS_HERE = (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK)
FOREVER = -1.0


@contextmanager
def locked(path: Path, timeout_s: float) -> Iterator[None]:
    """Within, this process has the lock file `path`; where the file system has no locks there is a warning.

    Raises Timeout if another process keeps it for so many seconds, OSError if the file cannot be made.
    """
    # Never a soft lock, the mere existence of a file: it would outlive its process.
    lock = FileLock(path, timeout=timeout_s, fallback_to_soft=False)
    try:
        lock.acquire()
    except OSError as error:  # a Timeout is one, too
        if error.errno not in NO_LOCKS_HERE:
            raise
        warn(f"{path.parent} is on a file system without locks: make sure that no other process writes there")
    try:
        yield
    finally:
        lock.release()


@contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Within, no other process may write the folder; UserError if one does, or nothing can be written there.

    The lock is the file .{name}.lock beside the folder. It stays there, unless the folder was never made.
    """
    lock_path = folder.parent / f".{folder.name}.lock"
    made = [parent for parent in folder.parents if not parent.exists()]
    with ExitStack() as held:
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            held.enter_context(locked(lock_path, timeout_s=0))
        except Timeout:
            raise UserError(f"another process is writing {folder}; wait for it, or choose another --tag") from None
        except OSError as error:
            raise CannotWriteError(folder, error) from None
        try:
            yield
        finally:
            if not folder.exists():
                with suppress(OSError):
                    lock_path.unlink()
                    for parent in made:
                        parent.rmdir()
