"""Token ids on disk: written while encoding, read by range, never all in memory."""

import json
import os
import shutil
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from cs_lm.data.store_writer import JOURNAL, Encoder, Journal, id_dtype, write_chunks, write_ids
from cs_lm.errors import UserError
from cs_lm.storage.atomic import WRITING, atomic_write, replace_directory, temporary_name
from cs_lm.storage.manifest import (
    MANIFEST,
    FileEntry,
    check_file,
    file_state,
    read_manifest,
    write_manifest,
)

FORMAT_VERSION = 2
VERIFIED = "verified.json"
# A file that changed more recently than this may change again and keep its modification time.
_SETTLED_NS = 100_000_000


class Tokens(Protocol):
    """A sequence of token ids of which ranges can be read."""

    def __len__(self) -> int: ...

    def load_by_range(self, start: int, end: int) -> np.ndarray: ...


class StoreOptions(NamedTuple):
    """Options of `MemmapManager.save_as_memmap`.

    describe   called at the end, for the description of the text in the manifest
    on_tokens  called with the number of tokens so far
    text_key   identifies the text, as JSON. The next attempt with the same text, tokenizer and
               chunk size continues one that was interrupted, even by SIGKILL. None: an
               interrupted attempt leaves no files
    replace    False: keep a store that another process has made meanwhile
    """

    describe: Callable[[], dict[str, Any]] = dict
    on_tokens: Callable[[int], None] | None = None
    text_key: Any = None
    replace: bool = True


DEFAULT_OPTIONS = StoreOptions()


