"""Files of a corpus: finds them, detects their format from their content, and reads them.

Plain text has one document per file. JSON lines, a JSON list and Parquet have one per record.
Each file may be compressed with gzip, bzip2, xz or zstd.
"""

import bz2
import codecs
import glob
import gzip
import io
import json
import lzma
import os
import re
import select
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from cs_lm.errors import MissingError, Problem, UserError
from cs_lm.tokenizer.json_texts import text_of_record

STANDARD_INPUT = "-"
SUFFIXES = (".txt", ".md", ".jsonl", ".json", ".parquet")
PACKED_SUFFIXES = (".gz", ".bz2", ".xz", ".zst")
TEXT, RECORDS, PARQUET = "text", "records", "parquet"

_BUFFER_BYTES = 1 << 20
_PEEKED_BYTES = 1 << 16
_LOOK_AGAIN_S = 0.2
_ROWS_AT_ONCE = 256
_MAGIC_BYTES = 6
_NOT_TEXT = {b"PK\x03\x04": "a zip archive", b"%PDF-": "a PDF", b"\x7fELF": "a program"}
_UNPACKING_ERRORS = (EOFError, zlib.error, lzma.LZMAError, OSError)
PathOrPaths = str | Path | Sequence[str | Path]


class Piece(NamedTuple):
    """A piece of text, and whether a document begins with it."""

    text: str
    begins: bool


def find_files(given: PathOrPaths, flag: str = "corpus") -> list[str | Path]:
    """The files that the given paths, folders and glob patterns stand for.

    A folder stands for the files below it whose names end in one of SUFFIXES, compressed or not.
    Names that begin with a dot and folders that runs have made are skipped. The given paths keep
    their order; the files of a folder or pattern are sorted by name.
    Raises: MissingError when there is no file, UserError for an empty file given alone.
    """
    given = [given] if isinstance(given, (str, Path)) else list(given)
    found: list[str | Path] = []
    for one in given:
        path = Path(one)
        if is_pipe(one) or path.is_file():
            found.append(one)
        elif path.is_dir():
            inside = list(_files_below(path))
            if not inside:
                ends = f"{', '.join(SUFFIXES)} (or that and {', '.join(PACKED_SUFFIXES)})"
                what = f"the folder {str(one)!r} has no file that ends in {ends}"
                raise MissingError(Problem(flag, what))
            found += sorted(inside, key=Path.as_posix)
        elif glob.has_magic(str(one)):
            names = sorted(n for n in glob.glob(str(one), recursive=True) if os.path.isfile(n))
            if not names:
                raise MissingError(Problem(flag, f"no file fits the pattern {str(one)!r}"))
            found += names
        else:
            what = f"got {str(one)!r}, which is not a file, folder or pattern"
            raise MissingError(Problem(flag, what, fix="check the path"))
    if len(found) == 1 and not is_pipe(found[0]) and os.path.getsize(found[0]) == 0:
        what = f"{str(found[0])!r} is empty"
        raise UserError(Problem(flag, what, fix="need a UTF-8 text file"))
    return found


def is_pipe(path: str | Path) -> bool:
    return path == STANDARD_INPUT or Path(path).is_fifo()


def _files_below(folder: Path) -> Iterator[Path]:
    for path, folders, names in os.walk(folder):
        folders[:] = [n for n in folders if not n.startswith(".") and not _is_ours(Path(path, n))]
        yield from (Path(path, name) for name in names if _is_of_corpus(name))


def _is_ours(folder: Path) -> bool:
    """Whether a run has made the folder: data/ with its locks, or the folder of a run."""
    return (folder / ".locks").is_dir() or (folder / "metrics.jsonl").is_file()


def _is_of_corpus(name: str) -> bool:
    return without_packing(name).endswith(SUFFIXES) and not name.startswith(".")


def without_packing(name: str) -> str:
    """A file's name without suffixes of compression."""
    for suffix in PACKED_SUFFIXES:
        name = name.removesuffix(suffix)
    return name


