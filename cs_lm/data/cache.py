"""The cache in data/: token stores, tokenizers and texts that are made once and found again.

The name of an entry holds a label and a fingerprint of everything that its content depends on, so
two settings never share an entry. One process makes it under a lock while the others wait. It gets
its final name when it is complete, and does not change after that.
"""

import hashlib
import json
import logging
import os
import re
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from cs_lm.storage.atomic import WRITING, atomic_write, fsync_directory, temporary_name
from cs_lm.storage.lock import FileLock, acquire, wait_for
from cs_lm.storage.manifest import MANIFEST, file_state
from cs_lm.tokenizer.text_source import sha256_of_file

DATA = Path("data")
STORE, TOKENIZER, TEXT = "chunks", "tokenizer", "text"
KINDS = {STORE: "token store", TOKENIZER: "tokenizer", TEXT: "text"}
_LOCKS = ".locks"
_HASHES = ".hashes.json"
_MOST_LABEL_CHARS = 60
PIPE_LABEL = "standard-input"
_NEW_NAME = re.compile(rf"(.+)_({STORE}|{TOKENIZER}|{TEXT})-[0-9a-f]{{10}}")
_OLD_NAME = re.compile(rf"(.+)_({STORE}|{TOKENIZER})(?:_valid)?")
_PIPE_NAME = re.compile(rf"({PIPE_LABEL})_({TEXT})")  # of a text that is still being read
_OWN_SUFFIX = re.compile(r"\.\d+-\d+-[0-9a-f]{6}$")
SETTINGS = "settings.json"  # the settings that a tokenizer was trained with
# The file that identifies our own folders; a user may have put others under such a name.
_MARKS = {STORE: MANIFEST, TOKENIZER: SETTINGS}
# The hash of a shorter file is not stored: computing it again takes less time.
_REMEMBERED_BYTES = 4 << 20

_log = logging.getLogger("cs_lm")
Found = TypeVar("Found")


def cache_path(label: str, kind: str, facts: Any) -> Path:
    """The path of the entry whose content depends on the facts (as JSON)."""
    text = json.dumps(facts, sort_keys=True, ensure_ascii=True)
    fingerprint = hashlib.sha256(text.encode("ascii")).hexdigest()[:10]
    return DATA / f"{label[:_MOST_LABEL_CHARS]}_{kind}-{fingerprint}"


def old_path(label: str, kind: str) -> Path:
    """The path in earlier versions: one for each label and kind."""
    return DATA / f"{label}_{kind}"


def paths_of(label: str, kind: str) -> list[Path]:
    """All existing folders of that label and kind."""
    pattern = re.compile(rf"{re.escape(label[:_MOST_LABEL_CHARS])}_{kind}-[0-9a-f]{{10}}")
    new = [path for path in DATA.iterdir() if pattern.fullmatch(path.name)] if DATA.is_dir() else []
    return [path for path in (old_path(label, kind), *sorted(new)) if path.is_dir()]


def in_use(path: Path) -> FileLock:
    """A lock that keeps others from removing the entry until it is closed or the process ends."""
    # no message: only a removal, which is short, makes this wait
    lock = wait_for(_lock_path(path), shared=True, on_wait=lambda: None)
    try:
        os.utime(_lock_path(path))
    except OSError:  # a read-only folder
        pass
    return lock


def find_or_make(
    path: Path, find: Callable[[], Found | None], make: Callable[[bool], None]
) -> tuple[Found, FileLock]:
    """The result of `find`, and a lock on the entry. `make` runs first if `find` gives None.

    make  called with True if no other process can be making the same entry (file locks work
          there); it must give the entry its final name as its last step
    """
    while True:
        lock = in_use(path)
        found = find()
        if found is not None:
            return found, lock
        making = wait_for(
            _making_path(path),
            shared=False,
            on_wait=lambda: _log.info("waiting: another process is making %s", path),
        )
        try:
            if find() is None:
                make(making.is_real)
        finally:
            making.close(remove=True)
            lock.close()


def _text_path(label: str, digest: str) -> Path:
    path = cache_path(label, TEXT, digest)
    return path.with_name(f"{path.name}.txt")


def keep_text(label: str, text: bytes) -> Path:
    """A file in data/ with this content; its name holds the hash of the content."""
    digest = hashlib.sha256(text).hexdigest()
    path = _text_path(label, digest)
    if not path.is_file() or path.stat().st_size != len(text) or sha256_of_file(path) != digest:
        atomic_write(path, text)
    return path


