"""The word starts of GPT-2's split pattern, found for all characters at once.

`pretokenizer.SPLIT_PATTERN` is the definition. Here a few array operations find the same borders.
Each character has one of five classes, and a word begins where the class changes. Two special rules
of the pattern move some of these borders: white space leaves its last character to the word after
it, and English contractions are words.
"""

from collections.abc import Iterator
from functools import cache

import numpy as np
import regex

OTHER, LETTER, DIGIT, SPACE, WHITE_SPACE = range(5)
_NUM_CODE_POINTS = 0x110000
_AT_ONCE = 1 << 13
_APOSTROPHE = ord("'")
_IS_ONE_LETTER_ENDING = np.isin(np.arange(256), [ord(letter) for letter in "sdmt"])
_TWO_LETTER_ENDINGS = [(ord(ending[0]), ord(ending[1])) for ending in ("ll", "ve", "re")]


@cache
def character_classes() -> np.ndarray:
    """The class of every code point, as the regex module's \\p{L}, \\p{N} and \\s define it."""
    classes = np.full(_NUM_CODE_POINTS, OTHER, np.uint8)  # 1.1 MB
    for first in range(0, _NUM_CODE_POINTS, 1 << 12):  # in parts, to use little memory
        codes = np.arange(first, first + (1 << 12), dtype=np.uint32)
        codes[(codes >= 0xD800) & (codes < 0xE000)] = 0  # surrogates are no characters
        text = codes.tobytes().decode("utf-32-le")
        for pattern, kind in ((r"\p{L}+", LETTER), (r"\p{N}+", DIGIT), (r"\s+", WHITE_SPACE)):
            for match in regex.finditer(pattern, text):
                classes[first + match.start() : first + match.end()] = kind
    classes[ord(" ")] = SPACE
    return classes


def word_starts(text: str) -> np.ndarray:
    """Offsets, in bytes of the UTF-8 text, at which its words begin; the first is 0.

    Shapes: returns (W) int64 for a text of W words, without special tokens
    """
    if not text:
        return np.zeros(0, np.int64)
    if text.isascii():
        data = text.encode("ascii")
        classes = np.frombuffer(data.translate(_ascii_classes()), np.uint8)
        return np.flatnonzero(_begins_word(np.frombuffer(data, np.uint8), classes))
    characters = np.frombuffer(text.encode("utf-32-le"), np.uint32)
    classes = np.empty(len(characters), np.uint8)
    for first in range(0, len(characters), _AT_ONCE):  # in parts: each index takes 8 bytes
        some = slice(first, first + _AT_ONCE)
        classes[some] = character_classes()[characters[some]]
    starts = np.flatnonzero(_begins_word(characters, classes))
    more_bytes = (characters >= 0x80).astype(np.uint8)
    more_bytes += characters >= 0x800
    more_bytes += characters >= 0x10000
    del characters, classes
    more_before = np.cumsum(more_bytes, dtype=np.int32)
    more_before -= more_bytes
    return starts + more_before[starts]


def word_slices(text: str, max_words: int) -> Iterator[tuple[bytes, np.ndarray]]:
    """(UTF-8 text, offsets of its words) of equal slices of at most `max_words` words."""
    data, starts = text.encode("utf-8"), word_starts(text)
    num_slices = -(-len(starts) // max_words)
    size = -(-len(starts) // max(num_slices, 1))
    for index in range(0, len(starts), size or 1):
        some = starts[index : index + size]
        end = starts[index + size] if index + size < len(starts) else len(data)
        yield data[some[0] : end], some - some[0]


def cut(data: bytes, starts: np.ndarray, chosen: np.ndarray) -> list[bytes]:
    """The words with the indices `chosen`; `starts` has the offsets of all words."""
    ends = np.append(starts[1:], len(data))
    return [data[a:b] for a, b in zip(starts[chosen].tolist(), ends[chosen].tolist())]


@cache
def _ascii_classes() -> bytes:
    return character_classes()[:256].tobytes()


def _begins_word(characters: np.ndarray, classes: np.ndarray) -> np.ndarray:
    """For each character, whether a word begins there."""
    runs = np.minimum(classes, SPACE)  # all white space makes one run
    begins = np.empty(len(characters), bool)
    begins[0] = True
    np.not_equal(runs[1:], runs[:-1], out=begins[1:])
    # white space before a word: its last character is separate, and a space joins the word
    run_ends = np.flatnonzero((runs[:-1] == SPACE) & begins[1:])
    begins[run_ends] = True
    begins[run_ends + 1] = classes[run_ends] != SPACE
    _begin_after_contractions(characters, begins)
    return begins


def _begin_after_contractions(characters: np.ndarray, begins: np.ndarray) -> None:
    """Joins an apostrophe at a word start with a following s, d, m, t, ll, ve or re to a word."""
    end = len(characters)
    at = np.flatnonzero(characters[: end - 1] == _APOSTROPHE)
    at = at[begins[at]]
    if not len(at):
        return
    next_one = characters[at + 1]
    next_two = np.where(at + 2 < end, characters[np.minimum(at + 2, end - 1)], 0)
    is_short = _IS_ONE_LETTER_ENDING[np.minimum(next_one, 255)]
    is_long = np.zeros(len(at), bool)
    for first, second in _TWO_LETTER_ENDINGS:
        is_long |= (next_one == first) & (next_two == second)
    for found, length in ((at[is_short], 2), (at[is_long], 3)):
        begins[found + 1] = False
        behind = found + length
        begins[behind[behind < end]] = True
