"""The text of a corpus as a stream of strings, from files of several kinds or a pipe."""

import hashlib
import io
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from cs_lm.errors import UserError
from cs_lm.tokenizer.corpus_files import (
    PARQUET,
    STANDARD_INPUT,
    TEXT,
    PathOrPaths,
    Piece,
    RawReader,
    begin_of,
    decoded,
    find_files,
    is_pipe,
    kind_of,
    texts_of_parquet,
    unpacked,
)
from cs_lm.tokenizer.json_texts import texts_of_records

BLOCK_BYTES = 1 << 20
TEXT_FIELD = "text"
# For a longer text, several processes are worth their start.
LARGE_BYTES = 16 << 20

# arguments: phase, amount done, total (None: unknown), remark
Progress = Callable[[str, int, int | None, str], None]


class TextSource:
    """Files, or standard input ("-"), read as one text.

    paths             files, folders and patterns, as `find_files` takes them
    encoding_errors   "strict" stops at the first byte that is not UTF-8,
                      "replace" puts U+FFFD in its place
    separator         text between two documents: files, or records in them
    text_field        name of the field with a record's text
    flag              what names the paths, for messages
    bytes_read, total_bytes  progress of reading; the total of a pipe is None
    Raises: MissingError for a missing file, UserError for an empty one.
    """

    def __init__(
        self,
        paths: PathOrPaths,
        encoding_errors: str = "strict",
        block_bytes: int = BLOCK_BYTES,
        separator: str = "",
        text_field: str = TEXT_FIELD,
        flag: str = "corpus",
    ):
        self.paths = find_files(paths, flag)
        self._encoding_errors, self._block_bytes = encoding_errors, block_bytes
        self._separator, self._text_field = separator, text_field
        self._digests: list[str] = []
        self._kinds: list[str] = []
        self.bytes_read = self._bytes_before = 0
        sizes = [None if is_pipe(path) else os.path.getsize(path) for path in self.paths]
        self.total_bytes = None if None in sizes else sum(sizes)

    def key(self) -> list | None:
        """A value that identifies the text without reading it; None for a pipe."""
        if self.total_bytes is None:
            return None
        found = [os.stat(path) for path in self.paths]
        files = [[one.st_size, one.st_mtime_ns] for one in found]
        return [files, self._encoding_errors, self._separator, self._text_field]

    def num_workers(self, asked: int | None) -> int:
        """The number asked for; by default all cores for a large text or a pipe, else 1."""
        if asked is not None:
            return asked
        is_large = self.total_bytes is None or self.total_bytes > LARGE_BYTES
        return (os.cpu_count() or 1) if is_large else 1

    @property
    def position(self) -> str:
        """Which of several files is being read; an empty text for a single file."""
        at, count = min(len(self._digests) + 1, len(self.paths)), len(self.paths)
        return f"file {at:,} of {count:,}, " if count > 1 else ""

    def read(self) -> Iterator[str]:
        """The text in blocks, exactly as stored: no newline is translated.

        Raises: UserError for bytes that are not UTF-8, records without a text, or an empty corpus.
        Cost: one block or record in memory, whatever the length of the text.
        """
        self._digests, self._kinds, self.bytes_read = [], [], 0
        is_first = True
        for path in self.paths:
            self._bytes_before = self.bytes_read
            for text, begins in self._pieces(path):
                if begins and self._separator and not is_first:
                    yield self._separator
                is_first = False
                yield text
        if is_first:
            shown = "the pipe" if self.total_bytes is None else "the files"
            raise UserError(f"corpus: got nothing from {shown}; need UTF-8 text")

    def description(self) -> dict[str, Any]:
        """Lengths and hashes of the text, after it has been read; no file names."""
        return self._described(self.bytes_read)

    def describe(self, sha256_of: Callable[[Path], str] | None = None) -> dict[str, Any]:
        """`description` without decoding: detects the kind of each file; `sha256_of` hashes it."""
        self._digests, self._kinds = [], []
        for path in self.paths:
            with opened(path) as file:
                content = unpacked(RawReader(file, len), repr(str(path)))
                self._kinds.append(kind_of(content, path)[0])
            self._digests.append((sha256_of or sha256_of_file)(Path(path)))
        return self._described(self.total_bytes)

    def settings(self) -> dict[str, Any]:
        """How the text is read, and the lengths of its files."""
        sizes = [os.path.getsize(path) for path in self.paths]
        how = [self._encoding_errors, self._separator, self._text_field]
        return {"sizes": sizes, "read": how}

    def _described(self, num_bytes: int | None) -> dict[str, Any]:
        found = {"bytes": num_bytes, "encoding_errors": self._encoding_errors}
        if len(self.paths) == 1 and self._kinds == [TEXT]:
            return {**found, "sha256": self._digests[0]}
        each = "".join(f"{one} {kind}\n" for one, kind in zip(self._digests, self._kinds))
        together = hashlib.sha256(each.encode("ascii")).hexdigest()
        return {
            **found,
            "sha256": together,
            "files": len(self.paths),
            "text_field": self._text_field,
            "document_separator": self._separator,
        }

    def _pieces(self, path: str | Path) -> Iterator[Piece]:
        shown = "standard input" if path == STANDARD_INPUT else repr(str(path))
        digest = hashlib.sha256()

        def note(block: memoryview) -> None:
            digest.update(block)
            self.bytes_read += len(block)

        with opened(path) as file:
            raw = RawReader(file, note)
            kind, content = kind_of(unpacked(raw, shown), path)
            if kind == PARQUET:
                yield from self._pieces_of_parquet(path)
                self._digests.append(sha256_of_file(Path(path)))
            else:
                parts = decoded(content, shown, self._encoding_errors, self._block_bytes)
                if kind == TEXT:
                    yield from map(Piece, parts, _first_alone())
                else:
                    for text in texts_of_records(parts, shown, self._text_field):
                        if text:
                            yield Piece(text, True)
                while raw.read(BLOCK_BYTES):  # hash the bytes after the compressed data, too
                    pass
                self._digests.append(digest.hexdigest())
        self._kinds.append(kind)

    def _pieces_of_parquet(self, path: str | Path) -> Iterator[Piece]:
        if is_pipe(path):
            raise UserError("corpus: Parquet cannot be read from a pipe; name the file")
        size = os.path.getsize(path)

        def report(part: float) -> None:
            self.bytes_read = self._bytes_before + int(part * size)

        for text in texts_of_parquet(path, self._text_field, report):
            if text:
                yield Piece(text, True)
        report(1.0)


