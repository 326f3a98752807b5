"""Byte-pair encoding, the definition: count pairs, merge the best one, repeat.

This file is meant to be read: each step counts all pairs again. `fast_bpe.py` has functions with
the same signatures and results that count only the changes.
"""

from collections import Counter
from collections.abc import Iterator, Mapping

Pair = tuple[bytes, bytes]


def as_single_bytes(word: bytes) -> list[bytes]:
    return [word[i : i + 1] for i in range(len(word))]


def merge_pair(tokens: list[bytes], pair: Pair) -> list[bytes]:
    """The tokens with every occurrence of the pair joined, from left to right."""
    merged: list[bytes] = []
    i = 0
    while i < len(tokens):
        if tuple(tokens[i : i + 2]) == pair:
            merged.append(pair[0] + pair[1])
            i += 2
        else:
            merged.append(tokens[i])
            i += 1
    return merged


def count_pairs(words: Mapping[tuple[bytes, ...], int]) -> Counter[Pair]:
    """How often each pair of adjacent tokens occurs, weighted by the counts of the words."""
    counts: Counter[Pair] = Counter()
    for tokens, count in words.items():
        for pair in zip(tokens, tokens[1:]):
            counts[pair] += count
    return counts


def train_merges(word_counts: Mapping[bytes, int], num_merges: int) -> list[Pair]:
    """The merges in the order in which training finds them.

    Each round merges the most frequent pair. Among equally frequent pairs, it takes the
    lexicographically greatest (first token, second token). It ends early when no pair is left.
    """
    words: Counter[tuple[bytes, ...]] = Counter()
    for word, count in word_counts.items():
        words[tuple(as_single_bytes(word))] += count
    merges: list[Pair] = []
    while len(merges) < num_merges:
        counts = count_pairs(words)
        if not counts:
            break
        best = max(counts, key=lambda pair: (counts[pair], pair))
        merges.append(best)
        words = Counter({tuple(merge_pair(list(w), best)): n for w, n in words.items()})
    return merges


def merge_steps(
    word: bytes, ranks: Mapping[Pair, int]
) -> Iterator[tuple[Pair | None, list[bytes]]]:
    """Yields (None, the single bytes of a word), then (merged pair, new tokens) for each merge.

    Each step merges the known pair that was learnt first, at all its places.
    """
    tokens = as_single_bytes(word)
    yield None, tokens
    while known := [pair for pair in zip(tokens, tokens[1:]) if pair in ranks]:
        best = min(known, key=ranks.__getitem__)
        tokens = merge_pair(tokens, best)
        yield best, tokens


def encode_word(word: bytes, ranks: Mapping[Pair, int]) -> list[bytes]:
    """The tokens of one word after all merges."""
    *_, (_, tokens) = merge_steps(word, ranks)
    return tokens
