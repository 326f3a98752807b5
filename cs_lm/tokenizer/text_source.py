"""Text from files or a pipe as a stream of strings, with the byte offset where it is not UTF-8."""

import codecs
import hashlib
import io
import os
import select
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

BLOCK_BYTES = 1 << 20
STANDARD_INPUT = "-"
_LOOK_AGAIN_S = 0.2
# From this length on, several processes are worth their start.
LARGE_BYTES = 16 << 20

PathOrPaths = str | Path | Sequence[str | Path]
# phase, what is done of it, the total (None: unknown), a remark
Progress = Callable[[str, int, int | None, str], None]


class TextSource:
    """One or more UTF-8 files, or standard input ("-"), read as one text: as `cat` joins them.

    bytes_read, total_bytes  how far the reading has got; the total of a pipe is None
    encoding_errors          "strict" stops at the first byte that is not UTF-8,
                             "replace" puts U+FFFD in its place
    Raises: FileNotFoundError for a missing file, ValueError for an empty one.
    """

    def __init__(
        self, paths: PathOrPaths, encoding_errors: str = "strict", block_bytes: int = BLOCK_BYTES
    ):
        self.paths = [paths] if isinstance(paths, (str, Path)) else list(paths)
        self._encoding_errors, self._block_bytes = encoding_errors, block_bytes
        self._digest = hashlib.sha256()
        self.bytes_read = 0
        sizes = [self._checked_size(path) for path in self.paths]
        self.total_bytes = None if None in sizes else sum(sizes)

    def _checked_size(self, path: str | Path) -> int | None:
        if path == STANDARD_INPUT or Path(path).is_fifo():
            return None
        if not Path(path).is_file():
            raise FileNotFoundError(
                f"corpus: got {str(path)!r}, which is not a file; check the path given"
            )
        if Path(path).stat().st_size == 0:
            raise ValueError(f"corpus: {str(path)!r} is empty; need a UTF-8 text file")
        return Path(path).stat().st_size

    def key(self) -> list | None:
        """What tells the text from others without reading it; None for a pipe."""
        if self.total_bytes is None:
            return None
        found = [os.stat(path) for path in self.paths]
        files = [[one.st_size, one.st_mtime_ns] for one in found]
        return [files, self._encoding_errors]

    def num_workers(self, asked: int | None) -> int:
        """As many as asked; else all cores for a large text or a pipe."""
        if asked is not None:
            return asked
        is_large = self.total_bytes is None or self.total_bytes > LARGE_BYTES
        return (os.cpu_count() or 1) if is_large else 1

    def read(self) -> Iterator[str]:
        """The text in blocks, exactly as stored: no newline is translated.

        Raises: ValueError for bytes that are not UTF-8, or nothing at all from a pipe.
        Cost: one block in memory, however long the text.
        """
        for path in self.paths:
            if path == STANDARD_INPUT:
                yield from self._decoded(sys.stdin.buffer, "standard input")
            else:
                with open(path, "rb") as file:
                    yield from self._decoded(file, repr(str(path)))
        if self.bytes_read == 0:
            raise ValueError("corpus: got nothing from the pipe; need UTF-8 text")

    def description(self) -> dict[str, Any]:
        """What has been read, once it has: the text's length and hash, not the files' names."""
        return _description(self.bytes_read, self._digest.hexdigest(), self._encoding_errors)

    def _decoded(self, file: io.BufferedIOBase, shown: str) -> Iterator[str]:
        decoder = codecs.getincrementaldecoder("utf-8")(self._encoding_errors)
        bytes_of_file = 0
        while True:
            _wait_for_input(file)
            block = file.read1(self._block_bytes)
            held_back = len(decoder.getstate()[0])  # bytes of a character cut by the last block
            try:
                text = decoder.decode(block, final=not block)
            except UnicodeDecodeError as error:
                offset = bytes_of_file - held_back + error.start
                raise ValueError(
                    f"corpus: {shown} is not UTF-8 at byte offset {offset} "
                    f"(0x{error.object[error.start]:02x}); convert it to UTF-8, or pass "
                    "--encoding_errors replace to read such bytes as U+FFFD"
                ) from None
            bytes_of_file += len(block)
            self.bytes_read += len(block)
            self._digest.update(block)
            if text:
                yield text
            if not block:
                return


def _wait_for_input(file: io.BufferedIOBase) -> None:
    """Returns when a read would not block.

    A read that is under way hears of Ctrl-C only when more comes from the pipe, if the interrupt
    arrived between two of its system calls; between two looks, Python sees to it.
    """
    try:
        while os.name == "posix" and not select.select([file], [], [], _LOOK_AGAIN_S)[0]:
            pass
    except io.UnsupportedOperation:  # no file of the operating system: never blocks
        pass


def read_text(path: PathOrPaths, encoding_errors: str = "strict") -> Iterator[str]:
    """`TextSource.read` of a source that nothing else is asked of."""
    return TextSource(path, encoding_errors).read()


def describe_file(path: Path, encoding_errors: str) -> dict[str, Any]:
    """`TextSource.description` of a file, without decoding it."""
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return _description(path.stat().st_size, digest, encoding_errors)


def _description(num_bytes: int, sha256: str, encoding_errors: str) -> dict[str, Any]:
    return {"bytes": num_bytes, "sha256": sha256, "encoding_errors": encoding_errors}
