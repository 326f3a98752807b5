"""How often each word occurs in a text of any length, counted by several processes."""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from cs_lm.tokenizer.pretokenizer import SpecialTokenSplitter
from cs_lm.tokenizer.word_boundaries import cut, word_slices
from cs_lm.tokenizer.word_table import WordTable
from cs_lm.tokenizer.worker_pool import Results, Tasks, WorkerGroup

BLOCK_CHARS = 1 << 18  # arrays of this length stay in the processor's cache
_WORDS_AT_ONCE = 1 << 16

Report = Callable[[int], None]


class WordTally:
    """Counts words; special tokens split the text and are not counted.

    Cost: memory grows with the number of distinct words, not with the length of the text.
    """

    def __init__(self, special_tokens: Sequence[str] = ()):
        self._splitter = SpecialTokenSplitter(special_tokens)
        self._numbers = WordTable()
        self._words: list[bytes] = []
        self._counts = np.zeros(0, np.int64)  # of the numbered words
        self._others: Counter[bytes] = Counter()  # words that have no number

    def add(self, text: str) -> None:
        for segment in self._splitter.split(text)[::2]:
            for data, starts in word_slices(segment, _WORDS_AT_ONCE):
                self._add_words(data, starts)

    def _add_words(self, data: bytes, starts: np.ndarray) -> None:
        numbers, new = self._numbers.numbers(data, starts)
        self._words += cut(data, starts, new)
        counts = np.bincount(numbers[numbers >= 0], minlength=len(self._words))
        counts[: len(self._counts)] += self._counts
        self._counts = counts
        self._others.update(cut(data, starts, np.flatnonzero(numbers < 0)))

    @property
    def num_different(self) -> int:
        return len(self._words) + len(self._others)

    def counts(self) -> Counter[bytes]:
        counted = Counter(dict(zip(self._words, self._counts.tolist())))
        counted.update(self._others)
        return counted


def count_words(
    parts: Iterable[str],
    special_tokens: Sequence[str] = (),
    num_workers: int = 1,
    report: Report | None = None,
    block_chars: int = BLOCK_CHARS,
) -> Counter[bytes]:
    """The counts of all words in the joined parts, the same for any number of workers.

    The text is cut only between words, so that the counts do not depend on the cuts.

    report  called now and then with the number of different words that one process has seen
    """
    blocks = SpecialTokenSplitter(special_tokens).safe_blocks(parts, block_chars)
    report = report or (lambda num_different: None)
    if num_workers > 1:
        return _count_in_processes(blocks, special_tokens, num_workers, report)
    tally = WordTally(special_tokens)
    for block in blocks:
        tally.add(block)
        report(tally.num_different)
    return tally.counts()


def _count_in_processes(
    blocks: Iterable[str], special_tokens, num_workers: int, report: Report
) -> Counter[bytes]:
    """Each process takes a block whenever it is free, and returns its counts at the end."""
    met, total, num_left = 0, Counter(), num_workers
    with WorkerGroup(num_workers, _work, special_tokens) as workers:
        for block in blocks:
            workers.put(block)
            met = max([met, *workers.ready()])
            report(met)
        for _ in range(num_workers):
            workers.put(None)
        while num_left:
            found = workers.get()
            if isinstance(found, Counter):
                total.update(found)
                num_left -= 1
    return total


def _work(tasks: Tasks, results: Results, special_tokens: Sequence[str]) -> None:
    tally = WordTally(special_tokens)
    while (block := tasks.get()) is not None:
        tally.add(block)
        results.put(tally.num_different)
    results.put(tally.counts())