class TextPart(TextSource):
    """Part `index` of `count` equal parts of the corpus, cut where encoding does not notice it.

    The parts, one after the other, are the text of `TextSource`; each reads little more than
    itself. Compressed files and files of records are not cut: they belong to one part each.
    Raises: as `TextSource`; UserError for a pipe.
    """

    def __init__(
        self,
        source: TextSource,
        index: int,
        count: int,
        first_border: Callable[[Iterator[str]], int],
    ):
        """first_border  where a text may be cut: `SpecialTokenSplitter.first_border`"""
        if source.total_bytes is None:
            raise UserError("corpus: a pipe cannot be read in parts; name a file")
        vars(self).update(vars(source))
        self._sizes = [os.path.getsize(path) for path in self.paths]
        self._index, self._count, self._first_border = index, count, first_border
        self._can_seek = [self._is_plain(path) for path in self.paths]
        self.total_bytes = sum(self._sizes) // count

    def _is_plain(self, path: str | Path) -> bool:
        with opened(path) as file:
            begin = file.read(8)
            file.seek(0)
            content = unpacked(RawReader(file, len), repr(str(path)))
            same, content = begin_of(content, 8)
            return same == begin and kind_of(content, path)[0] == TEXT

    def key(self) -> list | None:
        return [super().key(), self._index, self._count]

    def description(self) -> dict[str, Any]:
        """What the part is a part of, and the hash of its bytes, after it has been read."""
        return self._described_part(self._own_digests)

    def describe(self, sha256_of: Callable[[Path], str] | None = None) -> dict[str, Any]:
        """`description` without decoding."""
        digests = []
        for number, first, until in self._ranges():
            with opened(self.paths[number]) as file:
                file.seek(first)
                digest, left = hashlib.sha256(), until - first
                while left and (block := file.read(min(left, BLOCK_BYTES))):
                    digest.update(block)
                    left -= len(block)
                digests.append(digest.hexdigest())
        return self._described_part(digests)

    def _described_part(self, digests: Sequence[str]) -> dict[str, Any]:
        together = hashlib.sha256("".join(digests).encode("ascii")).hexdigest()
        part = [self._index, self._count]
        return {"part": part, "sha256": together, "of": self.settings()}

    def is_empty(self) -> bool:
        """Whether a part has no text: a file that is not cut belongs to another one."""
        return not any(self.read())

    def read(self) -> Iterator[str]:
        self._digests, self._kinds, self.bytes_read = [], [], 0
        begin, end = self._place(self._index), self._place(self._index + 1)
        first = self._first_border(self._texts(begin, None)) if self._index else 0
        is_last = self._index + 1 == self._count
        more = 0 if is_last else self._first_border(self._texts(end, None))
        yield from _without(self._own_texts(), self._texts(end, None), first, more)

    def _own_texts(self) -> Iterator[str]:
        self._digests = []
        yield from self._texts(self._place(self._index), self._place(self._index + 1))
        self._own_digests = self._digests.copy()

    def _ranges(self) -> Iterator[tuple[int, int, int]]:
        """What the part has of each file: its number, and the offsets of the begin and the end."""
        return self._ranges_between(self._place(self._index), self._place(self._index + 1))

    def _ranges_between(
        self, begin: tuple[int, int], end: tuple[int, int] | None
    ) -> Iterator[tuple[int, int, int]]:
        last, stop = end or (len(self.paths), 0)
        for number in range(begin[0], min(last + 1, len(self.paths))):
            first = begin[1] if number == begin[0] else 0
            until = stop if number == last else self._sizes[number]
            if first < until:
                yield number, first, until

    def _place(self, index: int) -> tuple[int, int]:
        """Number of a file and offset in it at which part `index` begins, roughly."""
        offset = sum(self._sizes) * index // self._count
        for number, size in enumerate(self._sizes):
            if offset < size:
                if offset and not self._can_seek[number]:
                    return number + 1, 0
                return number, self._character_start(number, offset)
            offset -= size
        return len(self._sizes), 0

    def _character_start(self, number: int, offset: int) -> int:
        with opened(self.paths[number]) as file:
            file.seek(offset)
            begin = file.read(4)
        inside = next((n for n, byte in enumerate(begin) if byte & 0xC0 != 0x80), len(begin))
        return offset + inside

    def _texts(self, begin: tuple[int, int], end: tuple[int, int] | None) -> Iterator[str]:
        """The text from one place to another one, with the separators of the files in it."""
        for number, first, until in self._ranges_between(begin, end):
            has_text_before = any(self._sizes[:number])
            for text, begins in self._pieces_between(number, first, until):
                if begins and has_text_before and self._separator:
                    yield self._separator
                has_text_before = True
                yield text

    def _pieces_between(self, number: int, first: int, until: int) -> Iterator[Piece]:
        path = self.paths[number]
        if not self._can_seek[number]:
            yield from self._pieces(path)
            return
        digest = hashlib.sha256()

        def note(block: memoryview) -> None:
            digest.update(block)
            self.bytes_read += len(block)

        with opened(path) as file:
            file.seek(first)
            raw = io.BufferedReader(_Limited(RawReader(file, note), until - first))
            parts = decoded(raw, repr(str(path)), self._encoding_errors, self._block_bytes)
            begins = first == 0
            for text in parts:
                yield Piece(text, begins)
                begins = False
        self._digests.append(digest.hexdigest())


