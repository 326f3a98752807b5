"""BPETokenizer: text to token ids and back, exactly, from GPT-2's two files."""

import codecs
import hashlib
import itertools
import sys
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from operator import itemgetter
from pathlib import Path
from typing import Literal

import numpy as np

from cs_lm.errors import UserError
from cs_lm.tokenizer import fast_bpe
from cs_lm.tokenizer.bpe import Pair
from cs_lm.tokenizer.gpt2_files import read_gpt2_files, write_gpt2_files
from cs_lm.tokenizer.long_words import encode_long_word
from cs_lm.tokenizer.merge_table import MergeTable
from cs_lm.tokenizer.pretokenizer import (
    SPLIT_PATTERN as GPT2_PATTERN,
)
from cs_lm.tokenizer.pretokenizer import (
    SpecialTokenSplitter,
    split_words,
    without_surrogates,
)
from cs_lm.tokenizer.word_encoder import BatchLimits, WordEncoder

BLOCK_CHARS = 1 << 20
# `encode_iterable` needs less than 1 MB: these limit the characters of a block, the size of the
# blocks that are encoded together, and the words that the arrays hold.
_STREAM_BLOCK_CHARS = 1 << 14
_STREAM_BYTES = 1 << 16
_STREAM_AT_ONCE = BatchLimits(words=1 << 12, new_words=1 << 9)
# Different words in the cache: 8 MB, allocated when the tokenizer is made.
MAX_WORDS = 1 << 17
# Texts up to this length are encoded without arrays, with a cache of so many words (13 MB).
SHORT_TEXT_CHARS = 1 << 10
MAX_SHORT_WORDS = 1 << 16
# From this length on, a word is encoded in windows (long_words.py).
LONG_WORD_BYTES = 1 << 9
_SHOWN_BYTES = 80
END_OF_TEXT = "<|endoftext|>"
Specials = Collection[str] | Literal["all"]
chain = itertools.chain.from_iterable
_IDS_AT_ONCE = 1 << 13  # in decoding: their tokens stay in the processor's cache


# Ids are indices of a list: a single huge id would use all memory.
MAX_VOCAB_SIZE = 1 << 24


