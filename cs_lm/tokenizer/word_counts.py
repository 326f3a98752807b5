"""How often each word occurs in a text of any length, counted by several processes."""

import queue
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from multiprocessing import get_context
from multiprocessing.queues import Queue

from cs_lm.tokenizer.pieces import cut_pieces, words_of_piece
from cs_lm.tokenizer.pretokenizer import SpecialTokenSplitter

BLOCK_CHARS = 1 << 20
# Different pieces that are counted before their words are: about 60 MB.
MAX_PIECES = 1 << 19

WordProgress = Callable[[int], None]  # characters counted so far


class WordTally:
    """Counts words; special tokens split the text and are not counted.

    Cost: memory follows the number of distinct words, not the length of the text.
    """

    def __init__(self, special_tokens: Sequence[str] = ()):
        self._splitter = SpecialTokenSplitter(special_tokens)
        self._pieces: Counter[str] = Counter()
        self._words: Counter[str] = Counter()

    def add(self, text: str) -> None:
        for segment in self._splitter.split(text)[::2]:
            for words, pieces in cut_pieces(segment):
                self._words.update(words)
                self._pieces.update(pieces)
        if len(self._pieces) > MAX_PIECES:
            self._count_words_of_pieces()

    def counts(self) -> Counter[str]:
        self._count_words_of_pieces()
        return self._words

    def _count_words_of_pieces(self) -> None:
        for piece, count in self._pieces.items():
            for word in words_of_piece(piece):
                self._words[word] += count
        self._pieces.clear()


def count_words(
    parts: Iterable[str],
    special_tokens: Sequence[str] = (),
    num_workers: int = 1,
    progress: WordProgress | None = None,
    block_chars: int = BLOCK_CHARS,
) -> Counter[str]:
    """The counts of all words in the joined parts, the same for any number of workers.

    The text is cut where no word can reach across; where it is cut does not change the sum.
    """
    splitter = SpecialTokenSplitter(special_tokens)
    blocks = _reported(splitter.safe_blocks(parts, block_chars), progress)
    if num_workers > 1:
        return _count_in_processes(blocks, special_tokens, num_workers)
    tally = WordTally(special_tokens)
    for block in blocks:
        tally.add(block)
    return tally.counts()


def _reported(blocks: Iterable[str], progress: WordProgress | None) -> Iterator[str]:
    done = 0
    for block in blocks:
        yield block
        done += len(block)
        if progress is not None:
            progress(done)


def _count_in_processes(blocks: Iterable[str], special_tokens, num_workers: int) -> Counter[str]:
    """Each process takes blocks as it gets done with them, and gives its sum at the end."""
    context = get_context("spawn")
    tasks: Queue = context.Queue(maxsize=2 * num_workers)
    results: Queue = context.Queue()
    workers = [
        context.Process(target=_work, args=(tasks, results, special_tokens), daemon=True)
        for _ in range(num_workers)
    ]
    try:
        for worker in workers:
            worker.start()
        for block in blocks:
            _with_living(workers, lambda wait, block=block: tasks.put(block, timeout=wait))
        for _ in workers:
            _with_living(workers, lambda wait: tasks.put(None, timeout=wait))
        total: Counter[str] = Counter()
        for _ in workers:
            total.update(_with_living(workers, lambda wait: results.get(timeout=wait)))
        return total
    finally:
        for worker in workers:
            if worker.pid is not None:
                worker.terminate()
                worker.join()
        tasks.cancel_join_thread()  # what was not taken any more need not be written


def _with_living(workers, attempt: Callable):
    """Tries until it is done; a worker that died (out of memory?) would be waited for for ever."""
    while True:
        try:
            return attempt(1.0)
        except (queue.Full, queue.Empty):
            for worker in workers:
                if worker.exitcode not in (None, 0):
                    raise ValueError(
                        f"tokenizer: a counting process ended with status {worker.exitcode}; is "
                        "there enough memory? Try --num_workers 1"
                    ) from None


def _work(tasks: Queue, results: Queue, special_tokens: Sequence[str]) -> None:
    try:
        tally = WordTally(special_tokens)
        while (block := tasks.get()) is not None:
            tally.add(block)
        results.put(tally.counts())
    except KeyboardInterrupt:  # the parent was interrupted too, and says so
        pass
