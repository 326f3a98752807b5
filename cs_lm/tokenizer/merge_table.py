"""`bpe.encode_word` for many words at a time: all words take their next merge together."""

from collections.abc import Mapping, Sequence

import numpy as np

from cs_lm.tokenizer.bpe import Pair, as_single_bytes

_NO_RANK = np.iinfo(np.int64).max
_BITS = 32


class MergeTable:
    """The merges in sorted arrays, to look up many pairs at once.

    ranks  pair -> rank, as `encode_word` takes them
    ids    token -> id; a single byte that is missing gives -1
    """

    def __init__(self, ranks: Mapping[Pair, int], ids: Mapping[bytes, int]):
        tokens = as_single_bytes(bytes(range(256)))
        symbol_of = {token: symbol for symbol, token in enumerate(tokens)}
        for first, second in ranks:
            for token in (first, second, first + second):
                if symbol_of.setdefault(token, len(tokens)) == len(tokens):
                    tokens.append(token)
        pairs = [symbol_of[a] << _BITS | symbol_of[b] for a, b in ranks]
        order = np.argsort(np.array(pairs, np.int64))
        self._pairs = np.array(pairs, np.int64)[order]
        self._ranks = np.fromiter(ranks.values(), np.int64, len(ranks))[order]
        self._merged = np.array([symbol_of[a + b] for a, b in ranks], np.int64)[order]
        self._ids = np.array([ids.get(token, -1) for token in tokens], np.int64)

    def encode_words(self, words: Sequence[bytes]) -> tuple[np.ndarray, np.ndarray]:
        """The ids of all words, one after the other, and how many each word has.

        In each round, every word joins all places of its pair of lowest rank, as the definition
        does. Words have at least one byte.
        """
        symbols = np.frombuffer(b"".join(words), np.uint8).astype(np.int64)
        lengths = np.fromiter(map(len, words), np.int64, len(words))
        if not len(self._pairs):
            return self._ids[symbols], lengths
        starts = np.cumsum(lengths) - lengths
        is_last = np.zeros(len(symbols), bool)
        is_last[starts + lengths - 1] = True
        everywhere = np.arange(len(symbols))
        places = np.zeros(len(symbols), np.int64)  # of the pair that begins here, in the table
        ranks = np.full(len(symbols), _NO_RANK)
        self._look_up(everywhere, symbols, is_last, places, ranks)
        while len(symbols):
            best = np.repeat(np.minimum.reduceat(ranks, starts), lengths)
            at = np.flatnonzero((ranks == best) & (best != _NO_RANK))
            if not len(at):
                break
            at = _without_overlaps(at)
            symbols[at] = self._merged[places[at]]
            is_last[at] = is_last[at + 1]
            kept = np.ones(len(symbols), bool)
            kept[at + 1] = False
            symbols, is_last = symbols[kept], is_last[kept]
            places, ranks = places[kept], ranks[kept]
            starts -= np.searchsorted(at, starts)
            lengths = np.diff(starts, append=len(symbols))
            joined = at - np.arange(len(at))
            before = joined[joined > 0] - 1
            self._look_up(joined, symbols, is_last, places, ranks)
            self._look_up(before, symbols, is_last, places, ranks)
        return self._ids[symbols], lengths

    def _look_up(self, at, symbols, is_last, places, ranks) -> None:
        """Renews place and rank of the pairs that begin at the given positions."""
        ranks[at] = _NO_RANK
        at = at[~is_last[at]]
        pairs = symbols[at] << _BITS | symbols[at + 1]
        found = np.minimum(np.searchsorted(self._pairs, pairs), len(self._pairs) - 1)
        is_known = self._pairs[found] == pairs
        places[at] = found
        ranks[at[is_known]] = self._ranks[found[is_known]]


def _without_overlaps(at: np.ndarray) -> np.ndarray:
    """Of places of one pair side by side (equal tokens): every other one, from the left."""
    index = np.arange(len(at))
    begins_run = np.concatenate(([True], at[1:] != at[:-1] + 1))
    run_start = np.maximum.accumulate(np.where(begins_run, index, 0))
    return at[(index - run_start) % 2 == 0]
