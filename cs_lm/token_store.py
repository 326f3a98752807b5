"""Token ids on disk: written while encoding, read by range, never held in memory as a whole."""

import mmap
import os
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from cs_lm.manifest import MANIFEST, check_file, read_manifest, write_manifest
from cs_lm.store_writer import JOURNAL, Encoder, Journal, write_chunks
from cs_lm.whole_file import put_folder

FORMAT_VERSION = 2


class Tokens(Protocol):
    """A sequence of token ids of which ranges can be read."""

    def __len__(self) -> int: ...

    def load_by_range(self, start: int, end: int) -> np.ndarray: ...


def id_dtype(vocab_size: int) -> np.dtype:
    """uint16 for up to 65,536 ids, else uint32; little-endian on every machine."""
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")


class MemmapManager:
    """The token store in one folder: files of `chunk_size` ids each, and a manifest.

    The manifest names dtype, number of tokens, chunk size, vocabulary size, the tokenizer's
    fingerprint, the text's length in bytes, its source, and for each chunk its length and SHA-256.

    Each read maps its file for as long as it copies: a pass over a store larger than memory
    leaves no pages behind in the process.
    """

    def __init__(self, folder: str | Path):
        """Looks at the length of every chunk; `verify` reads them.

        Raises: FileNotFoundError where there is no store, ValueError for a damaged one.
        """
        self.folder = Path(folder)
        path = self.folder / MANIFEST
        if not path.is_file():
            raise FileNotFoundError(
                f"token store: {str(self.folder)!r} holds no {MANIFEST}; encode a text there first"
            )
        self._identity = _identity(path)
        try:
            self.files, self.manifest = read_manifest(self.folder)
            if self.manifest.get("format_version") != FORMAT_VERSION:
                raise ValueError(f"{str(path)!r} has format {self.manifest.get('format_version')}")
            self._check_facts()
            for entry in self.files:
                check_file(self.folder, entry, completely=False)
        except (ValueError, KeyError, TypeError) as error:
            raise self._damaged(error) from None

    def _check_facts(self) -> None:
        facts = self.manifest
        for name, kind in (("num_tokens", int), ("chunk_size", int), ("vocab_size", int),
                           ("text_bytes", int), ("tokenizer_fingerprint", str),
                           ("source", dict)):  # fmt: skip
            if type(facts[name]) is not kind or (kind is int and facts[name] < 1):
                raise ValueError(f"its {name} is {facts[name]!r}")
        self.dtype = {"<u2": np.dtype("<u2"), "<u4": np.dtype("<u4")}[facts["dtype"]]
        self._num_tokens, self.chunk_size = facts["num_tokens"], facts["chunk_size"]
        self.fingerprint: str = facts["tokenizer_fingerprint"]
        self.source: dict[str, Any] = facts["source"]
        lengths = [entry.num_bytes for entry in self.files]
        full, last = self.chunk_size * self.dtype.itemsize, lengths[-1:]
        num_bytes = self._num_tokens * self.dtype.itemsize
        if sum(lengths) != num_bytes or set(lengths[:-1]) - {full} or not 0 < last[0] <= full:
            raise ValueError("its chunks have other lengths than its number of tokens asks for")

    def _damaged(self, error: Exception | str) -> ValueError:
        return ValueError(
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
        describe: Callable[[], dict[str, Any]] = dict,
        progress: Callable[[int], None] | None = None,
        text_key: Any = None,
    ) -> "MemmapManager":
        """Encodes the joined texts into a store; memory holds one chunk, however long they are.

        The folder appears, or takes the place of an older store, only when it is complete.

        describe  asked at the end what the text was, for the manifest
        progress  called with the number of tokens so far
        text_key  what tells this text from others, as JSON: an attempt that was ended, even by
                  SIGKILL, is then gone on with by the next one that is the same in all; None: it
                  leaves nothing behind
        Raises: ValueError when the texts are empty.
        """
        folder = Path(folder)
        writing = folder.with_name(folder.name + ".writing")
        dtype = id_dtype(tokenizer.vocab_size)
        key = text_key and [FORMAT_VERSION, text_key, tokenizer.fingerprint, chunk_size]
        journal = Journal(writing, key)
        if not journal.entries:
            shutil.rmtree(writing, ignore_errors=True)
            writing.mkdir(parents=True)
        try:
            end = write_chunks(texts, tokenizer, writing, chunk_size, dtype, journal, progress)
            if not end.num_tokens:
                raise ValueError("token store: got an empty text, need at least one token")
            facts = {
                "format_version": FORMAT_VERSION, "dtype": dtype.str,
                "num_tokens": end.num_tokens, "chunk_size": chunk_size,
                "vocab_size": tokenizer.vocab_size,
                "tokenizer_fingerprint": tokenizer.fingerprint, "text_bytes": end.num_bytes,
                "source": describe(),
            }  # fmt: skip
            write_manifest(writing, journal.entries, facts)
            put_folder(writing, folder)
            (folder / JOURNAL).unlink(missing_ok=True)
        except BaseException as error:
            if isinstance(error, OSError) and error.filename is None:
                error.filename = str(writing)
            if key is None or not journal.entries:
                shutil.rmtree(writing, ignore_errors=True)
            raise
        return cls(folder)

    def __len__(self) -> int:
        return self._num_tokens

    def load_by_range(self, start: int, end: int) -> np.ndarray:
        """The ids [start, end) as one array, across chunk borders.

        Raises: ValueError for a range outside the store, or a chunk file that is too short.
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
        """Reads all of it.

        Raises: ValueError naming the first chunk file that is not what was written, or that holds
        an id beyond the vocabulary.
        """
        for number, entry in enumerate(self.files):
            try:
                check_file(self.folder, entry, completely=True)
                highest = int(self._read(number, 0, entry.num_bytes // self.dtype.itemsize).max())
                if highest >= self.manifest["vocab_size"]:
                    raise ValueError(
                        f"{str(self.folder / entry.name)!r} holds the id {highest}, and the "
                        f"vocabulary has {self.manifest['vocab_size']}"
                    )
            except (ValueError, OSError) as error:
                raise self._damaged(error) from None

    def _read(self, chunk: int, offset: int, count: int) -> np.ndarray:
        path = self.folder / self.files[chunk].name
        if _identity(self.folder / MANIFEST) != self._identity:
            raise ValueError(
                f"token store: {str(self.folder)!r} was written anew while in use (a second run on "
                "this text, with other settings?); give each its own --corpus_size"
            )
        try:
            mapped = np.memmap(path, self.dtype, mode="r", offset=offset * self.dtype.itemsize,
                               shape=(count,))  # fmt: skip
        except (OSError, ValueError) as error:
            raise self._damaged(f"cannot read {str(path)!r} ({error})") from None
        if hasattr(mmap, "MADV_RANDOM"):
            # a hundred times quicker than reading what lies around, which the system does otherwise
            mapped._mmap.madvise(mmap.MADV_RANDOM)
        return np.array(mapped)


def _identity(path: Path) -> tuple[int, int]:
    """Other for every file that takes the place of this one."""
    found = os.stat(path)
    return found.st_ino, found.st_mtime_ns


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
