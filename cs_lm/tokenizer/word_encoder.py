"""Encodes ordinary text in blocks: different words get numbers, and each is encoded once."""

import threading
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import numpy as np

from cs_lm.tokenizer.merge_table import MergeTable
from cs_lm.tokenizer.pretokenizer import SpecialTokenSplitter
from cs_lm.tokenizer.word_boundaries import character_classes, cut, word_slices
from cs_lm.tokenizer.word_table import MAX_BYTES, WordTable

BLOCK_CHARS = 1 << 16  # arrays of this length stay in the processor's cache
_WHOLE_TEXT = SpecialTokenSplitter()

# Words of at most so many bytes are encoded together if there are at least `_BATCH` of them.
_LONGEST_IN_BATCH = 256
_BATCH = 32
# Memory for the cache of words without a number.
_OTHERS_BYTES = 1 << 18
_ENTRY_BYTES = 250  # of a dictionary entry: an empty word and an empty array
# Memory is allocated for this many ids per word on average. A slice with a quarter of `max_words`
# always fits, because a numbered word has at most 16 ids.
_IDS_A_WORD = 4


class BatchLimits(NamedTuple):
    """Size of a batch: a larger batch is faster, and needs more memory."""

    words: int = 1 << 13
    new_words: int = 1 << 11


DEFAULT_LIMITS = BatchLimits()


class WordEncoder:
    """Encodes text without special tokens to ids; ids between texts stay as they are.

    encode_word  ids of one word; raises UserError for a byte that the vocabulary lacks
    max_words    different words in the cache, 8 or more; a full cache is cleared; its memory, 64
                 bytes per word, is allocated at the start and never grows
    Threads may share it: one encodes at a time.
    """

    def __init__(
        self, merges: MergeTable, encode_word: Callable[[bytes], list[int]], max_words: int
    ):
        self._merges, self._encode_word, self._max_words = merges, encode_word, max_words
        self._lock = threading.Lock()
        self._numbers = WordTable(max_words)
        self._first = np.zeros(max_words, np.int32)
        self._length = np.zeros(max_words, np.int32)
        self._ids = np.zeros(_IDS_A_WORD * max_words, np.int32)
        self._num_ids = 0
        self._new_words: list[bytes] = []  # numbered, not encoded yet
        self._others: dict[bytes, np.ndarray] = {}
        self._others_bytes = 0
        character_classes()  # allocate its table at the start, too

    def encode(
        self, segments: Iterable[str | int], at_once: BatchLimits = DEFAULT_LIMITS
    ) -> list[np.ndarray]:
        """The ids (int32) of all texts, in parts; ids between the texts stay as they are.

        The words of all texts are numbered before the new words are encoded: in a larger batch,
        each word takes less time.
        """
        with self._lock:
            try:
                return list(self._encode(segments, at_once))
            except BaseException:  # an interrupt may leave a number without its word
                self._forget()
                raise

    def _encode(self, segments: Iterable[str | int], at_once: BatchLimits) -> Iterator[np.ndarray]:
        waiting = []
        for segment in segments:
            if isinstance(segment, int):
                waiting.append(np.array([segment], np.int32))
                continue
            for data, starts in self._slices(segment, at_once.words):
                has_room = self._has_room(len(starts))
                if not has_room or len(self._new_words) >= at_once.new_words:
                    yield from self._ids_of_all(waiting, at_once.new_words * MAX_BYTES // 2)
                if not has_room:
                    self._forget()
                numbers, new = self._numbers.numbers(data, starts)
                self._new_words += cut(data, starts, new)
                waiting.append((numbers, cut(data, starts, np.flatnonzero(numbers < 0))))
        yield from self._ids_of_all(waiting, at_once.new_words * MAX_BYTES // 2)

    def _slices(self, text: str, most_words: int) -> Iterator[tuple[bytes, np.ndarray]]:
        max_words = min(self._max_words // _IDS_A_WORD, most_words)
        for block in _WHOLE_TEXT.safe_blocks([text], BLOCK_CHARS):
            yield from word_slices(block, max_words)

    def _has_room(self, num_words: int) -> bool:
        new_ids = MAX_BYTES * (len(self._new_words) + num_words)
        is_room_for_ids = self._num_ids + new_ids <= len(self._ids)
        return is_room_for_ids and self._numbers.count + num_words <= self._max_words

    def _ids_of_all(
        self, waiting: list[np.ndarray | tuple], bytes_at_once: int
    ) -> Iterator[np.ndarray]:
        """Encodes the new words, then yields the ids of all that waited for them."""
        if self._new_words:
            self._encode_new_words(bytes_at_once)
        waiting.reverse()
        while waiting:
            one = waiting.pop()
            yield self._ids_of(*one, bytes_at_once) if isinstance(one, tuple) else one

    def _ids_of(self, numbers, others: list[bytes], bytes_at_once: int) -> np.ndarray:
        """The ids of words by their numbers; a negative number stands for the next of `others`."""
        lengths = self._length[numbers]
        other = np.flatnonzero(numbers < 0)
        other_ids = self._encode_others(others, bytes_at_once)
        lengths[other] = [len(word_ids) for word_ids in other_ids]
        id_ends = np.cumsum(lengths, dtype=np.int32)
        id_starts = id_ends - lengths
        source = np.repeat(self._first[numbers] - id_starts, lengths)
        source += np.arange(len(source), dtype=np.int32)
        ids = self._ids.take(source, mode="clip")  # arbitrary for the other words, replaced below
        for place, word_ids in zip(other.tolist(), other_ids):
            ids[id_starts[place] : id_ends[place]] = word_ids
        return ids

    def _encode_others(self, words: list[bytes], bytes_at_once: int) -> list[np.ndarray]:
        """The ids of words that have no number."""
        if self._others_bytes > _OTHERS_BYTES:
            self._others.clear()
            self._others_bytes = 0
        unknown = list(dict.fromkeys(word for word in words if word not in self._others))
        short = [word for word in unknown if len(word) <= _LONGEST_IN_BATCH]
        encoded = {}
        if len(short) >= _BATCH:
            ids, lengths = self._merges.encode_words(short, bytes_at_once)
            encoded = dict(zip(short, np.split(ids, np.cumsum(lengths)[:-1])))
        for word in unknown:
            if word not in encoded:
                encoded[word] = np.array(self._encode_word(word), np.int32)
        self._others.update((word, encoded[word]) for word in short)
        self._others_bytes += sum(_ENTRY_BYTES + len(w) + encoded[w].nbytes for w in short)
        return [self._others[word] if word in self._others else encoded[word] for word in words]

    def _forget(self) -> None:
        self._numbers.clear()
        self._num_ids = 0
        self._new_words = []

    def _encode_new_words(self, bytes_at_once: int) -> None:
        words, self._new_words = self._new_words, []
        ids, lengths = self._merges.encode_words(words, bytes_at_once)
        if ids.min() < 0:
            for word in words:
                self._encode_word(word)  # raises the error with the missing byte
        to = slice(self._numbers.count - len(words), self._numbers.count)
        self._first[to], self._length[to] = self._num_ids + np.cumsum(lengths) - lengths, lengths
        self._ids[self._num_ids : self._num_ids + len(ids)] = ids
        self._num_ids += len(ids)
