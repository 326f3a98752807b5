"""The functions of `bpe.py` without recounting: same signatures, same results.

Training keeps the count and the places of each pair, so that a merge touches only these places
(pair_index.py). Encoding a long word keeps the candidate pairs in a heap instead of scanning all
pairs again: O(n log n) for a word of n bytes instead of O(n^2).
"""

from collections.abc import Callable, Mapping
from heapq import heapify, heappop, heappush
from math import inf

from cs_lm.tokenizer.bpe import Pair, as_single_bytes
from cs_lm.tokenizer.pair_index import PairIndex

# Below this many bytes, scanning all pairs is faster than a heap.
_HEAP_FROM_BYTES = 48
_SINGLE_BYTES = as_single_bytes(bytes(range(256)))  # made once, so that their hashes are cached


def train_merges(
    word_counts: Mapping[bytes, int],
    num_merges: int,
    progress: Callable[[int, int], None] | None = None,
) -> list[Pair]:
    """`bpe.train_merges`, incrementally; calls `progress(merges done, merges wanted)` at times."""
    index = PairIndex(word_counts)
    merges: list[Pair] = []
    while len(merges) < num_merges:
        best = index.pop_best()
        if best is None:
            break
        merges.append(index.tokens_of(best))
        index.merge(best)
        if progress and (len(merges) % 256 == 0 or len(merges) == num_merges):
            progress(len(merges), num_merges)
    return merges


def encode_word(word: bytes, ranks: Mapping[Pair, int]) -> list[bytes]:
    """`bpe.encode_word`: the tokens of one word."""
    if len(word) >= _HEAP_FROM_BYTES:
        return merge_tokens(as_single_bytes(word), ranks)
    rank_of = ranks.get
    tokens = [_SINGLE_BYTES[byte] for byte in word]
    pair_ranks = [rank_of(pair, inf) for pair in zip(tokens, tokens[1:])]
    best = min(pair_ranks, default=inf)
    while best < inf:
        i = 0
        while best in pair_ranks:  # every place of this pair, left to right
            i = pair_ranks.index(best, i)
            tokens[i : i + 2] = [tokens[i] + tokens[i + 1]]
            del pair_ranks[i]
            if i > 0:
                pair_ranks[i - 1] = rank_of((tokens[i - 1], tokens[i]), inf)
            if i < len(pair_ranks):
                pair_ranks[i] = rank_of((tokens[i], tokens[i + 1]), inf)
        best = min(pair_ranks, default=inf)
    return tokens


def merge_tokens(tokens: list[bytes], ranks: Mapping[Pair, int]) -> list[bytes]:
    """The tokens of `bpe.encode_word`, continued from partly merged tokens.

    The tokens are a linked list over their start positions. The heap has (rank, position, pair).
    """
    end = len(tokens)
    tokens: list[bytes | None] = list(tokens)
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
