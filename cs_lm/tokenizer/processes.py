"""Processes that take tasks from one queue and put results into another, and end when told to."""

import os
import queue
import signal
import threading
from collections.abc import Callable
from multiprocessing import get_context, parent_process
from multiprocessing.connection import wait
from multiprocessing.queues import Queue
from typing import Any

# work(tasks, results, ...): takes tasks until it gets None
Work = Callable[..., None]
_LOOK_AGAIN_S = 0.5


class WorkerGroup:
    """Starts with the `with` block and ends with it, at once, however it is left.

    work  runs in each process, called with the two queues, the process's number and `args`
    Why not a ProcessPoolExecutor: interrupted while a large task is on its way, it may wait for
    ever for the process that should have taken it.
    """

    def __init__(self, num_workers: int, work: Work, *args: Any):
        context = get_context("spawn")
        self._tasks: Queue = context.Queue(maxsize=2 * num_workers)
        # what no process takes any more need not be written: the exit would wait for it for ever
        self._tasks.cancel_join_thread()
        self._results: Queue = context.Queue()
        self._processes = [
            context.Process(
                target=_run, args=(work, self._tasks, self._results, i, *args), daemon=True
            )
            for i in range(num_workers)
        ]

    def __enter__(self) -> "WorkerGroup":
        try:
            for process in self._processes:
                process.start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_exception) -> None:
        for process in self._processes:
            if process.pid is not None:
                process.terminate()
                process.join()

    def put(self, task: Any) -> None:
        """Waits for a place in the queue. Raises: ValueError when a process has died."""
        self._while_all_live(lambda: self._tasks.put(task, timeout=_LOOK_AGAIN_S))

    def get(self) -> Any:
        """Waits for a result. Raises: ValueError when a process has died."""
        return self._while_all_live(lambda: self._results.get(timeout=_LOOK_AGAIN_S))

    def _while_all_live(self, attempt: Callable[[], Any]) -> Any:
        while True:
            try:
                return attempt()
            except (queue.Full, queue.Empty):
                for process in self._processes:
                    if process.exitcode not in (None, 0):
                        raise ValueError(
                            f"tokenizer: a process ended with status {process.exitcode}; is there "
                            "enough memory, and does your script have an `if __name__ == "
                            "'__main__':`? --num_workers 1 needs neither"
                        ) from None


def _run(work: Work, tasks: Queue, results: Queue, index: int, *args: Any) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent is interrupted too, and ends this
    threading.Thread(target=_end_with_parent, daemon=True).start()
    work(tasks, results, index, *args)


def _end_with_parent() -> None:
    """Also where the parent is killed, and cannot end anything any more."""
    wait([parent_process().sentinel])
    os._exit(1)
