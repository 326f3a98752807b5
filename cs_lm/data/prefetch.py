"""Prepares the next batch in a thread while this one is used."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Generic, TypeVar

from cs_lm.data.batches import Batch, BatchSource, Copied

Item = TypeVar("Item")


def _as_it_is(value: Any) -> Any:
    return value


class Prefetcher(Generic[Item]):
    """Calls a function of an index, and lets a thread prepare the value of the next index.

    Any index is allowed; only the one after the last index is prepared.

    receive  applied to each value in the caller's thread
    """

    def __init__(self, function: Callable[[int], Any], receive: Callable[[Any], Item] = _as_it_is):
        self._function, self._receive = function, receive
        self._worker = ThreadPoolExecutor(1, "prefetch")
        self._next: tuple[int, Future] | None = None

    def __call__(self, index: int) -> Item:
        """The value for the index. Raises: the function's exception for it."""
        prepared, self._next = self._next, None
        if prepared is not None and prepared[0] == index:
            item = prepared[1].result()
        else:
            item = self._function(index)
        self._next = index + 1, self._worker.submit(self._function, index + 1)
        return self._receive(item)


def steps_ahead(source: BatchSource, grad_accum: int) -> Prefetcher[list[Batch]]:
    """Maps a step number to its micro-batches, and prepares those of the next step meanwhile."""

    def copied(step: int) -> list[Copied]:
        return [source.copied(step * grad_accum + index) for index in range(grad_accum)]

    return Prefetcher(copied, lambda batches: [batch.received() for batch in batches])
