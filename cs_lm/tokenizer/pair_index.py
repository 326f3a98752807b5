"""All words of a training text in flat arrays, and the pairs in them that may be merged next.

Training merges the most frequent pair some ten thousand times. The first merges touch a large
part of all words and use array operations. Most later merges touch a few dozen places: a plain
loop over the same memory is faster. Rare pairs are not stored. When all stored pairs are merged,
one pass over the arrays finds the pairs that are the most frequent now.
"""

from collections import defaultdict
from collections.abc import Mapping
from heapq import heapify, heappop, heappush

import numpy as np

from cs_lm.tokenizer.merge_table import without_overlaps

# A pair of token ids as one integer: first << _BITS | second.
_BITS = 32
_SECOND = (1 << _BITS) - 1
# Up to this many places, a loop is faster than array operations.
_FEW_PLACES = 64
# A pass over the arrays keeps the pairs with at least 1/64 of the highest count...
_KEPT_RANGE = 64
# ... or all pairs, if there are fewer positions than this.
_SMALL = 100_000
# Values of `symbol` that are not token ids.
_NO_TOKEN, _BEING_MERGED = -1, -2


def _descending_key(token: bytes) -> str:
    """A string that sorts in the reverse order of the bytes, also for prefixes."""
    return "".join(chr(255 - byte) for byte in token) + chr(256)


