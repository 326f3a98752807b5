"""Text files as a stream of strings, with the byte offset named where a file is not UTF-8."""

import codecs
from collections.abc import Iterator
from pathlib import Path

BLOCK_BYTES = 1 << 20


def read_text(
    path: str | Path, encoding_errors: str = "strict", block_bytes: int = BLOCK_BYTES
) -> Iterator[str]:
    """The text of a UTF-8 file in blocks, exactly as stored: no newline is translated.

    encoding_errors  "strict" stops at the first byte that is not UTF-8,
                     "replace" puts U+FFFD in its place
    Raises: FileNotFoundError for a missing file, ValueError for an empty or non-UTF-8 one.
    Cost: one block of `block_bytes` in memory, however long the file.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"corpus: got {str(path)!r}, which is not a file; check the path given"
        )
    if path.stat().st_size == 0:
        raise ValueError(f"corpus: {str(path)!r} is empty; need a UTF-8 text file")
    decoder = codecs.getincrementaldecoder("utf-8")(encoding_errors)
    bytes_read = 0
    with open(path, "rb") as file:
        while True:
            block = file.read(block_bytes)
            held_back = len(decoder.getstate()[0])  # bytes of a character cut by the last block
            try:
                text = decoder.decode(block, final=not block)
            except UnicodeDecodeError as error:
                offset = bytes_read - held_back + error.start
                raise ValueError(
                    f"corpus: {str(path)!r} is not UTF-8 at byte offset {offset} "
                    f"(0x{error.object[error.start]:02x}); convert it to UTF-8, or pass "
                    "--encoding_errors replace to read such bytes as U+FFFD"
                ) from None
            bytes_read += len(block)
            if text:
                yield text
            if not block:
                return
