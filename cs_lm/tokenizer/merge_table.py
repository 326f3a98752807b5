"""`bpe.encode_word` for many words at a time: all words take their next merge together."""

from collections.abc import Mapping, Sequence

import numpy as np

from cs_lm.tokenizer.bpe import Pair, as_single_bytes

_NO_RANK = np.iinfo(np.int64).max
_BITS = 32
_LEAST_SHARE = 1 / 64


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
        self._tokens = tokens

    def encode_words(self, words: Sequence[bytes]) -> tuple[np.ndarray, np.ndarray]:
        """The ids of all words, one after the other, and how many each word has.

        Words have at least one byte. Cost: as many rounds as the word with most merges needs.
        """
        symbols, lengths = self._merge(words)
        return self._ids[symbols], lengths

    def begin_word(self, word: bytes) -> list[bytes]:
        """The tokens of a long word, merged as long as one round joins many places.

        Repetitions, which a word of many thousand bytes mostly is, are done with by then.
        """
        symbols, _ = self._merge([word], _LEAST_SHARE)
        return [self._tokens[symbol] for symbol in symbols.tolist()]

    def _merge(
        self, words: Sequence[bytes], least_share: float = 0.0
    ) -> tuple[np.ndarray, np.ndarray]:
        """Symbols of all words, and how many each word has.

        In each round, every word joins all places of its pair of lowest rank, as the definition
        does; it ends when there is no pair any more, or less than a share of the symbols joins.
        """
        symbols = np.frombuffer(b"".join(words), np.uint8).astype(np.int64)
        borders = np.zeros(len(words) + 1, np.int64)
        np.cumsum(np.fromiter(map(len, words), np.int64, len(words)), out=borders[1:])
        is_last = np.zeros(len(symbols), bool)
        is_last[borders[1:] - 1] = True
        merged = np.zeros(len(symbols), np.int64)  # what the pair that begins here joins to
        ranks = np.full(len(symbols), _NO_RANK)
        if len(symbols) and len(self._pairs):
            self._look_up(np.arange(len(symbols)), symbols, is_last, merged, ranks)
        while len(symbols):
            best = np.minimum.reduceat(ranks, borders[:-1]).repeat(borders[1:] - borders[:-1])
            at = ((ranks == best) & (best != _NO_RANK)).nonzero()[0]
            if not len(at) or len(at) < least_share * len(symbols):
                break
            at = _without_overlaps(at)
            symbols[at] = merged[at]
            is_last[at] = is_last[at + 1]
            kept = np.ones(len(symbols), bool)
            kept[at + 1] = False
            symbols, is_last, merged, ranks = (
                symbols[kept],
                is_last[kept],
                merged[kept],
                ranks[kept],
            )
            borders -= np.searchsorted(at, borders)
            joined = at - np.arange(len(at))
            changed = np.concatenate((joined, joined[joined > 0] - 1))
            self._look_up(changed, symbols, is_last, merged, ranks)
        return symbols, borders[1:] - borders[:-1]

    def _look_up(self, at, symbols, is_last, merged, ranks) -> None:
        """Renews result and rank of the pairs that begin at the given positions."""
        ranks[at] = _NO_RANK
        at = at[~is_last[at]]
        pairs = symbols[at] << _BITS | symbols[at + 1]
        found = np.searchsorted(self._pairs[:-1], pairs)  # the last place stands for all beyond
        is_known = self._pairs[found] == pairs
        at, found = at[is_known], found[is_known]
        merged[at], ranks[at] = self._merged[found], self._ranks[found]


def _without_overlaps(at: np.ndarray) -> np.ndarray:
    """Of places of one pair side by side (equal tokens): every other one, from the left."""
    is_beside = at[1:] == at[:-1] + 1
    if not is_beside.any():
        return at
    index = np.arange(len(at))
    begins_run = np.concatenate(([True], ~is_beside))
    run_start = np.maximum.accumulate(np.where(begins_run, index, 0))
    return at[(index - run_start) % 2 == 0]
