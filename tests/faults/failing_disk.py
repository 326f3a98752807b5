"""A shim over the calls with which files are written: the n-th one fails, or ends the process."""

import builtins
import contextlib
import errno
import os
from collections.abc import Callable, Iterator

CALLS = ("fsync", "replace", "rename", "link", "mkdir", "unlink", "rmdir")


class FailingDisk:
    """While entered, counts writing calls below a folder and asks `fails` of each number.

    fails  called with the number of the call, 1 for the first: returns an errno to fail with, or
           None; may also end the process
    """

    def __init__(self, fails: Callable[[int], int | None]):
        self._fails = fails
        self.num_calls = 0

    def _count(self) -> None:
        self.num_calls += 1
        number = self._fails(self.num_calls)
        if number is not None:
            raise OSError(number, os.strerror(number))

    @contextlib.contextmanager
    def entered(self) -> Iterator["FailingDisk"]:
        originals = {name: getattr(os, name) for name in CALLS}
        original_open = builtins.open

        def counted(function):
            def call(*args, **kwargs):
                self._count()
                return function(*args, **kwargs)

            return call

        def counted_open(file, mode="r", *args, **kwargs):
            opened = original_open(file, mode, *args, **kwargs)
            if isinstance(file, int) or not set(mode) & set("wax+"):
                return opened
            try:
                self._count()
            except OSError:
                opened.close()
                raise
            return _CountedFile(opened, self._count)

        for name, function in originals.items():
            setattr(os, name, counted(function))
        builtins.open = counted_open
        try:
            yield self
        finally:
            builtins.open = original_open
            for name, function in originals.items():
                setattr(os, name, function)


class _CountedFile:
    """Half of what is written arrives before a write fails."""

    def __init__(self, file, count: Callable[[], None]):
        self._file, self._count = file, count

    def write(self, data):
        try:
            self._count()
        except OSError:
            self._file.write(data[: len(data) // 2])
            raise
        return self._file.write(data)

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self._file.close()

    def __getattr__(self, name):
        return getattr(self._file, name)


NO_SPACE, IO_ERROR = errno.ENOSPC, errno.EIO