class RawReader(io.RawIOBase):
    """A file's raw bytes, not decompressed; `note` is called with each block that is read.

    It waits for a pipe with `select` and a timeout. A plain read would not react to Ctrl-C until
    more data arrives, if the signal comes between two of its system calls. Between two calls of
    `select`, Python handles the signal.
    """

    def __init__(self, file: BinaryIO, note: Callable[[memoryview], None]):
        self._file, self._note = file, note

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        self._wait()
        view = memoryview(buffer)
        if isinstance(self._file, io.RawIOBase):
            count = self._file.readinto(view) or 0
        else:
            block = self._file.read1(len(view))
            count = len(block)
            view[:count] = block
        self._note(view[:count])
        return count

    def _wait(self) -> None:
        try:
            while os.name == "posix" and not select.select([self._file], [], [], _LOOK_AGAIN_S)[0]:
                pass
        except (io.UnsupportedOperation, ValueError):  # not a file of the system: it never blocks
            pass


class _Joined(io.RawIOBase):
    """The bytes that were already read, then the rest of the file."""

    def __init__(self, begin: bytes, rest: io.BufferedReader):
        self._begin, self._rest = begin, rest

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        if not self._begin:
            return self._rest.readinto1(buffer)
        count = min(len(buffer), len(self._begin))
        memoryview(buffer)[:count] = self._begin[:count]
        self._begin = self._begin[count:]
        return count


def begin_of(file: io.BufferedReader, num_bytes: int) -> tuple[bytes, io.BufferedReader]:
    """The first `num_bytes` bytes, fewer in a short file, and a reader of the whole file.

    Why not `peek`: on a pipe it returns only the bytes that have arrived so far.
    """
    begin = file.read(num_bytes)
    return begin, io.BufferedReader(_Joined(begin, file), _BUFFER_BYTES)


def unpacked(raw: RawReader, shown: str) -> io.BufferedReader:
    """A reader of the file's content, decompressed if necessary.

    Raises: UserError for a zip archive, a PDF or a program, or if the package zstandard is missing.
    """
    magic, packed = begin_of(io.BufferedReader(raw, _BUFFER_BYTES), _MAGIC_BYTES)
    for begin, kind in _NOT_TEXT.items():
        if magic.startswith(begin):
            raise UserError(
                f"corpus: {shown} is {kind}; need text, or text in one of the formats "
                f"{', '.join(SUFFIXES)}"
            )
    if magic.startswith(b"\x1f\x8b"):
        return io.BufferedReader(gzip.GzipFile(fileobj=packed), _BUFFER_BYTES)
    if magic.startswith(b"BZh"):
        return io.BufferedReader(bz2.BZ2File(packed), _BUFFER_BYTES)
    if magic.startswith(b"\xfd7zXZ\x00"):
        return io.BufferedReader(lzma.LZMAFile(packed), _BUFFER_BYTES)
    if magic.startswith(b"\x28\xb5\x2f\xfd"):
        try:
            import zstandard
        except ImportError:
            raise UserError(
                f"corpus: {shown} is packed with zstd, which needs the package zstandard; install "
                "the extra with: pip install 'cs_lm[corpora]'"
            ) from None
        return io.BufferedReader(_ZstdReader(packed, zstandard), _BUFFER_BYTES)
    return packed


class _ZstdReader(io.RawIOBase):
    """Decompresses zstd frames one after the other.

    Why not the package's own reader: it accepts a truncated file as complete.
    Raises: EOFError for a truncated file.
    """

    def __init__(self, packed: io.BufferedReader, zstandard: Any):
        self._packed, self._new = packed, zstandard.ZstdDecompressor().decompressobj
        self._frame, self._ready, self._is_between = self._new(), b"", True
        self._error = zstandard.ZstdError

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        while not self._ready:
            data = self._packed.read1(_PEEKED_BYTES)
            if not data and not self._is_between:
                raise EOFError("it ends within a frame")
            if not data:
                return 0
            parts = []
            while data:
                try:
                    parts.append(self._frame.decompress(data))
                except self._error as error:
                    raise EOFError(str(error)) from None
                self._is_between, data = self._frame.eof, b""
                if self._frame.eof:
                    data, self._frame = self._frame.unused_data, self._new()
            self._ready = b"".join(parts)
        count = min(len(buffer), len(self._ready))
        memoryview(buffer)[:count] = self._ready[:count]
        self._ready = self._ready[count:]
        return count


