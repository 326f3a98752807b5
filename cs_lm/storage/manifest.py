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
    """A file that is written sequentially; it computes its own manifest entry.

    error  the OSError of a failed write, kept because a library that calls `write` may hide it
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
    """Writes the manifest. Call this last: a folder without a manifest is incomplete."""
    content = {**facts, "files": [list(entry) for entry in files]}
    content["checksum"] = _checksum(content)
    atomic_write(folder / MANIFEST, json.dumps(content, indent=1).encode("utf-8"))


def read_manifest(folder: Path) -> tuple[list[FileEntry], dict[str, Any]]:
    """The entries of a folder's files, none outside the folder, and the facts.

    Raises: FileNotFoundError when there is no manifest, UserError when it is damaged.
    """
    path = folder / MANIFEST
    if not stat.S_ISREG(path.lstat().st_mode):
        raise UserError(f"{str(path)!r} is not a regular file")
    with open(path, "rb") as file:
        data = file.read(MAX_MANIFEST_BYTES + 1)
    if len(data) > MAX_MANIFEST_BYTES:
        raise UserError(f"{str(path)!r} has more than {MAX_MANIFEST_BYTES >> 20} MB")
    try:
        content = json.loads(data.decode("utf-8"))
        expected = content.pop("checksum")
        if _checksum(content) != expected:
            raise UserError("its checksum does not match")
        files = [FileEntry(*entry) for entry in content.pop("files")]
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        why = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
        raise UserError(f"{str(path)!r} is damaged ({why})") from None
    for entry in files:
        if not _is_sound(entry):
            raise UserError(f"{str(path)!r} lists an invalid file: {entry!r}")
    return files, content


def file_state(found: os.stat_result) -> list[int]:
    """A value that changes when the file is written or replaced.

    It has the ctime, too, because a program can set the mtime back to an old value.
    """
    return [found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino, found.st_dev]


def check_file(folder: Path, entry: FileEntry, completely: bool) -> None:
    """Checks the length of a file and, if `completely`, its SHA-256.

    Raises: UserError for a file that is missing or has changed since it was written.
    """
    path = folder / entry.name
    if path.is_symlink() or not path.is_file():
        raise UserError(f"{str(path)!r} is missing or not a regular file")
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
