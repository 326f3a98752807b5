"""Several processes encode the blocks of one text; the ids come back in its order."""

import signal
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context

import numpy as np

from cs_lm.tokenizer.tokenizer import BPETokenizer

_worker: BPETokenizer | None = None


class ParallelEncoder:
    """A tokenizer whose `encode_blocks` works in several processes, with the same result.

    Cost: a block for each process is waiting, one is being encoded, one is given back: memory
    does not follow the length of the text.
    """

    def __init__(self, tokenizer: BPETokenizer, num_workers: int):
        self._tokenizer, self._num_workers = tokenizer, num_workers
        self.vocab_size, self.fingerprint = tokenizer.vocab_size, tokenizer.fingerprint

    def encode_blocks(self, parts: Iterable[str]) -> Iterator[np.ndarray]:
        blocks = self._tokenizer.safe_blocks(parts)
        if self._num_workers == 1:
            yield from map(self._tokenizer.encode_block, blocks)
            return
        pool = ProcessPoolExecutor(
            self._num_workers, get_context("spawn"), _begin, (self._tokenizer,)
        )
        waiting: deque[Future] = deque()
        try:
            for block in blocks:
                waiting.append(pool.submit(_encode, block))
                if len(waiting) > 2 * self._num_workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except BrokenProcessPool:
            raise ValueError(
                "encode: a process ended by itself; is there enough memory? Try --num_workers 1"
            ) from None
        finally:
            processes = list((pool._processes or {}).values())
            pool.shutdown(wait=False, cancel_futures=True)
            for process in processes:
                process.terminate()


def _begin(tokenizer: BPETokenizer) -> None:
    """In a new process: the parent looks after Ctrl-C."""
    global _worker
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _worker = tokenizer


def _encode(block: str) -> np.ndarray:
    assert _worker is not None
    return _worker.encode_block(block)
