"""Ids of ordinary text, a block at a time: words are numbered, and each is encoded once."""

from collections.abc import Callable, Iterable, Iterator

import numpy as np

from cs_lm.tokenizer.merge_table import MergeTable
from cs_lm.tokenizer.pretokenizer import SpecialTokenSplitter
from cs_lm.tokenizer.word_borders import character_classes, cut, word_slices
from cs_lm.tokenizer.word_numbers import MAX_BYTES, WordNumbers

BLOCK_CHARS = 1 << 16  # arrays of this length stay in the processor's cache
_WHOLE_TEXT = SpecialTokenSplitter()

# Words of up to so many bytes are encoded together, if they are as many as this at least.
_LONGEST_IN_BATCH = 256
_BATCH = 32
_MOST_IN_BATCH = 1 << 10
# So many words without a number are remembered, at about 300 bytes each.
_MAX_OTHERS = 1 << 10
# Memory is claimed for this many ids a word on average. A slice of a quarter of all words fits in
# it whatever they are, as a numbered word has 16 ids at most.
_IDS_A_WORD = 4
_WORDS_AT_ONCE = 1 << 12


class WordEncoder:
    """Text without special tokens, and ids -> ids.

    encode_word  ids of one word; raises ValueError for a byte that the vocabulary lacks
    max_words    different words remembered before all are forgotten, 8 or more; memory for them,
                 64 bytes each, is claimed at the start and never grows
    """

    def __init__(
        self, merges: MergeTable, encode_word: Callable[[bytes], list[int]], max_words: int
    ):
        self._merges, self._encode_word, self._max_words = merges, encode_word, max_words
        self._numbers = WordNumbers(max_words)
        self._first = np.zeros(max_words, np.int32)
        self._length = np.zeros(max_words, np.int32)
        self._ids = np.zeros(_IDS_A_WORD * max_words, np.int32)
        self._num_ids = 0
        self._new_words: list[bytes] = []  # numbered, not encoded yet
        self._others: dict[bytes, np.ndarray] = {}
        character_classes()  # memory for it, too, is claimed at the start

    def encode(self, segments: Iterable[str | int]) -> np.ndarray:
        """The ids (int32) of texts and, as they are, of ids between them.

        The words of all texts are numbered before the new ones are encoded: the more of them there
        are, the less time each one takes.
        """
        try:
            parts = list(self._encode(segments))
        except BaseException:  # an interrupt, too, may come between a number and its word
            self._forget()
            raise
        return np.concatenate(parts) if parts else np.zeros(0, np.int32)

    def _encode(self, segments: Iterable[str | int]) -> Iterator[np.ndarray]:
        waiting = []
        for segment in segments:
            if isinstance(segment, int):
                waiting.append(np.array([segment], np.int32))
                continue
            for data, starts in self._slices(segment):
                has_room = self._has_room(len(starts))
                if not has_room or len(self._new_words) >= _MOST_IN_BATCH:
                    yield from self._ids_of_all(waiting)
                    waiting = []
                if not has_room:
                    self._forget()
                numbers, new = self._numbers.numbers(data, starts)
                self._new_words += cut(data, starts, new)
                waiting.append((numbers, cut(data, starts, np.flatnonzero(numbers < 0))))
        yield from self._ids_of_all(waiting)

    def _slices(self, text: str) -> Iterator[tuple[bytes, np.ndarray]]:
        max_words = min(self._max_words // _IDS_A_WORD, _WORDS_AT_ONCE)
        for block in _WHOLE_TEXT.safe_blocks([text], BLOCK_CHARS):
            yield from word_slices(block, max_words)

    def _has_room(self, num_words: int) -> bool:
        new_ids = MAX_BYTES * (len(self._new_words) + num_words)
        is_room_for_ids = self._num_ids + new_ids <= len(self._ids)
        return is_room_for_ids and self._numbers.count + num_words <= self._max_words

    def _ids_of_all(self, waiting: list[np.ndarray | tuple]) -> Iterator[np.ndarray]:
        """Of what has waited for the new words: ids as they are, those of words looked up."""
        if self._new_words:
            self._encode_new_words()
        return (self._ids_of(*one) if isinstance(one, tuple) else one for one in waiting)

    def _ids_of(self, numbers: np.ndarray, others: list[bytes]) -> np.ndarray:
        """The ids of words with numbers, and of the others where the number is negative."""
        lengths = self._length[numbers]
        other = np.flatnonzero(numbers < 0)
        other_ids = self._encode_others(others)
        lengths[other] = [len(word_ids) for word_ids in other_ids]
        id_ends = np.cumsum(lengths, dtype=np.int64)
        id_starts = id_ends - lengths
        source = np.repeat(self._first[numbers] - id_starts, lengths) + np.arange(lengths.sum())
        ids = self._ids.take(source, mode="clip")  # of the other words: anything, for now
        for place, word_ids in zip(other.tolist(), other_ids):
            ids[id_starts[place] : id_ends[place]] = word_ids
        return ids

    def _encode_others(self, words: list[bytes]) -> list[np.ndarray]:
        """The ids of words that have no number."""
        if len(self._others) > _MAX_OTHERS:
            self._others.clear()
        unknown = list(dict.fromkeys(word for word in words if word not in self._others))
        short = [word for word in unknown if len(word) <= _LONGEST_IN_BATCH]
        encoded = {}
        if len(short) >= _BATCH:
            ids, lengths = self._merges.encode_words(short)
            encoded = dict(zip(short, np.split(ids, np.cumsum(lengths)[:-1])))
        for word in unknown:
            if word not in encoded:
                encoded[word] = np.array(self._encode_word(word), np.int32)
        self._others.update((word, encoded[word]) for word in short)
        return [self._others[word] if word in self._others else encoded[word] for word in words]

    def _forget(self) -> None:
        self._numbers.clear()
        self._num_ids = 0
        self._new_words = []

    def _encode_new_words(self) -> None:
        words, self._new_words = self._new_words, []
        begin = self._numbers.count - len(words)
        for start in range(0, len(words), _MOST_IN_BATCH):
            batch = words[start : start + _MOST_IN_BATCH]
            ids, lengths = self._merges.encode_words(batch)
            if ids.min() < 0:
                self._forget()
                for word in batch:
                    self._encode_word(word)  # says which byte is missing
            to = slice(begin + start, begin + start + len(batch))
            self._first[to], self._length[to] = (
                self._num_ids + np.cumsum(lengths) - lengths,
                lengths,
            )
            self._ids[self._num_ids : self._num_ids + len(ids)] = ids
            self._num_ids += len(ids)
