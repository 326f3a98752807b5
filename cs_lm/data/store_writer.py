"""Writes the chunks of a token store; continues where an earlier attempt was interrupted."""

import json
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from cs_lm.storage.atomic import atomic_write
from cs_lm.storage.manifest import FileEntry, HashingFile, check_file

JOURNAL = "written.jsonl"


def id_dtype(vocab_size: int) -> np.dtype:
    """uint16 for up to 65,536 ids, else uint32; little-endian on every machine."""
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")


class Encoder(Protocol):
    """The part of a tokenizer that a store needs."""

    vocab_size: int
    fingerprint: str

    def safe_blocks(self, parts: Iterable[str]) -> Iterator[str]: ...

    def encode_each(self, blocks: Iterable[str]) -> Iterator[np.ndarray]: ...


class Position(NamedTuple):
    """The end of a block of the text; everything before it is encoded."""

    num_chars: int = 0
    num_bytes: int = 0
    num_tokens: int = 0


class Journal:
    """A file with one line for each chunk on the disk: the chunk, and a position in the text.

    A chunk may end inside a block. The position is the start of that block: an attempt that
    continues encodes the block again, and skips its tokens that are in the chunk.

    key  everything that tokens and chunks depend on; None: no file, because nothing identifies
         an earlier attempt
    """

    def __init__(self, folder: Path, key: dict[str, Any] | None):
        self._path, self._key = folder / JOURNAL, key
        self.entries: list[FileEntry] = []
        self.position = Position()
        if key is not None:
            self._read(folder)

    def add(self, entry: FileEntry, position: Position) -> None:
        self.entries.append(entry)
        if self._key is None:
            return
        is_new = not self._path.exists()
        with open(self._path, "a", encoding="utf-8") as file:
            if is_new:
                file.write(json.dumps(self._key) + "\n")
            file.write(json.dumps([entry, position]) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def _read(self, folder: Path) -> None:
        """Reads up to the first line that a crash left incomplete, or whose chunk has changed."""
        lines = self._path.read_bytes().splitlines() if self._path.is_file() else []
        kept = 0
        try:
            if not lines or json.loads(lines[0]) != json.loads(json.dumps(self._key)):
                return
            kept = 1
            for line in lines[1:]:
                entry, position = json.loads(line)
                entry = FileEntry(*entry)
                if entry.name != chunk_name(len(self.entries)):
                    break
                check_file(folder, entry, completely=True)
                self.position = Position(*position)
                self.entries.append(entry)
                kept += 1
        except (ValueError, TypeError):
            pass
        finally:
            if not kept:
                self._path.unlink(missing_ok=True)
            elif kept < len(lines):
                atomic_write(self._path, b"".join(line + b"\n" for line in lines[:kept]))


def chunk_name(number: int) -> str:
    return f"chunk_{number:05d}.bin"


def write_chunks(
    texts: Iterable[str],
    encoder: Encoder,
    folder: Path,
    chunk_size: int,
    journal: Journal,
    on_tokens: Callable[[int], None] | None = None,
) -> Position:
    """Writes the chunks that the journal does not have yet; returns the end of the text.

    on_tokens  called with the number of tokens so far
    """
    dtype = id_dtype(encoder.vocab_size)
    positions = _Positions(journal.position)
    num_written = sum(entry.num_bytes for entry in journal.entries) // dtype.itemsize
    blocks = encoder.safe_blocks(_after(texts, journal.position.num_chars))
    ids = positions.with_tokens(encoder.encode_each(positions.noted(blocks)), on_tokens)
    ids = _without_first(ids, num_written - journal.position.num_tokens)
    for entry in write_ids(ids, folder, chunk_size, dtype, len(journal.entries)):
        journal.add(entry, positions.before_current)
    return positions.current


def write_ids(
    ids: Iterable[np.ndarray], folder: Path, chunk_size: int, dtype: np.dtype, first: int = 0
) -> Iterator[FileEntry]:
    """Writes chunks of ids, from number `first` on; yields the entry of each."""
    for number, chunk in enumerate(_regroup(ids, chunk_size, dtype), first):
        name = chunk_name(number)
        with open(folder / name, "wb") as file:
            hashing = HashingFile(file)
            hashing.write(chunk.tobytes())
            hashing.flush()
            os.fsync(file.fileno())
        yield hashing.entry(name)


class _Positions:
    """The start and the end, in the text, of the block whose tokens came last.

    The encoder takes several blocks before it returns the tokens of the first.
    """

    def __init__(self, start: Position):
        self.before_current = self.current = start
        self._under_way: deque[tuple[int, int]] = deque()  # characters and bytes

    def noted(self, blocks: Iterable[str]) -> Iterator[str]:
        for block in blocks:
            self._under_way.append((len(block), len(block.encode("utf-8"))))
            yield block

    def with_tokens(
        self, encoded: Iterable[np.ndarray], on_tokens: Callable[[int], None] | None
    ) -> Iterator[np.ndarray]:
        for ids in encoded:
            num_chars, num_bytes = self._under_way.popleft()
            self.before_current, at = self.current, self.current
            self.current = Position(
                at.num_chars + num_chars, at.num_bytes + num_bytes, at.num_tokens + len(ids)
            )
            yield ids
            if on_tokens:
                on_tokens(self.current.num_tokens)


def _after(texts: Iterable[str], num_chars: int) -> Iterator[str]:
    """The text without its first characters."""
    for text in texts:
        if num_chars < len(text):
            yield text[num_chars:] if num_chars else text
        num_chars = max(0, num_chars - len(text))


def _without_first(blocks: Iterable[np.ndarray], count: int) -> Iterator[np.ndarray]:
    for block in blocks:
        yield block[count:]
        count = max(0, count - len(block))


def _regroup(blocks: Iterable[np.ndarray], size: int, dtype: np.dtype) -> Iterator[np.ndarray]:
    """The same ids in arrays of exactly `size`; the last one may be shorter."""
    held = np.empty(size, dtype)
    filled = 0
    for block in blocks:
        ids = np.asarray(block, dtype)
        while filled + len(ids) >= size:
            missing = size - filled
            held[filled:] = ids[:missing]
            yield held
            ids, filled = ids[missing:], 0
        held[filled : filled + len(ids)] = ids
        filled += len(ids)
    if filled:
        yield held[:filled]