class MemmapManager:
    """The token store in one folder: files of `chunk_size` ids each, and a manifest.

    The manifest names dtype, number of tokens, chunk size, vocabulary size, the tokenizer's
    fingerprint, the text's length in bytes, its source, and for each chunk its length and SHA-256.

    Each read opens its file only while it copies: a pass over a store larger than memory leaves
    no pages and no open files in the process.
    """

    def __init__(self, folder: str | Path):
        """Checks the length of every chunk; `verify` reads the chunks.

        Raises: FileNotFoundError if there is no store, UserError for a damaged one.
        """
        self.folder = Path(folder)
        path = self.folder / MANIFEST
        if not path.is_file():
            raise FileNotFoundError(
                f"token store: {str(self.folder)!r} has no {MANIFEST}; encode a text into "
                f"this folder first"
            )
        try:
            self.files, self.manifest = read_manifest(self.folder)
            if self.manifest.get("format_version") != FORMAT_VERSION:
                raise UserError(f"{str(path)!r} has format {self.manifest.get('format_version')}")
            self._check_facts()
            for entry in self.files:
                check_file(self.folder, entry, completely=False)
            self._paths = [os.path.join(self.folder, entry.name) for entry in self.files]
            self._identities = [_identity(os.stat(path)) for path in self._paths]
        except (ValueError, KeyError, TypeError) as error:
            raise self._damaged(error) from None

    def _check_facts(self) -> None:
        facts = self.manifest
        for name, kind in (
            ("num_tokens", int),
            ("chunk_size", int),
            ("vocab_size", int),
            ("text_bytes", int),
            ("tokenizer_fingerprint", str),
            ("source", dict),
        ):
            if type(facts[name]) is not kind or (kind is int and facts[name] < 1):
                raise UserError(f"its {name} is {facts[name]!r}")
        self.dtype = {"<u2": np.dtype("<u2"), "<u4": np.dtype("<u4")}[facts["dtype"]]
        self._num_tokens, self.chunk_size = facts["num_tokens"], facts["chunk_size"]
        self.fingerprint: str = facts["tokenizer_fingerprint"]
        self.source: dict[str, Any] = facts["source"]
        lengths = [entry.num_bytes for entry in self.files]
        full, last = self.chunk_size * self.dtype.itemsize, lengths[-1:]
        num_bytes = self._num_tokens * self.dtype.itemsize
        if sum(lengths) != num_bytes or set(lengths[:-1]) - {full} or not 0 < last[0] <= full:
            raise UserError("the lengths of its chunks do not match its number of tokens")

    def _damaged(self, error: Exception | str) -> UserError:
        return UserError(
            f"token store: {str(self.folder)!r} is damaged: {error}; delete the folder and encode "
            "the text again"
        )

    @classmethod
    def save_as_memmap(
        cls,
        texts: Iterable[str],
        tokenizer: Encoder,
        folder: str | Path,
        chunk_size: int = 500_000,
        options: StoreOptions = DEFAULT_OPTIONS,
    ) -> "MemmapManager":
        """Encodes the joined texts into a store, with one chunk in memory at a time.

        The folder gets its name, or replaces an older store, only when it is complete and was read
        back. The caller must keep other writers away from it (storage/lock.py).

        Raises: UserError when the texts are empty.
        """
        folder = Path(folder)
        dtype = id_dtype(tokenizer.vocab_size)
        key = options.text_key and [
            FORMAT_VERSION,
            options.text_key,
            tokenizer.fingerprint,
            chunk_size,
        ]
        writing = temporary_name(folder) if key is None else folder.with_name(folder.name + WRITING)
        journal = Journal(writing, key)
        if not journal.entries:
            shutil.rmtree(writing, ignore_errors=True)
            writing.mkdir(parents=True)
        try:
            end = write_chunks(texts, tokenizer, writing, chunk_size, journal, options.on_tokens)
            if not end.num_tokens:
                raise UserError("token store: got an empty text, need at least one token")
            facts = {
                "format_version": FORMAT_VERSION,
                "dtype": dtype.str,
                "num_tokens": end.num_tokens,
                "chunk_size": chunk_size,
                "vocab_size": tokenizer.vocab_size,
                "tokenizer_fingerprint": tokenizer.fingerprint,
                "text_bytes": end.num_bytes,
                "source": options.describe(),
            }
            cls._complete(writing, journal.entries, facts)
            (writing / JOURNAL).unlink(missing_ok=True)
            replace_directory(writing, folder, options.replace)
        except BaseException as error:
            if isinstance(error, OSError) and error.filename is None:
                error.filename = str(writing)
            if key is None or not journal.entries:
                shutil.rmtree(writing, ignore_errors=True)
            raise
        return cls(folder)

    @classmethod
    def _complete(cls, writing: Path, files: list[FileEntry], facts: dict[str, Any]) -> None:
        """Writes the manifest, and reads all of the store back."""
        write_manifest(writing, files, facts)
        store = cls(writing)
        store.verify()
        store._remember_verified()

    @classmethod
    def join(
        cls,
        parts: Sequence["MemmapManager"],
        folder: str | Path,
        source: dict[str, Any],
        replace: bool = False,
    ) -> "MemmapManager":
        """The store of a text from those of its parts, in order: the same files as of one encoding.

        source  the description of the whole text
        """
        folder = Path(folder)
        facts = {**parts[0].manifest, "source": source}
        for name in ("num_tokens", "text_bytes"):
            facts[name] = sum(part.manifest[name] for part in parts)
        size, writing = facts["chunk_size"], temporary_name(folder)
        ids = (
            part.load_by_range(start, min(start + size, len(part)))
            for part in parts
            for start in range(0, len(part), size)
        )
        writing.mkdir(parents=True)
        try:
            files = list(write_ids(ids, writing, size, parts[0].dtype))
            cls._complete(writing, files, facts)
            replace_directory(writing, folder, replace)
        except BaseException:
            shutil.rmtree(writing, ignore_errors=True)
            raise
        return cls(folder)

    def __len__(self) -> int:
        return self._num_tokens

    def load_by_range(self, start: int, end: int) -> np.ndarray:
        """The ids [start, end) as one array, across chunk borders.

        Raises: UserError for a range outside the store, or a chunk file that is too short.
        """
        if not 0 <= start <= end <= len(self):
            raise ValueError(
                f"load_by_range: got [{start}, {end}), need a range inside [0, {len(self)})"
            )
        ids = np.empty(end - start, self.dtype)
        position = start
        while position < end:
            chunk, offset = divmod(position, self.chunk_size)
            count = min(end - position, self.chunk_size - offset)
            ids[position - start : position - start + count] = self._read(chunk, offset, count)
            position += count
        return ids

    def verify(self) -> None:
        """Reads the whole store and compares it with its checksums.

        Raises: UserError naming the first chunk file that has changed since it was written, or
        that holds an id outside the vocabulary.
        """
        for number, entry in enumerate(self.files):
            try:
                check_file(self.folder, entry, completely=True)
                highest = int(self._read(number, 0, entry.num_bytes // self.dtype.itemsize).max())
                if highest >= self.manifest["vocab_size"]:
                    raise UserError(
                        f"{str(self.folder / entry.name)!r} holds the id {highest}, and the "
                        f"vocabulary has {self.manifest['vocab_size']}"
                    )
            except (ValueError, OSError) as error:
                raise self._damaged(error) from None

    def verify_once(self) -> None:
        """`verify`, unless the store was verified since its files last changed.

        A file in the folder records the state of each verified chunk file.
        Raises: as `verify`.
        """
        states = self._states()
        try:
            if json.loads((self.folder / VERIFIED).read_text(encoding="utf-8")) == states:
                return
        except (OSError, ValueError, RecursionError):
            pass
        began_ns = time.time_ns()
        self.verify()
        newest_ns = max(max(state[1:3]) for state in states)
        if newest_ns < began_ns - _SETTLED_NS and self._states() == states:
            self._remember_verified()

    def _states(self) -> list[list[int]]:
        return [file_state(os.stat(path)) for path in self._paths]

    def _remember_verified(self) -> None:
        with suppress(OSError):  # a read-only folder
            atomic_write(self.folder / VERIFIED, json.dumps(self._states()).encode("utf-8"))

    def _read(self, chunk: int, offset: int, count: int) -> np.ndarray:
        path, num_bytes = self._paths[chunk], count * self.dtype.itemsize
        try:
            number = os.open(path, _READ_FLAGS)
            try:
                if _identity(os.fstat(number)) != self._identities[chunk]:
                    raise UserError("it was replaced while in use")
                data = _read_at(number, num_bytes, offset * self.dtype.itemsize)
            finally:
                os.close(number)
            if len(data) != num_bytes:
                raise UserError("it is too short")
        except (OSError, ValueError) as error:
            raise self._damaged(f"cannot read {path!r} ({error})") from None
        return np.frombuffer(data, self.dtype)


_READ_FLAGS = os.O_RDONLY | getattr(os, "O_BINARY", 0)


def _read_at(number: int, num_bytes: int, offset: int) -> bytes:
    """The bytes at `offset` of an open file; fewer at its end."""
    if hasattr(os, "pread") and num_bytes < 1 << 30:
        return os.pread(number, num_bytes, offset)
    os.lseek(number, offset, os.SEEK_SET)
    parts = []
    while num_bytes and (part := os.read(number, min(num_bytes, 1 << 30))):
        parts.append(part)
        num_bytes -= len(part)
    return b"".join(parts)


def _identity(found: os.stat_result) -> tuple[int, int, int]:
    """Values that differ for a file that replaces this one."""
    return found.st_size, found.st_mtime_ns, found.st_ino


class TokenRange:
    """The tokens [start, end) of a store, as if they were a store of their own."""

    def __init__(self, tokens: Tokens, start: int, end: int):
        if not 0 <= start <= end <= len(tokens):
            raise ValueError(f"TokenRange: got [{start}, {end}), need inside [0, {len(tokens)})")
        self._tokens, self._start, self._end = tokens, start, end

    def __len__(self) -> int:
        return self._end - self._start

    def load_by_range(self, start: int, end: int) -> np.ndarray:
        if not 0 <= start <= end <= len(self):
            raise ValueError(f"load_by_range: got [{start}, {end}), need inside [0, {len(self)})")
        return self._tokens.load_by_range(self._start + start, self._start + end)


class ArrayTokens:
    """Token ids that are in memory already: a 1-D array with the interface of a store."""

    def __init__(self, ids: np.ndarray):
        self._ids = ids

    def __len__(self) -> int:
        return len(self._ids)

    def load_by_range(self, start: int, end: int) -> np.ndarray:
        return self._ids[start:end]
