"""Several processes encode the blocks of one text; the ids come back in the order of the text."""

from collections.abc import Iterable, Iterator

import numpy as np

from cs_lm.tokenizer.tokenizer import BPETokenizer
from cs_lm.tokenizer.worker_pool import Results, Tasks, WorkerGroup


class ParallelEncoder:
    """A tokenizer whose `encode_each` works in several processes, with the same result.

    Cost: a few blocks per process in memory, whatever the length of the text.
    """

    def __init__(self, tokenizer: BPETokenizer, num_workers: int):
        self._tokenizer, self._num_workers = tokenizer, num_workers
        self.vocab_size, self.fingerprint = tokenizer.vocab_size, tokenizer.fingerprint

    def safe_blocks(self, parts: Iterable[str]) -> Iterator[str]:
        return self._tokenizer.safe_blocks(parts)

    def encode_each(self, blocks: Iterable[str]) -> Iterator[np.ndarray]:
        if self._num_workers == 1:
            yield from self._tokenizer.encode_each(blocks)
        else:
            yield from self._encode_in_processes(iter(blocks))

    def _encode_in_processes(self, blocks: Iterator[str]) -> Iterator[np.ndarray]:
        under_way = 4 * self._num_workers
        early: dict[int, np.ndarray] = {}  # ids of later blocks that have arrived first
        num_put = num_given = 0
        with WorkerGroup(self._num_workers, _encode, self._tokenizer) as workers:
            while True:
                if num_put - num_given < under_way and (block := next(blocks, None)) is not None:
                    workers.put((num_put, block))
                    num_put += 1
                    continue
                if num_given == num_put:
                    return
                while num_given not in early:
                    index, ids = workers.get()
                    early[index] = ids
                yield early.pop(num_given)
                num_given += 1


def _encode(tasks: Tasks, results: Results, tokenizer: BPETokenizer) -> None:
    while (task := tasks.get()) is not None:
        index, block = task
        results.put((index, tokenizer.encode_block(block)))
