"""Files that are there whole or not at all, and folders that one process uses at a time."""

import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


@contextmanager
def writing_whole(path: str | Path) -> Iterator[BinaryIO]:
    """A file to write to, which takes the place of `path` at once, when it is on the disk.

    After an exception, of the disk or of whatever writes to it, the older file is as it was.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    writing = path.with_name(path.name + ".writing")
    try:
        with open(writing, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(writing, path)
    finally:
        writing.unlink(missing_ok=True)
    sync_folder(path.parent)


def write_whole(path: str | Path, content: bytes) -> None:
    """Puts the content in the file's place at once, under its name only when it is on the disk."""
    with writing_whole(path) as file:
        file.write(content)


def sync_folder(folder: Path) -> None:
    """Waits until names that were given in the folder are on the disk. Windows has no such wait."""
    if sys.platform != "win32":
        number = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(number)
        finally:
            os.close(number)


def put_folder(new: Path, folder: Path) -> None:
    """Renames a complete folder to its name; an older one there makes room first."""
    old = folder.with_name(folder.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    sync_folder(new)
    if folder.exists():
        os.replace(folder, old)
    os.replace(new, folder)
    sync_folder(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


@contextmanager
def locked(path: Path) -> Iterator[bool]:
    """Holds the file's lock while entered; False, at once, where another process holds it.

    The system gives the lock up with the process, however that ends: nothing is left to clear.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "ab") as file:
        try:
            _lock(file)
        except OSError:
            yield False
        else:
            yield True


if sys.platform == "win32":
    import msvcrt

    def _lock(file: BinaryIO) -> None:
        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)

else:
    import fcntl

    def _lock(file: BinaryIO) -> None:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