class BPETokenizer:
    """Byte-level byte-pair encoding with GPT-2's split pattern.

    vocab           token id -> bytes
    merges          pairs of tokens, earliest learnt first
    special_tokens  never split, never merged with text; one that is missing from the vocabulary
                    is appended to it; where several fit at one place, the longest wins
    Threads may share a tokenizer.
    Raises: UserError for two ids with the same bytes, a token without bytes, an id outside
    [0, MAX_VOCAB_SIZE), a merge that is outside the vocabulary or occurs twice.
    """

    split_pattern = GPT2_PATTERN
    end_tokens: list[str]  # the special tokens that end a text; may be set

    def __init__(
        self,
        vocab: Mapping[int, bytes],
        merges: Sequence[Pair],
        special_tokens: Sequence[str] | None = None,
    ):
        self.vocab: dict[int, bytes] = dict(vocab)
        self.merges: list[Pair] = [(bytes(a), bytes(b)) for a, b in merges]
        self.special_tokens: list[str] = list(dict.fromkeys(special_tokens or ()))
        wrong = [i for i in self.vocab if not 0 <= i < MAX_VOCAB_SIZE]
        if wrong:
            raise UserError(f"vocabulary: got the id {wrong[0]}, need 0 to {MAX_VOCAB_SIZE - 1}")
        if b"" in self.vocab.values():
            raise UserError("vocabulary: got a token without bytes; need at least one each")
        self.id_of: dict[bytes, int] = {token: i for i, token in self.vocab.items()}
        if len(self.id_of) != len(self.vocab):
            twice = next(t for i, t in self.vocab.items() if self.id_of[t] != i)
            raise UserError(f"vocabulary: {twice!r} has two ids; each token needs one")
        for token in self.special_tokens:
            self._append_if_missing(token.encode("utf-8"))
        self._special_ids = {t: self.id_of[t.encode("utf-8")] for t in self.special_tokens}
        self._ranks: dict[Pair, int] = {}
        for rank, pair in enumerate(self.merges):
            for token in (*pair, pair[0] + pair[1]):
                if token not in self.id_of:
                    raise UserError(
                        f"merges: {token!r} of merge {rank} is not in the vocabulary; "
                        "vocabulary and merges must come from the same training"
                    )
            if self._ranks.setdefault(pair, rank) != rank:
                raise UserError(
                    f"merges: merge {rank} of {pair} occurs twice; each merge must occur once"
                )
        ends = [token for token in self.special_tokens if token == END_OF_TEXT]
        self.end_tokens = ends or self.special_tokens[:1]
        self._splitter = SpecialTokenSplitter(self.special_tokens)
        self._splitters: dict[frozenset[str], SpecialTokenSplitter] = {}  # for subsets of them
        # the entries None at the end catch negative ids, which count from the end of a list
        self._tokens = [*map(self.vocab.get, range(self.vocab_size)), *[None] * (1 << 17)]
        self._merges = MergeTable(self._ranks, self.id_of)
        self._words = WordEncoder(self._merges, self._encode_word, MAX_WORDS)
        self._short_words: dict[str, list[int]] = {}
        self._fingerprint: str | None = None

    def _append_if_missing(self, token: bytes) -> None:
        if token not in self.id_of:
            self.id_of[token] = self.vocab_size
            self.vocab[self.id_of[token]] = token

    def __reduce__(self):
        """Pickles only the arguments of `__init__`, which the rest follows from."""
        return type(self), (self.vocab, self.merges, self.special_tokens)

    @classmethod
    def from_files(
        cls,
        vocab_path: str | Path,
        merges_path: str | Path,
        special_tokens: Sequence[str] | None = None,
    ) -> "BPETokenizer":
        """Reads GPT-2's `vocab.json` and `merges.txt`.

        Raises: MissingError, or UserError with the file that cannot be read.
        """
        vocab, merges = read_gpt2_files(vocab_path, merges_path)
        try:
            return cls(vocab, merges, special_tokens)
        except ValueError as error:
            raise UserError(f"{error}: in {str(vocab_path)!r} or {str(merges_path)!r}") from None

    def save(self, vocab_path: str | Path, merges_path: str | Path) -> None:
        """Writes GPT-2's two files, special tokens included in the vocabulary."""
        write_gpt2_files(self.vocab, self.merges, vocab_path, merges_path)

    @property
    def vocab_size(self) -> int:
        """One more than the largest id: the number of rows that an embedding needs."""
        return max(self.vocab, default=-1) + 1

    @property
    def fingerprint(self) -> str:
        """SHA-256 of vocabulary, merges, special tokens and split pattern.

        Tokenizers with equal fingerprints encode every text equally.
        """
        if self._fingerprint is None:
            digest = hashlib.sha256()
            for token_id, token in sorted(self.vocab.items()):
                digest.update(b"%d:%d:%s" % (token_id, len(token), token))
            for a, b in self.merges:
                digest.update(b"%d:%s%d:%s" % (len(a), a, len(b), b))
            for special in sorted(t.encode("utf-8") for t in self.special_tokens):
                digest.update(b"special %d:%s" % (len(special), special))
            if self.split_pattern != GPT2_PATTERN:  # older fingerprints have no pattern
                digest.update(b"pattern %s" % self.split_pattern.encode("utf-8"))
            self._fingerprint = digest.hexdigest()
        return self._fingerprint

    def encode(
        self,
        text: str,
        *,
        allowed_special: Specials = "all",
        disallowed_special: Specials = (),
    ) -> list[int]:
        """The token ids of a text; `decode` gives the text back.

        allowed_special     special tokens that become one id: all by default, as in a corpus
        disallowed_special  special tokens that are an error; "all": all that are not allowed
        A special token in neither of the two is encoded as ordinary text. So a chat encodes user
        input with allowed_special=(). tiktoken's own default is allowed_special=(),
        disallowed_special="all".
        Surrogates that make no pair become U+FFFD, as in tiktoken.
        Raises: UserError for a disallowed special token in the text.
        """
        splitter = self._splitter
        if allowed_special != "all" or disallowed_special:
            splitter = self._splitter_for(allowed_special)
            self._refuse_special([text], allowed_special, disallowed_special)
        if len(text) <= SHORT_TEXT_CHARS:
            try:
                return self._encode_short(text, splitter)
            except UnicodeEncodeError:
                return self._encode_short(without_surrogates(text), splitter)
        blocks = splitter.safe_blocks([text], BLOCK_CHARS)
        return np.concatenate([self.encode_block(block, splitter) for block in blocks]).tolist()

    def encode_blocks(
        self, parts: Iterable[str], block_chars: int = BLOCK_CHARS
    ) -> Iterator[np.ndarray]:
        """The ids (int32) of the joined parts, block by block; parts may be cut anywhere.

        All special tokens of the tokenizer become one id each.
        """
        yield from self.encode_each(self.safe_blocks(parts, block_chars))

    def encode_each(self, blocks: Iterable[str]) -> Iterator[np.ndarray]:
        """One array of ids for each block of `safe_blocks`."""
        return map(self.encode_block, blocks)

    def safe_blocks(self, parts: Iterable[str], block_chars: int = BLOCK_CHARS) -> Iterator[str]:
        """The joined parts in blocks that `encode_block` may encode one by one."""
        return self._splitter.safe_blocks(parts, block_chars)

    def first_border(self, parts: Iterable[str]) -> int:
        """The first place where a text may be cut: `SpecialTokenSplitter.first_border`."""
        return self._splitter.first_border(parts)

    def encode_iterable(
        self,
        iterable: Iterable[str],
        *,
        allowed_special: Specials = "all",
        disallowed_special: Specials = (),
    ) -> Iterator[int]:
        """The ids of `encode("".join(iterable))` with the same settings, one by one.

        Cost: under 1 MB of memory for any length of text; 2.5 MB if almost each byte is a token of
        its own, because the vocabulary does not know the alphabet of the text.
        """
        splitter = self._splitter_for(allowed_special)
        parts = self._refuse_special(iterable, allowed_special, disallowed_special)
        groups = _groups(splitter.safe_blocks(parts, _STREAM_BLOCK_CHARS), _STREAM_BYTES)
        encoded = (self._encode_group(blocks, splitter) for blocks in groups)
        return chain(ids.tolist() for ids in chain(encoded))

    def _encode_group(self, blocks: list[str], splitter: SpecialTokenSplitter) -> list[np.ndarray]:
        def segments() -> Iterator[str | int]:
            return chain(self._segments(block, splitter) for block in blocks)

        try:
            return self._words.encode(segments(), _STREAM_AT_ONCE)
        except UnicodeEncodeError:
            blocks[:] = map(without_surrogates, blocks)
            return self._words.encode(segments(), _STREAM_AT_ONCE)

    def _splitter_for(self, allowed: Specials) -> SpecialTokenSplitter:
        """A splitter at these tokens. Raises: UserError for one that is not a special token."""
        if allowed == "all":
            return self._splitter
        chosen = frozenset(allowed)
        if chosen not in self._splitters:
            unknown = sorted(chosen.difference(self._special_ids))
            if unknown:
                raise UserError(
                    f"allowed_special: got {unknown[0]!r}, need special tokens of the tokenizer: "
                    f"{', '.join(self.special_tokens) or 'it has none'}"
                )
            self._splitters[chosen] = SpecialTokenSplitter(sorted(chosen))
        return self._splitters[chosen]

    def _refuse_special(
        self, parts: Iterable[str], allowed: Specials, disallowed: Specials
    ) -> Iterable[str]:
        """The same parts, checked: a list at once, another iterable while it is read."""
        if disallowed == "all":
            disallowed = () if allowed == "all" else set(self.special_tokens) - set(allowed)
        if not disallowed:
            return parts
        found = SpecialTokenSplitter(sorted(disallowed)).watched(parts)
        return list(found) if isinstance(parts, list) else found

    def decode(self, ids: Iterable[int]) -> str:
        """The text of the ids; bytes that are not UTF-8 become U+FFFD.

        Raises: UserError for an id outside the vocabulary (ids below -2^17 are not checked).
        """
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        parts = [decoder.decode(data) for data in self._bytes_in_chunks(ids)]
        return "".join([*parts, decoder.decode(b"", final=True)])

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The bytes of the ids, which may begin or end inside a character."""
        return b"".join(self._bytes_in_chunks(ids))

    def _bytes_in_chunks(self, ids: Iterable[int]) -> Iterator[bytes]:
        ids = ids if isinstance(ids, list) else list(ids)
        for start in range(0, len(ids), _IDS_AT_ONCE):
            chunk = ids[start : start + _IDS_AT_ONCE]
            try:
                tokens = itemgetter(*chunk)(self._tokens)
                yield b"".join(tokens) if len(chunk) > 1 else b"" + tokens
            except (IndexError, TypeError):  # an id beyond the list, or without a token
                wrong = next(i for i in chunk if i not in self.vocab)
                raise UserError(
                    f"decode: got token id {wrong}, need an id of the vocabulary "
                    f"(0 to {self.vocab_size - 1}); was the text encoded with another tokenizer?"
                ) from None

    def encode_block(self, text: str, splitter: SpecialTokenSplitter | None = None) -> np.ndarray:
        """The ids of `encode` as an array (int32)."""
        splitter = splitter or self._splitter
        try:
            parts = self._words.encode(self._segments(text, splitter))
        except UnicodeEncodeError:
            parts = self._words.encode(self._segments(without_surrogates(text), splitter))
        return np.concatenate(parts) if parts else np.zeros(0, np.int32)

    def _segments(self, text: str, splitter: SpecialTokenSplitter) -> Iterator[str | int]:
        """Ordinary text as strings, and special tokens as ids."""
        for place, segment in enumerate(splitter.split(text)):
            if segment:
                yield self._special_ids[segment] if place % 2 else segment

    def _encode_short(self, text: str, splitter: SpecialTokenSplitter) -> list[int]:
        """`encode` word by word, with the split pattern: faster than arrays for a line or two."""
        ids: list[int] = []
        for segment in self._segments(text, splitter):
            if isinstance(segment, int):
                ids.append(segment)
                continue
            for word in split_words(segment):
                known = self._short_words.get(word)
                if known is None:
                    if len(self._short_words) >= MAX_SHORT_WORDS:
                        self._short_words.clear()
                    known = self._short_words[word] = self._encode_word(word.encode("utf-8"))
                ids += known
        return ids

    def _encode_word(self, word: bytes) -> list[int]:
        if len(word) >= LONG_WORD_BYTES and self._merges.is_proper:
            ids = encode_long_word(word, self._merges, self._encode_whole)
            if ids.min() >= 0:
                return ids.tolist()
        return self._ids_of(fast_bpe.encode_word(word, self._ranks), word)

    def _encode_whole(self, word: bytes) -> tuple[np.ndarray, np.ndarray]:
        tokens = fast_bpe.merge_tokens(self._merges.begin_word(word), self._ranks)
        lengths = np.array(list(map(len, tokens)), np.int64)
        return np.array(self._ids_of(tokens, word), np.int32), lengths

    def _ids_of(self, tokens: list[bytes], word: bytes) -> list[int]:
        try:
            return [self.id_of[token] for token in tokens]
        except KeyError as error:
            shown = word[:_SHOWN_BYTES].decode("utf-8", "replace")
            raise UserError(
                f"encode: byte {error.args[0]!r} of {shown!r} is not in the vocabulary; "
                "need a vocabulary with all 256 bytes"
            ) from None


def _groups(texts: Iterable[str], size_bytes: int) -> Iterator[list[str]]:
    """Lists of texts that together have at least this size in memory; the last may have less."""
    group: list[str] = []
    held_bytes = 0
    for text in texts:
        group.append(text)
        held_bytes += sys.getsizeof(text)
        if held_bytes >= size_bytes:
            yield group
            group, held_bytes = [], 0
    if group:
        yield group