class _Limited(io.RawIOBase):
    """The first bytes of another reader."""

    def __init__(self, raw: RawReader, num_bytes: int):
        self._raw, self._left = raw, num_bytes

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        count = self._raw.readinto(memoryview(buffer)[: self._left])
        self._left -= count
        return count


def _without(
    texts: Iterator[str], following: Iterator[str], first: int, more: int
) -> Iterator[str]:
    """The texts without their first characters, and the first ones of the text that follows."""

    def joined() -> Iterator[str]:
        yield from texts
        left = more
        while left and (text := next(following, "")):
            yield text[:left]
            left = max(0, left - len(text))

    for text in joined():
        if first < len(text):
            yield text[first:]
        first = max(0, first - len(text))


def _first_alone() -> Iterator[bool]:
    yield True
    while True:
        yield False


@contextmanager
def opened(path: str | Path) -> Iterator[BinaryIO]:
    if path == STANDARD_INPUT:
        yield sys.stdin.buffer
        return
    with open(path, "rb", buffering=0) as file:
        yield file


def sha256_of_file(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def separator_for(asked: str | None, special_tokens: Sequence[str]) -> str:
    """The text between two documents: by default the first special token, or an empty line."""
    if asked is not None:
        return asked
    return special_tokens[0] if special_tokens else "\n\n"
