"""Compiled tokenizers of other programs, which encode in place of ours where it has to be quick.

They get our vocabulary, and their ids are compared with ours on a part of the text.
"""

import importlib
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path

import numpy as np

from cs_lm.errors import Problem, UserError, missing_package
from cs_lm.tokenizer import BPETokenizer
from cs_lm.tokenizer.formats import write_tokenizer_json

_BLOCKS_AT_ONCE = 64
_CHECK_EVERY = 50  # blocks; the first one is checked, too

EncodeBatch = Callable[[Sequence[str]], list[np.ndarray]]


class CompiledEncoder:
    """Encodes with `engine`: "tokenizers" or "gigatoken". Both use all cores.

    Raises: UserError if its package is missing, or if it gives other ids than our tokenizer.
    """

    def __init__(self, tokenizer: BPETokenizer, engine: str):
        self._tokenizer, self._engine = tokenizer, engine
        self.vocab_size, self.fingerprint = tokenizer.vocab_size, tokenizer.fingerprint
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "tokenizer.json"
            write_tokenizer_json(tokenizer, path)
            try:
                self._encode = ENGINES[engine](path)
            except ImportError:
                raise UserError(missing_package(f"--engine {engine}", engine, "engines")) from None

    def safe_blocks(self, parts: Iterable[str]) -> Iterator[str]:
        return self._tokenizer.safe_blocks(parts)

    def encode_each(self, blocks: Iterable[str]) -> Iterator[np.ndarray]:
        blocks, number = iter(blocks), 0
        while batch := list(islice(blocks, _BLOCKS_AT_ONCE)):
            for text, ids in zip(batch, self._encode(batch), strict=True):
                if number % _CHECK_EVERY == 0:
                    self._check(text, ids)
                number += 1
                yield ids

    def _check(self, text: str, ids: np.ndarray) -> None:
        own = self._tokenizer.encode_block(text)
        if np.array_equal(own, ids):
            return
        same = int(np.argmin([*(own[: len(ids)] == ids[: len(own)]), False]))
        shown = self._tokenizer.decode(own[same : same + 8].tolist())
        what = f"{self._engine} gives other ids than our tokenizer from {shown!r} on"
        raise UserError(Problem("--engine", what, fix="leave it out"))


def _tokenizers(path: Path) -> EncodeBatch:
    theirs = importlib.import_module("tokenizers").Tokenizer.from_file(str(path))

    def encode(texts: Sequence[str]) -> list[np.ndarray]:
        found = theirs.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(one.ids, np.int32) for one in found]

    return encode


def _gigatoken(path: Path) -> EncodeBatch:
    theirs = importlib.import_module("gigatoken").Tokenizer(str(path))

    def encode(texts: Sequence[str]) -> list[np.ndarray]:
        return [np.asarray(one).astype(np.int32) for one in theirs.encode_batch(list(texts))]

    return encode


ENGINES: dict[str, Callable[[Path], EncodeBatch]] = {
    "tokenizers": _tokenizers,
    "gigatoken": _gigatoken,
}
