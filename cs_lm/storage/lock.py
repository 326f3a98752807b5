"""File locks between processes, each on an empty file.

The system releases a lock when its process ends, even after a crash. There are no stale locks.
"""

import errno
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

from cs_lm.errors import UserError

_LOG = logging.getLogger("cs_lm")
_LOOK_AGAIN_S = 0.1
# Errors of a file system that has no locks.
_WITHOUT_LOCKS = {errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP}
_HELD = {errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES, errno.EDEADLK}
_READ_ONLY = {errno.EACCES, errno.EPERM, errno.EROFS}


class FileLock:
    """A file lock that this process holds; `close` releases it.

    is_real  False when the file system cannot lock: another process may use the path, too
    """

    def __init__(self, number: int | None, path: Path, is_real: bool):
        self._number, self._path, self.is_real = number, path, is_real

    @property
    def descriptors(self) -> tuple[int, ...]:
        """For a process that is started now: it holds the lock, too, until it ends."""
        return () if self._number is None else (self._number,)

    def close(self, remove: bool = False) -> None:
        """Releases the lock.

        remove  delete the lock file, too; only the holder of an exclusive lock may do that
        """
        if self._number is None:
            return
        if remove and self.is_real:
            with suppress(OSError):  # Windows cannot delete an open file
                os.unlink(self._path)
        os.close(self._number)
        self._number = None

    def __del__(self):
        self.close()


def acquire(path: Path, shared: bool = False) -> FileLock | None:
    """An exclusive or shared lock on the file; None when another process holds it. Does not wait.

    If the file system has no locks, or a reader may not create the file, `is_real` is False.
    Raises: UserError when the folder is not writable.
    """
    while True:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            number = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            if shared and error.errno in _READ_ONLY:
                return FileLock(None, path, is_real=False)
            raise UserError(
                f"{str(path.parent)!r} cannot be written to ({error.strerror}); name another folder"
            ) from None
        try:
            _lock(number, shared)
        except OSError as error:
            if error.errno in _WITHOUT_LOCKS:
                _warn_once(path.parent, error.strerror)
                return FileLock(number, path, is_real=False)
            os.close(number)
            if error.errno in _HELD:
                return None
            raise
        if _is_still_there(number, path):
            return FileLock(number, path, is_real=True)
        os.close(number)  # its last holder deleted it meanwhile: try again


def wait_for(path: Path, shared: bool, on_wait: Callable[[], None]) -> FileLock:
    """`acquire`, repeated until it succeeds; calls `on_wait` once if that takes a while."""
    began_s = time.monotonic()
    has_told = False
    while (lock := acquire(path, shared)) is None:
        if not has_told and time.monotonic() - began_s > 0.5:
            on_wait()
            has_told = True
        time.sleep(_LOOK_AGAIN_S)
    return lock


@contextmanager
def writing_alone(path: Path, on_wait: Callable[[], None]) -> Iterator[FileLock]:
    """A context with the exclusive right to write to the path; waits for other processes."""
    lock = wait_for(path.with_name(f".{path.name}.lock"), shared=False, on_wait=on_wait)
    try:
        yield lock
    finally:
        lock.close(remove=True)


@contextmanager
def locked(path: Path, remove: bool = False) -> Iterator[bool]:
    """A context with the exclusive lock. Yields False at once if another process has the lock.

    remove  delete the lock file afterwards
    """
    lock = acquire(path)
    try:
        yield lock is not None
    finally:
        if lock is not None:
            lock.close(remove)


def _is_still_there(number: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(number), os.stat(path))
    except FileNotFoundError:
        return False


@cache
def _warn_once(folder: Path, why: str) -> None:
    _LOG.warning(
        "%s: this file system has no file locks (%s); continuing without: do not let two "
        "processes write "
        "there at the same time",
        folder,
        why,
    )


if sys.platform == "win32":
    import msvcrt

    def _lock(number: int, shared: bool) -> None:
        if not shared:  # msvcrt has no shared lock; Windows keeps open files from deletion
            msvcrt.locking(number, msvcrt.LK_NBLCK, 1)

else:
    import fcntl

    def _lock(number: int, shared: bool) -> None:
        fcntl.flock(number, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
