"""`bpe.encode_word` for many words at once: each round does the next merge of every word."""

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property

import numpy as np

from cs_lm.tokenizer.bpe import Pair, as_single_bytes

_NO_RANK = np.iinfo(np.int32).max
_BITS = 32
_SECOND = (1 << _BITS) - 1
_LEAST_SHARE = 1 / 64
_WINDOWS_BYTES = 1 << 15


class MergeTable:
    """The merges in sorted arrays, to look up many pairs at once.

    ranks  pair -> rank, as `encode_word` takes them
    ids    token -> id; a single byte that is missing gets the id -1
    """

    def __init__(self, ranks: Mapping[Pair, int], ids: Mapping[bytes, int]):
        tokens = as_single_bytes(bytes(range(256)))
        symbol_of = {token: symbol for symbol, token in enumerate(tokens)}
        for first, second in ranks:
            for token in (first, second, first + second):
                if symbol_of.setdefault(token, len(tokens)) == len(tokens):
                    tokens.append(token)
        merges = sorted(ranks, key=ranks.__getitem__)  # from here on, a rank is an index into it
        pairs = np.array([symbol_of[a] << _BITS | symbol_of[b] for a, b in merges], np.int64)
        order = np.argsort(pairs)
        self._pairs, self._ranks = pairs[order], order.astype(np.int32)
        self._merged = np.array([symbol_of[a + b] for a, b in merges], np.int32)
        self._ids = np.array([ids.get(token, -1) for token in tokens], np.int32)
        self._tokens = tokens
        # ranks of pairs of single bytes, found without a search: every word begins with them
        self._byte_ranks = np.full(1 << 16, _NO_RANK, np.int32)
        are_bytes = np.flatnonzero((pairs >> _BITS < 256) & ((pairs & _SECOND) < 256))
        self._byte_ranks[pairs[are_bytes] >> _BITS << 8 | pairs[are_bytes] & _SECOND] = are_bytes
        self._lengths = np.array([len(token) for token in tokens], np.int64)

    def encode_words(
        self, words: Sequence[bytes], bytes_at_once: int = 1 << 14
    ) -> tuple[np.ndarray, np.ndarray]:
        """The ids of all words, concatenated, and the number of ids of each word.

        Each word has at least one byte. Cost: words are encoded in portions of `bytes_at_once`
        bytes (or one longer word). A portion needs as many rounds as its word with most merges.
        """
        ids, lengths = [np.zeros(0, np.int32)], [np.zeros(0, np.int64)]
        for portion in _portions(words, bytes_at_once):
            symbols, num_symbols = self._merge(portion)
            ids.append(self._ids[symbols])
            lengths.append(num_symbols)
        return np.concatenate(ids), np.concatenate(lengths)

    def begin_word(self, word: bytes) -> list[bytes]:
        """The partly merged tokens of a long word: merging ends when a round joins few places.

        A word of many thousand bytes is mostly repetition, which is merged by then.
        """
        symbols, _ = self._merge([word], _LEAST_SHARE)
        return [self._tokens[symbol] for symbol in symbols.tolist()]

    def encode_windows(self, words: Sequence[bytes]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The ids of all words, the length in bytes of each id, the number of ids of each word."""
        words_of: dict[bytes, int] = {}
        places = [words_of.setdefault(word, len(words_of)) for word in words]
        symbols, counts = [], []
        for portion in _portions(list(words_of), _WINDOWS_BYTES):
            found, num_symbols = self._merge(portion)
            symbols.append(found)
            counts.append(num_symbols)
        if not words:
            return np.zeros(0, np.int32), np.zeros(0, np.int64), np.zeros(0, np.int64)
        symbols, counts = np.concatenate(symbols), np.concatenate(counts)
        if len(words_of) < len(words):
            ends = np.cumsum(counts)
            starts, counts = (ends - counts)[places], counts[places]
            first = np.cumsum(counts) - counts
            symbols = symbols[np.repeat(starts - first, counts) + np.arange(counts.sum())]
        return self._ids[symbols], self._lengths[symbols], counts

    def ids_of_bytes(self, symbols: np.ndarray) -> np.ndarray:
        return self._ids[symbols]

    def sure_borders(self, word: bytes) -> np.ndarray:
        """Offsets in (0, n) that no merge crosses.

        No merge joins a token that ends in the byte before the offset with one that begins with
        the byte after it.
        """
        data = np.frombuffer(word, np.uint8).astype(np.int32)
        return np.flatnonzero(~self._crossed[data[:-1] << 8 | data[1:]]) + 1

    @cached_property
    def _crossed(self) -> np.ndarray:
        """For each two bytes (first << 8 | second), whether a merge joins tokens between them."""
        last = np.array([token[-1] for token in self._tokens], np.int64)
        first = np.array([token[0] for token in self._tokens], np.int64)
        crossed = np.zeros(1 << 16, bool)
        crossed[last[self._pairs >> _BITS] << 8 | first[self._pairs & _SECOND]] = True
        return crossed

    @cached_property
    def is_proper(self) -> bool:
        """Whether the merges can come from training: each token is made once, after its parts."""
        made = {symbol: rank for rank, symbol in enumerate(self._merged.tolist())}
        if len(made) != len(self._merged) or min(made, default=256) < 256:
            return False
        ranks = np.full(len(self._tokens), -1, np.int64)
        ranks[self._merged] = np.arange(len(self._merged))
        parts = np.stack((self._pairs >> _BITS, self._pairs & _SECOND))
        return bool((ranks[parts] < self._ranks).all())

    def _merge(
        self, words: Sequence[bytes], least_share: float = 0.0
    ) -> tuple[np.ndarray, np.ndarray]:
        """The symbols of all words, concatenated, and the number of symbols of each word.

        Each round merges all places of the pair with the lowest rank in every word, as the
        definition does. It ends when no known pair is left, or when a round would merge less than
        `least_share` of the symbols.
        """
        symbols = np.frombuffer(b"".join(words), np.uint8).astype(np.int32)
        borders = np.zeros(len(words) + 1, np.int64)
        np.cumsum(np.fromiter(map(len, words), np.int64, len(words)), out=borders[1:])
        is_last = np.zeros(len(symbols), bool)
        is_last[borders[1:] - 1] = True
        ranks = np.full(len(symbols), _NO_RANK, np.int32)  # rank of the pair that begins here
        ranks[:-1] = self._byte_ranks[symbols[:-1] << 8 | symbols[1:]]
        ranks[is_last] = _NO_RANK
        while len(symbols):
            best = np.minimum.reduceat(ranks, borders[:-1])
            best[best == _NO_RANK] = -1
            at = np.flatnonzero(ranks == best.repeat(borders[1:] - borders[:-1]))
            if not len(at) or len(at) < least_share * len(symbols):
                break
            at = without_overlaps(at, at[1:] == at[:-1] + 1)
            symbols[at] = self._merged[ranks[at]]
            is_last[at] = is_last[at + 1]
            kept = np.ones(len(symbols), bool)
            kept[at + 1] = False
            symbols, is_last, ranks = symbols[kept], is_last[kept], ranks[kept]
            borders -= np.searchsorted(at, borders)
            joined = at - np.arange(len(at))
            changed = np.concatenate((joined, joined[joined > 0] - 1))
            self._look_up(changed, symbols, is_last, ranks)
        return symbols, borders[1:] - borders[:-1]

    def _look_up(self, at, symbols, is_last, ranks) -> None:
        """Updates the ranks of the pairs that begin at the given positions."""
        ranks[at] = _NO_RANK
        at = at[~is_last[at]]
        pairs = symbols[at].astype(np.int64) << _BITS | symbols[at + 1]
        found = np.searchsorted(self._pairs[:-1], pairs)  # [:-1] keeps the index valid
        is_known = self._pairs[found] == pairs
        ranks[at[is_known]] = self._ranks[found[is_known]]


def without_overlaps(at: np.ndarray, is_beside: np.ndarray) -> np.ndarray:
    """The sorted places of a pair without overlaps: in a run, every other one from the left.

    is_beside  for each place but the first, whether it begins where the one before it ends
    """
    if not is_beside.any():
        return at
    index = np.arange(len(at))
    begins_run = np.concatenate(([True], ~is_beside))
    run_start = np.maximum.accumulate(np.where(begins_run, index, 0))
    return at[(index - run_start) % 2 == 0]


def _portions(words: Sequence[bytes], num_bytes: int) -> Iterator[Sequence[bytes]]:
    portion, size = [], 0
    for word in words:
        if size + len(word) > num_bytes and portion:
            yield portion
            portion, size = [], 0
        portion.append(word)
        size += len(word)
    if portion:
        yield portion
