"""Token ids on disk: written while encoding, read by range, never held in memory as a whole."""

import hashlib
import json
import mmap
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from cs_lm.whole_file import put_folder

MANIFEST = "manifest.json"
FORMAT_VERSION = 1


class Encoder(Protocol):
    """What a store needs of a tokenizer."""

    vocab_size: int
    fingerprint: str

    def encode_blocks(self, parts: Iterable[str]) -> Iterator[np.ndarray]: ...


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
    fingerprint, the text's length in bytes, its source, and a SHA-256 for each chunk.

    Each read maps its file for as long as it copies: a pass over a store larger than memory
    leaves no pages behind in the process.
    """

    def __init__(self, folder: str | Path):
        """Raises: FileNotFoundError where there is no store, ValueError for a damaged one."""
        self.folder = Path(folder)
        path = self.folder / MANIFEST
        if not path.is_file():
            raise FileNotFoundError(
                f"token store: {str(self.folder)!r} holds no {MANIFEST}; encode a text there first"
            )
        self._identity = _identity(path)
        try:
            self.manifest: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            self.dtype = np.dtype(self.manifest["dtype"])
            self._num_tokens = int(self.manifest["num_tokens"])
            self.chunk_size = int(self.manifest["chunk_size"])
            self.fingerprint = self.manifest["tokenizer_fingerprint"]
            self._chunks = [(c["file"], c["sha256"]) for c in self.manifest["chunks"]]
            self.source: dict[str, Any] = self.manifest["source"]
            if self.manifest["format_version"] != FORMAT_VERSION:
                raise ValueError(f"format {self.manifest['format_version']}")
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"token store: cannot read {str(path)!r} ({error!r}); delete the folder and encode "
                "the text again"
            ) from None

    @classmethod
    def save_as_memmap(
        cls,
        texts: Iterable[str],
        tokenizer: Encoder,
        folder: str | Path,
        chunk_size: int = 500_000,
        describe: Callable[[], dict[str, Any]] = dict,
        progress: Callable[[int], None] | None = None,
    ) -> "MemmapManager":
        """Encodes the joined texts into a store; memory holds one chunk, however long they are.

        The folder appears, or takes the place of an older store, only when it is complete.

        describe  asked at the end what the text was, for the manifest
        progress  called with the number of tokens so far
        Raises: ValueError when the texts are empty.
        """
        folder = Path(folder)
        writing = folder.with_name(folder.name + ".writing")
        shutil.rmtree(writing, ignore_errors=True)
        writing.mkdir(parents=True)
        try:
            manifest = _write_chunks(texts, tokenizer, writing, chunk_size, progress)
            manifest["source"] = describe()
            with open(writing / MANIFEST, "w", encoding="utf-8") as file:
                json.dump(manifest, file, indent=1)
                file.flush()
                os.fsync(file.fileno())
            put_folder(writing, folder)
        except BaseException:
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
        """Raises: ValueError naming the first chunk file that is not what was written."""
        for name, expected in self._chunks:
            with open(self.folder / name, "rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != expected:
                    raise ValueError(
                        f"token store: {str(self.folder / name)!r} has changed since it was "
                        "written; delete the folder and encode the text again"
                    )

    def _read(self, chunk: int, offset: int, count: int) -> np.ndarray:
        path = self.folder / self._chunks[chunk][0]
        if _identity(self.folder / MANIFEST) != self._identity:
            raise ValueError(
                f"token store: {str(self.folder)!r} was written anew while in use (a second run on "
                "this text, with other settings?); give each its own --corpus_size"
            )
        try:
            mapped = np.memmap(path, self.dtype, mode="r", offset=offset * self.dtype.itemsize,
                               shape=(count,))  # fmt: skip
        except (OSError, ValueError) as error:
            raise ValueError(
                f"token store: cannot read {str(path)!r} ({error}); delete the folder and encode "
                "the text again"
            ) from None
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


def _write_chunks(texts, tokenizer, folder: Path, chunk_size: int, progress) -> dict[str, Any]:
    dtype = id_dtype(tokenizer.vocab_size)
    text_bytes = 0

    def counted() -> Iterator[str]:
        nonlocal text_bytes
        for text in texts:
            text_bytes += len(text.encode("utf-8"))
            yield text

    chunks: list[dict[str, Any]] = []
    num_tokens = 0

    def reported(blocks: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
        so_far = 0
        for block in blocks:
            yield block
            so_far += len(block)
            if progress:
                progress(so_far)

    for ids in _regroup(reported(tokenizer.encode_blocks(counted())), chunk_size, dtype):
        data = ids.tobytes()
        name = f"chunk_{len(chunks):05d}.bin"
        with open(folder / name, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        chunks.append({"file": name, "sha256": hashlib.sha256(data).hexdigest()})
        num_tokens += len(ids)
    if not num_tokens:
        raise ValueError("token store: got an empty text, need at least one token")
    return {
        "format_version": FORMAT_VERSION,
        "dtype": dtype.str,
        "num_tokens": num_tokens,
        "chunk_size": chunk_size,
        "vocab_size": tokenizer.vocab_size,
        "tokenizer_fingerprint": tokenizer.fingerprint,
        "text_bytes": text_bytes,
        "chunks": chunks,
    }


def _regroup(blocks: Iterable[np.ndarray], size: int, dtype: np.dtype) -> Iterator[np.ndarray]:
    """The same ids in arrays of exactly `size`, the last one shorter."""
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
