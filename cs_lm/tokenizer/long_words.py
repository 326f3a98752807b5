"""One word of many thousand bytes: cut into windows, encoded together, and joined again exactly.

Neighbouring windows overlap. Where both have a token at the same place, the tokens before it are
taken from the one and the others from the other.

Why that is exact: where merges are as training finds them (each token made once, and after its
parts), a row of tokens is the encoding of its bytes if, and only if, each two neighbours in it are
the encoding of theirs; and in what is joined here, every two neighbours stand side by side in the
encoding of a window, too.
Source: the criterion of neighbours is GitHub's, So many tokens, so little time (2024).
"""

from collections.abc import Callable

import numpy as np

from cs_lm.tokenizer.merge_table import MergeTable

# Stride and overlap of windows: the longer ones are for words whose tokens are longer.
_SIZES = ((48, 16), (512, 256))
# From this share of windows that do not join on, longer ones are tried.
_MOST_FAILED = 1 / 8

EncodeWhole = Callable[[bytes], tuple[np.ndarray, np.ndarray]]


def encode_long_word(word: bytes, merges: MergeTable, encode_whole: EncodeWhole) -> np.ndarray:
    """The ids (int32) of the word's tokens, -1 for a byte that is none. `merges` are proper.

    encode_whole  ids and lengths in bytes of a window that became longer, as others do not join
    Cost: linear, as long as windows have tokens in common; a stretch where they have none (tokens
    longer than the overlap) becomes one window.
    """
    borders = merges.sure_borders(word)
    if 8 * len(borders) > len(word):  # most places are: what is between them is short
        return _encode_pieces(word, borders, merges)
    for stride, overlap in _SIZES:
        starts = np.arange(0, max(len(word) - overlap, 1), stride)
        ends = np.minimum(starts + stride + overlap, len(word))
        ids, lengths, counts = merges.encode_windows(_cut(word, starts, ends))
        joints = _joints(len(word), starts, ends, lengths, counts)
        if (joints < 0).sum() <= _MOST_FAILED * len(starts):
            break
    while len(failed := np.flatnonzero(joints < 0)):  # between window i and i + 1
        starts, ends, ids, lengths, counts = _grown(
            word, failed, (starts, ends, ids, lengths, counts), encode_whole
        )
        joints = _joints(len(word), starts, ends, lengths, counts)
    first = np.concatenate(([0], joints))  # of each window, from where on its tokens are taken
    last = np.concatenate((joints, [len(word)]))
    at = _places(starts, lengths, counts)
    window = np.repeat(np.arange(len(starts)), counts)
    return ids[(at >= first[window]) & (at < last[window])]


def _encode_pieces(word: bytes, borders: np.ndarray, merges: MergeTable) -> np.ndarray:
    """What lies between places that no merge crosses: single bytes, and short words."""
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
    """Where in the word each token of each window begins."""
    ends = np.cumsum(lengths)
    before_window = np.concatenate(([0], ends[np.cumsum(counts)[:-1] - 1]))
    return ends - lengths + np.repeat(starts - before_window, counts)


def _joints(size: int, starts, ends, lengths, counts) -> np.ndarray:
    """For each two neighbouring windows, where a token begins that both have; -1: nowhere."""
    at = _places(starts, lengths, counts)
    is_odd = np.repeat(np.arange(len(starts)) % 2 == 1, counts)
    ends_of = np.full((2, size), -1, np.int32)  # of the tokens that begin at each place
    for parity, chosen in enumerate((~is_odd, is_odd)):
        ends_of[parity, at[chosen]] = at[chosen] + lengths[chosen]
    shared = np.flatnonzero((ends_of[0] == ends_of[1]) & (ends_of[0] >= 0))
    shared = np.append(shared, size)
    found = shared[np.searchsorted(shared, starts[1:])]
    return np.where(found < ends[:-1], found, -1)


def _grown(word: bytes, failed, windows, encode_whole: EncodeWhole):
    """The windows, with each run of those that could not be joined as one, larger by neighbours."""
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