def keep_stream(label: str, blocks: Iterable[bytes]) -> Path | None:
    """`keep_text` for a stream, with one block in memory; None for an empty stream."""
    digest = hashlib.sha256()
    DATA.mkdir(exist_ok=True)
    writing = temporary_name(DATA / f"{label}_{TEXT}")
    try:
        with open(writing, "wb") as file:
            for block in blocks:
                digest.update(block)
                file.write(block)
            file.flush()
            os.fsync(file.fileno())
            if not file.tell():
                return None
        path = _text_path(label, digest.hexdigest())
        os.replace(writing, path)
        fsync_directory(path.parent)
    finally:
        writing.unlink(missing_ok=True)
    return path


def set_aside(path: Path) -> None:
    """Removes a folder; renames it first, so that an interrupted removal cannot leave a part."""
    aside = temporary_name(path)
    os.replace(path, aside)
    shutil.rmtree(aside, ignore_errors=True)


def sha256_remembered(path: Path) -> str:
    """The SHA-256 of a file.

    The hash of a large file is stored, and used again while its `file_state` is the same.
    """
    found = os.stat(path)
    if found.st_size < _REMEMBERED_BYTES:
        return sha256_of_file(path)
    key, seen, began_ns = os.path.abspath(path), file_state(found), time.time_ns()
    known = _remembered_hashes()
    entry = known.get(key)
    if isinstance(entry, list) and entry[:-1] == seen:
        return entry[-1]
    digest = sha256_of_file(path)
    is_settled = began_ns - max(found.st_mtime_ns, found.st_ctime_ns) > 2_000_000_000
    if is_settled and file_state(os.stat(path)) == seen:  # else a later change may keep these times
        known = {**_remembered_hashes(), key: [*seen, digest]}
        try:
            atomic_write(DATA / _HASHES, json.dumps(known).encode("utf-8"))
        except OSError as error:
            _log.debug("%s: not remembered (%s)", path, error)
    return digest


def _remembered_hashes() -> dict[str, Any]:
    try:
        known = json.loads((DATA / _HASHES).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return known if isinstance(known, dict) else {}


def _lock_path(path: Path) -> Path:
    """The lock of an entry's users. Its maker has another one, so neither waits for the other."""
    return path.parent / _LOCKS / path.name


def _making_path(path: Path) -> Path:
    return path.parent / _LOCKS / f"{path.name}.making"


# ---- listing and removing entries ----


class CacheEntry(NamedTuple):
    path: Path
    kind: str  # one of the values of KINDS
    num_bytes: int
    used_s: float  # of the last use, in seconds since 1970
    is_complete: bool
    can_be_made_again: bool  # False: a text that came through a pipe


def entries() -> Iterator[CacheEntry]:
    """All entries in data/, incomplete ones included, but not the files of the user."""
    for path in sorted(DATA.iterdir()) if DATA.is_dir() else []:
        is_complete, final = not path.name.endswith(WRITING), _final_path(path)
        name = final.name.removesuffix(".txt")
        match = _NEW_NAME.fullmatch(name) or _OLD_NAME.fullmatch(name)
        if match is None and not is_complete:
            match = _PIPE_NAME.fullmatch(name)
        if match is None or path.is_dir() == (match[2] == TEXT):
            continue
        if is_complete and match[2] in _MARKS and not (path / _MARKS[match[2]]).is_file():
            continue
        files = [file for file in path.rglob("*") if file.is_file()] if path.is_dir() else [path]
        used_s = max(
            (file.stat().st_mtime for file in [*files, _lock_path(path)] if file.exists()),
            default=path.stat().st_mtime,
        )
        num_bytes = sum(file.stat().st_size for file in files)
        again = match[2] != TEXT or match[1] != PIPE_LABEL
        yield CacheEntry(path, KINDS[match[2]], num_bytes, used_s, is_complete, again)


def _final_path(path: Path) -> Path:
    """The final path of an incomplete entry."""
    if not path.name.endswith(WRITING):
        return path
    return path.with_name(_OWN_SUFFIX.sub("", path.name.removesuffix(WRITING)))


def remove(entry: CacheEntry) -> bool:
    """Removes the entry; returns False, and keeps it, if a process is making or using it."""
    path = _final_path(entry.path)
    locks = [acquire(lock_path) for lock_path in (_lock_path(path), _making_path(path))]
    try:
        if None in locks:
            return False
        if entry.path.is_dir():
            set_aside(entry.path)
        else:
            entry.path.unlink()
        return True
    finally:
        for lock in locks:
            if lock is not None:
                lock.close(remove=None not in locks)