def kind_of(content: io.BufferedReader, path: str | Path) -> tuple[str, io.BufferedReader]:
    """TEXT, RECORDS or PARQUET, and a reader of the whole content.

    The first bytes decide; for JSON, the suffix of the name, too.
    """
    try:
        begin, content = begin_of(content, _PEEKED_BYTES)
    except _UNPACKING_ERRORS as error:
        raise _cannot_be_unpacked(repr(str(path)), error) from None
    if begin.startswith(b"PAR1"):
        return PARQUET, content
    name = without_packing(str(path))
    begin = begin.removeprefix(codecs.BOM_UTF8).lstrip()
    if name.endswith((".jsonl", ".json", ".ndjson")) or re.match(rb"\[\s*\{\s*\"", begin):
        return RECORDS, content
    return RECORDS if _are_json_lines(begin) else TEXT, content


def _are_json_lines(begin: bytes) -> bool:
    """Whether the first two lines, or the known part of them, are JSON objects."""
    lines = [line for line in begin.split(b"\n") if line.strip()][:2]
    whole, cut = (lines, []) if len(begin) < _PEEKED_BYTES or len(lines) > 1 else ([], lines)
    if cut:
        return re.match(rb"\{\s*\"(?:[^\"\\]|\\.)*\"\s*:", cut[0]) is not None
    try:
        return bool(whole) and isinstance(json.loads(whole[0]), dict) and whole[-1][:1] == b"{"
    except ValueError:
        return False


def decoded(
    content: io.BufferedReader, shown: str, encoding_errors: str, block_bytes: int
) -> Iterator[str]:
    """Blocks of the text, decoded from UTF-8 exactly as stored: no newline is translated.

    Raises: UserError for bytes that are not UTF-8, with their offset, or a damaged packed file.
    """
    decoder = codecs.getincrementaldecoder("utf-8")(encoding_errors)
    num_before = 0
    while True:
        try:
            block = content.read1(block_bytes)
        except _UNPACKING_ERRORS as error:
            raise _cannot_be_unpacked(shown, error) from None
        held_back = len(decoder.getstate()[0])  # bytes of a character cut by the last block
        try:
            text = decoder.decode(block, final=not block)
        except UnicodeDecodeError as error:
            offset = num_before - held_back + error.start
            raise UserError(
                f"corpus: {shown} is not UTF-8 at byte offset {offset} "
                f"(0x{error.object[error.start]:02x}); convert it to UTF-8, or pass "
                "--encoding_errors replace to read such bytes as U+FFFD"
            ) from None
        num_before += len(block)
        if text:
            yield text
        if not block:
            return


def _cannot_be_unpacked(shown: str, error: Exception) -> Exception:
    if isinstance(error, OSError) and error.errno is not None:  # an error of the disk
        return error
    return UserError(f"corpus: {shown} cannot be decompressed ({error}); is the file complete?")


def texts_of_parquet(
    path: str | Path, text_field: str, report: Callable[[float], None]
) -> Iterator[str]:
    """The texts of one column; `report` is called with the fraction of rows read so far.

    Raises: UserError when the column or the package pyarrow is missing, or the file is damaged.
    """
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise UserError(
            f"corpus: {str(path)!r} is Parquet, which needs the package pyarrow; install the extra "
            "with: pip install 'cs_lm[corpora]'"
        ) from None
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            if text_field not in names:
                raise UserError(
                    f"it has no column {text_field!r}, but {', '.join(names)}; name "
                    "the column with --text_field"
                )
            num_rows, num_read = file.metadata.num_rows, 0
            for batch in file.iter_batches(_ROWS_AT_ONCE, columns=[text_field]):
                for text in batch.column(0).to_pylist():
                    if text is not None:
                        yield text_of_record(text, f"a row of {str(path)!r}", text_field)
                num_read += batch.num_rows
                report(num_read / num_rows)
    except (ValueError, OSError, pyarrow.ArrowException) as error:
        first_line = str(error).partition("\n")[0].removeprefix("corpus: ")
        raise UserError(f"corpus: {str(path)!r} cannot be read: {first_line}") from None
