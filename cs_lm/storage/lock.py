"""Locks between processes, on a file that holds nothing.

The system gives a lock up with its process, however that ends: nothing is left to clear.
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
# What a file system answers that has no locks at all.
_WITHOUT_LOCKS = {errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP}
_HELD = {errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES, errno.EDEADLK}
_READ_ONLY = {errno.EACCES, errno.EPERM, errno.EROFS}


class FileLock:
    """A lock that this process holds; `close` gives it up.

    is_real  False where the file system has no locks, and another process may hold one too
    """

    def __init__(self, number: int | None, path: Path, is_real: bool):
        self._number, self._path, self.is_real = number, path, is_real

    def close(self, remove: bool = False) -> None:
        """remove  the file goes too; only whoever holds the lock alone may do that"""
        if self._number is None:
            return
        if remove and self.is_real:
            with suppress(OSError):  # Windows removes no open file
                os.unlink(self._path)
        os.close(self._number)
        self._number = None

    def __del__(self):
        self.close()


def acquire(path: Path, shared: bool = False) -> FileLock | None:
    """The file's lock, alone or together with others that share it; None where that cannot be now.

    Where the file system has no locks, or a reader may not write, the work goes on without one.
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
        os.close(number)  # its last holder removed it meanwhile


def wait_for(path: Path, shared: bool, on_wait: Callable[[], None]) -> FileLock:
    """The same, waited for; `on_wait` is called once, when it takes longer than a moment."""
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
    """Keeps other processes from writing to the path while entered; they are waited for."""
    lock = wait_for(path.with_name(f".{path.name}.lock"), shared=False, on_wait=on_wait)
    try:
        yield lock
    finally:
        lock.close(remove=True)


@contextmanager
def locked(path: Path) -> Iterator[bool]:
    """Holds the lock alone while entered; False, at once, where another process holds it."""
    lock = acquire(path)
    try:
        yield lock is not None
    finally:
        if lock is not None:
            lock.close()


def _is_still_there(number: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(number), os.stat(path))
    except FileNotFoundError:
        return False


@cache
def _warn_once(folder: Path, why: str) -> None:
    _LOG.warning(
        "%s: this file system has no locks (%s); going on without: do not let two processes write "
        "there at the same time",
        folder,
        why,
    )


if sys.platform == "win32":
    import msvcrt

    def _lock(number: int, shared: bool) -> None:
        if not shared:  # Windows has no lock that several share: it keeps open files from removal
            msvcrt.locking(number, msvcrt.LK_NBLCK, 1)

else:
    import fcntl

    def _lock(number: int, shared: bool) -> None:
        fcntl.flock(number, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
