"""Encodes one word of many thousand bytes exactly, in overlapping windows.

The word is cut into windows, which are encoded together. Where two adjacent windows have the same
token at the same place, they are joined: the tokens before it come from the first window, the
token itself and the rest from the second.

Why this is exact: training makes each token once, and after its parts. With such merges, a sequence
of tokens is the encoding of its bytes if and only if each two adjacent tokens are the encoding of
their own bytes. In the joined sequence, each two adjacent tokens are adjacent in a window, too.
Source: the criterion of adjacent tokens is GitHub's, So many tokens, so little time (2024).
"""

from collections.abc import Callable

import numpy as np

from cs_lm.tokenizer.merge_table import MergeTable

# (stride, overlap) of windows [bytes]: the longer windows are for words with longer tokens.
_SIZES = ((48, 16), (512, 256))
# If a larger share of the windows cannot be joined, longer windows are tried.
_MOST_FAILED = 1 / 8

EncodeWhole = Callable[[bytes], tuple[np.ndarray, np.ndarray]]


def encode_long_word(word: bytes, merges: MergeTable, encode_whole: EncodeWhole) -> np.ndarray:
    """The ids (int32) of the word's tokens; -1 for a byte that is not in the vocabulary.

    merges        `merges.is_proper` must be true
    encode_whole  encodes a window that replaces windows that cannot be joined; returns its ids and
                  their lengths in bytes
    Cost: linear, as long as adjacent windows share tokens. A stretch where they share none (tokens
    longer than the overlap) becomes one window.
    """
    borders = merges.sure_borders(word)
    if 8 * len(borders) > len(word):  # many borders: the pieces between them are short
        return _encode_pieces(word, borders, merges)
    for stride, overlap in _SIZES:
        starts = np.arange(0, max(len(word) - overlap, 1), stride)
        ends = np.minimum(starts + stride + overlap, len(word))
        ids, lengths, counts = merges.encode_windows(_cut(word, starts, ends))
        joints = _joints(len(word), starts, ends, lengths, counts)
        if (joints < 0).sum() <= _MOST_FAILED * len(starts):
            break
    while len(failed := np.flatnonzero(joints < 0)):  # joint i is between window i and i + 1
        starts, ends, ids, lengths, counts = _grown(
            word, failed, (starts, ends, ids, lengths, counts), encode_whole
        )
        joints = _joints(len(word), starts, ends, lengths, counts)
    first = np.concatenate(([0], joints))  # of each window: its first offset that is used
    last = np.concatenate((joints, [len(word)]))
    at = _places(starts, lengths, counts)
    window = np.repeat(np.arange(len(starts)), counts)
    return ids[(at >= first[window]) & (at < last[window])]


def _encode_pieces(word: bytes, borders: np.ndarray, merges: MergeTable) -> np.ndarray:
    """The ids of a word that is cut at the borders into single bytes and short pieces."""
    starts = np.concatenate(([0], borders))
    ends = np.append(borders, len(word))
    symbols = np.frombuffer(word, np.uint8).astype(np.int32)
    is_long = ends - starts > 1
    ids, lengths, counts = merges.encode_windows(_cut(word, starts[is_long], ends[is_long]))
    begins = np.zeros(len(word), bool)
    begins[starts] = True
    found = merges.ids_of_bytes(symbols)
    if len(ids):
        at = _places(starts[is_long], lengths, counts)
        begins[at] = True
        found[at] = ids
    return found[begins]


def _cut(word: bytes, starts: np.ndarray, ends: np.ndarray) -> list[bytes]:
    return [word[a:b] for a, b in zip(starts.tolist(), ends.tolist())]


def _places(starts: np.ndarray, lengths: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """The offset in the word of each token of each window."""
    ends = np.cumsum(lengths)
    before_window = np.concatenate(([0], ends[np.cumsum(counts)[:-1] - 1]))
    return ends - lengths + np.repeat(starts - before_window, counts)


def _joints(size: int, starts, ends, lengths, counts) -> np.ndarray:
    """For each two adjacent windows, the offset of a token that both have; -1 if there is none."""
    at = _places(starts, lengths, counts)
    is_odd = np.repeat(np.arange(len(starts)) % 2 == 1, counts)
    ends_of = np.full((2, size), -1, np.int32)  # of the token that begins here; -1: none
    for parity, chosen in enumerate((~is_odd, is_odd)):
        ends_of[parity, at[chosen]] = at[chosen] + lengths[chosen]
    shared = np.flatnonzero((ends_of[0] == ends_of[1]) & (ends_of[0] >= 0))
    shared = np.append(shared, size)
    found = shared[np.searchsorted(shared, starts[1:])]
    return np.where(found < ends[:-1], found, -1)


def _grown(word: bytes, failed, windows, encode_whole: EncodeWhole):
    """The windows, where each run of windows that could not be joined is now one window."""
    starts, ends, ids, lengths, counts = windows
    group = np.ones(len(starts), bool)  # whether a new group begins with the window
    group[failed + 1] = False
    first = np.flatnonzero(group)
    last = np.append(first[1:], len(starts)) - 1
    id_ends = np.cumsum(counts)
    id_starts = id_ends - counts
    new_ids, new_lengths, new_counts = [], [], []
    for a, b in zip(first.tolist(), last.tolist()):
        if a == b:
            some = slice(id_starts[a], id_ends[a])
            part, its_lengths = ids[some], lengths[some]
        else:
            part, its_lengths = encode_whole(word[starts[a] : ends[b]])
        new_ids.append(part)
        new_lengths.append(its_lengths)
        new_counts.append(len(part))
    return (
        starts[first],
        ends[last],
        np.concatenate(new_ids),
        np.concatenate(new_lengths),
        np.array(new_counts),
    )
