"""The functions of `bpe.py` without recounting: same signatures, same results.

Training keeps, for each pair, its count and the words it occurs in, so that a merge touches only
those words. Encoding a long word keeps the candidate pairs in a heap instead of looking through
all of them again: O(n log n) for a word of n bytes instead of O(n^2).
"""

from collections import defaultdict
from collections.abc import Callable, Mapping
from heapq import heapify, heappop, heappush

from cs_lm.tokenizer.bpe import Pair, as_single_bytes

# Below this many bytes, looking through all pairs is quicker than keeping a heap.
_HEAP_FROM_BYTES = 48


def _descending_key(token: bytes) -> str:
    """A string that sorts in the opposite order of the bytes, prefixes included."""
    return "".join(chr(255 - byte) for byte in token) + chr(256)


class _PairIndex:
    """Pair counts, the words that hold each pair, and a heap whose stale entries are tolerated.

    A heap entry is (-count, descending keys of both tokens, pair): its least is the pair with the
    highest count, then the lexicographically greatest. Counts that rise are pushed again,
    counts that fall are noticed when their old entry comes up.
    """

    def __init__(self, word_counts: Mapping[bytes, int]):
        self.tokens = [bytes([byte]) for byte in range(256)]
        self.ids = {token: byte for byte, token in enumerate(self.tokens)}
        self.keys = [_descending_key(token) for token in self.tokens]
        self.words = [list(word) for word in word_counts]
        self.word_counts = list(word_counts.values())
        self.counts: dict[tuple[int, int], int] = defaultdict(int)
        self.places: dict[tuple[int, int], set[int]] = defaultdict(set)
        for index, (word, count) in enumerate(zip(self.words, self.word_counts)):
            for pair in zip(word, word[1:]):
                self.counts[pair] += count
                self.places[pair].add(index)
        self.heap = [self._entry(pair) for pair in self.counts]
        heapify(self.heap)

    def _entry(self, pair: tuple[int, int]):
        return (-self.counts[pair], self.keys[pair[0]], self.keys[pair[1]], pair)

    def pop_best(self) -> tuple[int, int] | None:
        while self.heap:
            negative_count, _, _, pair = heappop(self.heap)
            count = self.counts.get(pair, 0)
            if count == -negative_count and count > 0:
                return pair
            if 0 < count < -negative_count:
                heappush(self.heap, self._entry(pair))
        return None

    def _id_of(self, token: bytes) -> int:
        """The token's id; two different pairs may join to the same bytes."""
        if token not in self.ids:
            self.ids[token] = len(self.tokens)
            self.tokens.append(token)
            self.keys.append(_descending_key(token))
        return self.ids[token]

    def merge(self, pair: tuple[int, int]) -> None:
        new_id = self._id_of(self.tokens[pair[0]] + self.tokens[pair[1]])
        risen: set[tuple[int, int]] = set()
        for index in self.places.pop(pair):
            self._merge_in_word(index, pair, new_id, risen)
        del self.counts[pair]
        risen.discard(pair)
        for other in risen:
            heappush(self.heap, self._entry(other))

    def _merge_in_word(self, index: int, pair: tuple[int, int], new_id: int, risen: set) -> None:
        word, count = self.words[index], self.word_counts[index]
        first, second = pair
        merged: list[int] = []
        i, end = 0, len(word)
        while i < end:
            if word[i] == first and i + 1 < end and word[i + 1] == second:
                merged.append(new_id)
                i += 2
            else:
                merged.append(word[i])
                i += 1
        if len(merged) == end:  # the word lost this pair to an earlier merge
            return
        for old in zip(word, word[1:]):
            self.counts[old] -= count
        for new in zip(merged, merged[1:]):
            self.counts[new] += count
            if new_id in new:
                self.places[new].add(index)
                risen.add(new)
        self.words[index] = merged


def train_merges(
    word_counts: Mapping[bytes, int],
    num_merges: int,
    progress: Callable[[int, int], None] | None = None,
) -> list[Pair]:
    """`bpe.train_merges`, incrementally; `progress(merges done, merges wanted)` now and then."""
    index = _PairIndex(word_counts)
    merges: list[Pair] = []
    while len(merges) < num_merges:
        best = index.pop_best()
        if best is None:
            break
        merges.append((index.tokens[best[0]], index.tokens[best[1]]))
        index.merge(best)
        if progress and (len(merges) % 256 == 0 or len(merges) == num_merges):
            progress(len(merges), num_merges)
    return merges


def encode_word(word: bytes, ranks: Mapping[Pair, int]) -> list[bytes]:
    """`bpe.encode_word`: the tokens of one word."""
    if len(word) >= _HEAP_FROM_BYTES:
        return _encode_long_word(word, ranks)
    tokens = as_single_bytes(word)
    no_rank = len(ranks)
    while len(tokens) > 1:
        pair_ranks = [ranks.get(pair, no_rank) for pair in zip(tokens, tokens[1:])]
        best = min(pair_ranks)
        if best == no_rank:
            break
        merged, i = [], 0
        while i < len(tokens):
            if i < len(pair_ranks) and pair_ranks[i] == best:
                merged.append(tokens[i] + tokens[i + 1])
                i += 2
            else:
                merged.append(tokens[i])
                i += 1
        tokens = merged
    return tokens


def _encode_long_word(word: bytes, ranks: Mapping[Pair, int]) -> list[bytes]:
    """Tokens as a linked list over their start positions; candidates as (rank, position)."""
    end = len(word)
    tokens: list[bytes | None] = list(as_single_bytes(word))
    following = list(range(1, end + 1))
    previous = list(range(-1, end - 1))
    heap = []
    for i, pair in enumerate(zip(tokens, tokens[1:])):
        rank = ranks.get(pair)
        if rank is not None:
            heap.append((rank, i, pair))
    heapify(heap)
    while heap:
        rank, risen = heap[0][0], []
        while heap and heap[0][0] == rank:  # one round: every place of this pair, left to right
            _, left, pair = heappop(heap)
            right = following[left]
            if right >= end or (tokens[left], tokens[right]) != pair:
                continue  # one of the two has been merged since
            tokens[left], tokens[right] = pair[0] + pair[1], None
            after = following[left] = following[right]
            if after < end:
                previous[after] = left
            risen += [(previous[left], left), (left, after)]
        for i, j in risen:
            if i >= 0 and j < end and tokens[i] is not None and following[i] == j:
                candidate = (tokens[i], tokens[j])
                if candidate in ranks:
                    heappush(heap, (ranks[candidate], i, candidate))
    return [token for token in tokens if token is not None]