class PairIndex:
    """All words in arrays, with the counts and places of all pairs at or above `floor`.

    symbol[i]                  id of the token that begins at i; _NO_TOKEN at the border before a
                               word and at a position that a merge has swallowed
    following[i], previous[i]  the next position to either side that is not swallowed
    count[i]                   how often the word of i occurs in the text

    counts[pair] is exact for every pair in it. A pair that is not in it has a count below `floor`:
    counts only fall after the merge that made the pair's younger token, and a token is made once.
    (No two pairs join to the same bytes. Wherever some bytes become one token, all merges inside
    them are the same, because no merge crosses their ends. So the first merge that joins these
    bytes anywhere joins them everywhere.)

    places[pair] has all positions of the pair, and maybe some outdated ones.

    A heap entry is (-count, descending keys of both tokens, pair). The smallest entry is the pair
    with the highest count, then the lexicographically greatest. An entry with an outdated count is
    replaced when it is popped.
    """

    def __init__(self, word_counts: Mapping[bytes, int]):
        self.tokens = [bytes([byte]) for byte in range(256)]
        self._keys = [_descending_key(token) for token in self.tokens]
        letters = np.frombuffer(b"".join(word_counts), np.uint8)
        lengths = np.fromiter(map(len, word_counts), np.int64, len(word_counts))
        frequencies = np.fromiter(word_counts.values(), np.int64, len(word_counts))
        place = np.arange(len(letters)) + np.repeat(np.arange(1, len(lengths) + 1), lengths)
        size = len(letters) + len(lengths) + 1  # a border before each word and at the end
        self._symbol = np.full(size, _NO_TOKEN, np.int32)
        self._symbol[place] = letters
        self._count = np.zeros(size, np.int64)
        self._count[place] = np.repeat(frequencies, lengths)
        self._following = np.arange(1, size + 1, dtype=np.int32)
        self._previous = np.arange(-1, size - 1, dtype=np.int32)
        # single elements are read and written twice as fast through a memoryview
        arrays = (self._symbol, self._following, self._previous, self._count)
        self._views = tuple(map(memoryview, arrays))
        self._find_frequent_pairs()

    def pop_best(self) -> int | None:
        """The pair to merge next, or None when no pair is left."""
        while True:
            while self._heap:
                negative_count, _, _, pair = heappop(self._heap)
                count = self._counts.get(pair, 0)
                if count == -negative_count >= self._floor:
                    return pair
                if count >= self._floor:
                    self._push(pair)
            if self._floor <= 1:
                return None
            self._find_frequent_pairs()

    def tokens_of(self, pair: int) -> tuple[bytes, bytes]:
        return self.tokens[pair >> _BITS], self.tokens[pair & _SECOND]

    def merge(self, pair: int) -> None:
        first, second = pair >> _BITS, pair & _SECOND
        places = self._places.pop(pair)
        del self._counts[pair]
        merged = len(self.tokens)
        self.tokens.append(self.tokens[first] + self.tokens[second])
        self._keys.append(_descending_key(self.tokens[merged]))
        if len(places) > _FEW_PLACES or first == second:
            self._merge_many(np.asarray(places, np.int32), first, second, merged)
        else:
            self._merge_few(places, first, second, merged)

    def _entry(self, pair: int) -> tuple[int, str, str, int]:
        keys = self._keys
        return (-self._counts[pair], keys[pair >> _BITS], keys[pair & _SECOND], pair)

    def _push(self, pair: int) -> None:
        heappush(self._heap, self._entry(pair))

    def _find_frequent_pairs(self) -> None:
        """Counts all pairs again, chooses a floor, and keeps the pairs at or above it."""
        self._counts: dict[int, int] = {}
        self._places: dict[int, np.ndarray | list[int]] = {}
        places = np.flatnonzero(self._symbol >= 0).astype(np.int32)
        seconds = self._symbol[self._following[places]]
        is_pair = seconds >= 0
        places, seconds = places[is_pair], seconds[is_pair]
        pairs = (self._symbol[places].astype(np.int64) << _BITS) | seconds
        groups = list(self._grouped(pairs, places))
        highest = max((count for _, count, _ in groups), default=0)
        self._floor = 1 if len(places) < _SMALL else max(1, highest // _KEPT_RANGE)
        for pair, count, where in groups:
            if count >= self._floor:
                self._counts[pair], self._places[pair] = count, where
        self._heap = [self._entry(pair) for pair in self._counts]
        heapify(self._heap)

    def _grouped(self, pairs: np.ndarray, places: np.ndarray):
        """(pair, count, places) for each different pair; pairs[i] is the pair at places[i]."""
        if not len(pairs):
            return
        order = np.argsort(pairs, kind="stable")
        pairs, places = pairs[order], places[order]
        starts = np.flatnonzero(np.concatenate(([True], pairs[1:] != pairs[:-1])))
        counts = np.add.reduceat(self._count[places], starts).tolist()
        ends = [*starts[1:].tolist(), len(pairs)]
        for pair, count, start, end in zip(pairs[starts].tolist(), counts, starts.tolist(), ends):
            yield pair, count, places[start:end]

    # ---- one merge: pairs that end are subtracted, pairs that begin are added ----

    def _merge_many(self, at: np.ndarray, first: int, second: int, merged: int) -> None:
        symbol, following, previous = self._symbol, self._following, self._previous
        at = at[symbol[at] == first]
        at = at[symbol[following[at]] == second]
        if first == second:
            at = np.sort(at)
            at = without_overlaps(at, at[1:] == following[at[:-1]])
        if not len(at):
            return
        swallowed = following[at]
        right = following[swallowed]
        self._subtract(symbol[previous[at]], at, lambda other: other << _BITS | first)
        symbol[at] = _BEING_MERGED
        is_last = symbol[right] != _BEING_MERGED  # else a pair between two merges counts twice
        ends, right_ends = at[is_last], right[is_last]
        self._subtract(symbol[right_ends], ends, lambda other: second << _BITS | other)
        symbol[at], symbol[swallowed] = merged, _NO_TOKEN
        following[at], previous[right] = right, at
        left = previous[at]
        left_pairs = (symbol[left].astype(np.int64) << _BITS) | merged
        right_pairs = (np.int64(merged) << _BITS) | symbol[right_ends]
        has_left, has_right = symbol[left] >= 0, symbol[right_ends] >= 0
        pairs = np.concatenate((left_pairs[has_left], right_pairs[has_right]))
        places = np.concatenate((left[has_left], ends[has_right]))
        for pair, count, where in self._grouped(pairs, places):
            self._add(pair, count, where)

    def _subtract(self, others: np.ndarray, at: np.ndarray, pair_of) -> None:
        """Subtracts the pairs of a token with `others`, one per place, from the counts."""
        is_token = others >= 0
        totals = np.bincount(others[is_token], self._count[at[is_token]])
        present = np.flatnonzero(totals)
        for other, total in zip(present.tolist(), totals[present].tolist()):
            pair = pair_of(other)
            if pair in self._counts:
                self._counts[pair] -= int(total)

    def _merge_few(self, places, first: int, second: int, merged: int) -> None:
        symbol, following, previous, count = self._views
        counts = self._counts
        begun: dict[int, int] = defaultdict(int)
        begun_at: dict[int, list[int]] = defaultdict(list)
        for i in map(int, places):
            swallowed = following[i]
            if symbol[i] != first or symbol[swallowed] != second:
                continue
            left, right, times = previous[i], following[swallowed], count[i]
            if (other := symbol[left]) >= 0:
                ended = other << _BITS | first
                if other == merged:  # the neighbour was merged just now
                    begun[ended] -= times
                elif ended in counts:
                    counts[ended] -= times
                begun[other << _BITS | merged] += times
                begun_at[other << _BITS | merged].append(left)
            if (other := symbol[right]) >= 0:
                ended = second << _BITS | other
                if ended in counts:
                    counts[ended] -= times
                begun[merged << _BITS | other] += times
                begun_at[merged << _BITS | other].append(i)
            symbol[i], symbol[swallowed] = merged, _NO_TOKEN
            following[i], previous[right] = right, i
        for pair, times in begun.items():
            self._add(pair, times, begun_at[pair])

    def _add(self, pair: int, count: int, where: np.ndarray | list[int]) -> None:
        """Stores a pair that a merge has just made, unless its count is below the floor."""
        if count >= self._floor:
            self._counts[pair], self._places[pair] = count, where
            self._push(pair)
