"""The manifest of a folder: its files with their lengths and checksums, and facts about them."""

import hashlib
import json
import os
import stat
import string
from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from cs_lm.errors import UserError
from cs_lm.storage.atomic import atomic_write

MANIFEST = "manifest.json"
MAX_MANIFEST_BYTES = 64 << 20
_PLAIN = frozenset(string.ascii_letters + string.digits + "._-")


class FileEntry(NamedTuple):
    name: str
    num_bytes: int
    sha256: str


class HashingFile:
    """A file that is written from its beginning on, and what its manifest says of it.

    error  what the system said when a write failed: callers that write for us may hide it
    """

    def __init__(self, file: BinaryIO):
        self._file, self._hash, self._num_bytes = file, hashlib.sha256(), 0
        self.error: OSError | None = None

    def write(self, data: bytes) -> int:
        try:
            self._file.write(data)
        except OSError as error:
            self.error = error
            raise
        self._hash.update(data)
        self._num_bytes += len(data)
        return len(data)

    def flush(self) -> None:
        self._file.flush()

    def entry(self, name: str) -> FileEntry:
        return FileEntry(name, self._num_bytes, self._hash.hexdigest())


def write_manifest(folder: Path, files: Iterable[FileEntry], facts: dict[str, Any]) -> None:
    """To be written last: a folder without it is not complete."""
    content = {**facts, "files": [list(entry) for entry in files]}
    content["checksum"] = _checksum(content)
    atomic_write(folder / MANIFEST, json.dumps(content, indent=1).encode("utf-8"))


def read_manifest(folder: Path) -> tuple[list[FileEntry], dict[str, Any]]:
    """The files of a folder, none of them outside it, and the facts.

    Raises: FileNotFoundError where there is none, ValueError for one that is not as it was written.
    """
    path = folder / MANIFEST
    if not stat.S_ISREG(path.lstat().st_mode):
        raise UserError(f"{str(path)!r} is no plain file")
    with open(path, "rb") as file:
        data = file.read(MAX_MANIFEST_BYTES + 1)
    if len(data) > MAX_MANIFEST_BYTES:
        raise UserError(f"{str(path)!r} has more than {MAX_MANIFEST_BYTES >> 20} MB")
    try:
        content = json.loads(data.decode("utf-8"))
        expected = content.pop("checksum")
        if _checksum(content) != expected:
            raise UserError("its checksum is another one")
        files = [FileEntry(*entry) for entry in content.pop("files")]
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise UserError(f"{str(path)!r} is damaged ({type(error).__name__}: {error})") from None
    for entry in files:
        if not _is_sound(entry):
            raise UserError(f"{str(path)!r} names a file that cannot be of its folder: {entry!r}")
    return files, content


def file_state(found: os.stat_result) -> list[int]:
    """Other for a file that was written, or put in the place of another one, since.

    The time of change of its entry tells, too, where somebody set the time of its content back.
    """
    return [found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino, found.st_dev]


def check_file(folder: Path, entry: FileEntry, completely: bool) -> None:
    """Its length, and when `completely` is asked for, its contents.

    Raises: ValueError for a file that is missing, or not as it was written.
    """
    path = folder / entry.name
    if path.is_symlink() or not path.is_file():
        raise UserError(f"{str(path)!r} is missing, or no plain file")
    num_bytes = path.stat().st_size
    if num_bytes != entry.num_bytes:
        raise UserError(f"{str(path)!r} has {num_bytes} bytes, not {entry.num_bytes}")
    if completely:
        with open(path, "rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != entry.sha256:
                raise UserError(f"{str(path)!r} has changed since it was written")


def _checksum(content: dict[str, Any]) -> str:
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def _is_sound(entry: FileEntry) -> bool:
    return (
        isinstance(entry.name, str)
        and bool(entry.name.strip("."))
        and len(entry.name) <= 255
        and set(entry.name) <= _PLAIN
        and entry.name != MANIFEST
        and type(entry.num_bytes) is int
        and entry.num_bytes >= 0
        and isinstance(entry.sha256, str)
        and len(entry.sha256) == 64
    )
