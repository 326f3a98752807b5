"""Numbers 0, 1, 2, ... for different words of at most 16 bytes, many words at a time.

A hash table in arrays with open addressing. Its keys are the words themselves, as two integers of
eight bytes, so that equal numbers mean equal words. The hash only gives the first slot to search.
"""

import numpy as np

MAX_BYTES = 16
_EMPTY = -1
# Odd constants with well mixed bits (from the fractional parts of two square roots).
_FACTOR_LOW = np.uint64(0x9E3779B97F4A7C15)
_FACTOR_HIGH = np.uint64(0xBB67AE8584CAA73B)
# Entry n: the masks that keep the bytes of a word of n bytes in its first and second integer.
_LOW_MASKS, _HIGH_MASKS = (
    np.array([(1 << 8 * min(max(n - skipped, 0), 8)) - 1 for n in range(MAX_BYTES + 1)], np.uint64)
    for skipped in (0, 8)
)


class WordTable:
    """Gives each different word its number; `count` is how many words there are.

    Cost: 20 bytes per slot, at least two slots per word. Memory for `capacity` words is allocated
    at the start; the table grows when more words may come.
    """

    def __init__(self, capacity: int = 1 << 16):
        self._resize(2 * capacity)

    def clear(self) -> None:
        self.count = 0
        self._number.fill(_EMPTY)
        self._low.fill(0)

    def numbers(self, data: bytes, starts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The number of each word, or -1 for one that cannot be a key; and indices of new words.

        A key has at most 16 bytes and no byte 0, because zeros pad the shorter words.

        Shapes: starts (W) are the offsets of the words that `data` consists of; returns (W) int32
        and, for each new number in order, the index in [0, W) of a word that has it.
        """
        low, high, fits = _keys(data, starts)
        slots = self._slots(low, high)
        is_hit = self._low[slots] == low  # an empty slot has 0, and no key begins with it
        is_hit &= self._high[slots] == high
        is_hit &= fits
        numbers = self._number[slots]
        np.logical_not(is_hit, out=is_hit)
        numbers[is_hit] = -1
        others = np.flatnonzero(is_hit & fits)  # new, or not in their first slot
        new = self._find_or_claim(others, low[others], high[others], slots[others], numbers)
        return numbers, new

    def _find_or_claim(self, pending, low, high, slots, numbers: np.ndarray) -> np.ndarray:
        """Fills in the numbers of pending words; returns the indices of the new ones.

        Shapes: pending, low, high, slots have equal lengths; numbers (W) are those of all words
        """
        if 2 * (self.count + len(pending)) > len(self._number):  # all of them may be new
            self._grow(2 * (self.count + len(pending)))
            slots = self._slots(low, high)
        first_new = self.count
        places: list[np.ndarray] = []
        while len(pending):
            found = self._number[slots]
            is_free = found == _EMPTY
            is_hit = (self._low[slots] == low) & (self._high[slots] == high)
            numbers[pending[is_hit]] = found[is_hit]
            if is_free.any():
                places.append(self._claim(slots, pending, low, high, is_free))
            slots = np.where(is_free, slots, (slots + 1) & (len(self._number) - 1))
            left = ~is_hit
            pending, low, high, slots = pending[left], low[left], high[left], slots[left]
        new = np.concatenate(places) if places else np.zeros(0, np.int64)
        assert self.count - first_new == len(new)
        return new

    def _claim(self, slots, pending, keys_low, keys_high, is_free) -> np.ndarray:
        """Gives each free slot to one of the words that found it; returns the indices of these."""
        free_slots = slots[is_free]
        claims = np.flatnonzero(is_free).astype(np.int32)
        self._number[free_slots] = claims
        is_winner = self._number[free_slots] == claims
        won, winners = free_slots[is_winner], claims[is_winner]
        self._number[won] = np.arange(self.count, self.count + len(won), dtype=np.int32)
        self._low[won], self._high[won] = keys_low[winners], keys_high[winners]
        self.count += len(won)
        return pending[winners]

    def _slots(self, low: np.ndarray, high: np.ndarray) -> np.ndarray:
        mixed = low * _FACTOR_LOW ^ (high + np.uint64(1)) * _FACTOR_HIGH
        mixed = (mixed ^ mixed >> np.uint64(29)) * _FACTOR_LOW
        return (mixed >> self._shift).astype(np.int64)

    def _grow(self, num_slots: int) -> None:
        old_low, old_high, old_number, count = self._low, self._high, self._number, self.count
        self._resize(num_slots)
        self.count = count
        pending = np.flatnonzero(old_number != _EMPTY)
        slots = self._slots(old_low[pending], old_high[pending])
        while len(pending):  # all keys differ: no comparison is necessary
            is_free = self._number[slots] == _EMPTY
            self._number[slots[is_free]] = old_number[pending[is_free]]
            is_in = self._number[slots] == old_number[pending]
            self._low[slots[is_in]] = old_low[pending[is_in]]
            self._high[slots[is_in]] = old_high[pending[is_in]]
            pending, slots = pending[~is_in], (slots[~is_in] + 1) & (len(self._number) - 1)

    def _resize(self, size: int) -> None:
        size = 1 << max(4, size - 1).bit_length()
        self._low, self._high = np.zeros(size, np.uint64), np.zeros(size, np.uint64)
        self._number = np.full(size, _EMPTY, np.int32)
        self._shift = np.uint64(64 - size.bit_length() + 1)
        self.count = 0


def _keys(data: bytes, starts: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The first and second eight bytes of each word, and whether the word can be a key."""
    lengths = np.empty(len(starts), np.int64)
    np.subtract(starts[1:], starts[:-1], out=lengths[:-1])
    lengths[-1:] = len(data) - starts[-1:]
    # an integer of eight bytes at every offset
    eights = np.ndarray(len(data) + 8, "<u8", data + bytes(MAX_BYTES), strides=(1,))
    low, high = eights[starts], eights[starts + 8]
    fits = lengths <= MAX_BYTES
    if 0 in data:
        zeros = np.flatnonzero(np.frombuffer(data, np.uint8) == 0)
        fits[np.searchsorted(starts, zeros, side="right") - 1] = False
    np.minimum(lengths, MAX_BYTES, out=lengths)
    low &= _LOW_MASKS[lengths]
    high &= _HIGH_MASKS[lengths]
    return low, high, fits
