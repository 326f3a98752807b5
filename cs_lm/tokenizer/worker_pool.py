"""Worker processes that take tasks from one queue and put results into another.

They start from this module and never import the caller's main module. So they work from a notebook,
from standard input, and from a script without a main guard (`if __name__ == "__main__"`).
"""

import contextlib
import os
import pickle
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO, Protocol

from cs_lm.errors import UserError


class Tasks(Protocol):
    def get(self) -> Any: ...


class Results(Protocol):
    def put(self, result: Any) -> None: ...


# work(tasks, results, ...): takes tasks until it gets None. A module-level function (pickled).
Work = Callable[..., None]
_LOOK_AGAIN_S = 0.5
_LENGTH_BYTES = 8
_PROGRAM = (
    "import sys; sys.path[:] = {path!r}; from cs_lm.tokenizer.worker_pool import serve; serve()"
)
_END = object()


class WorkerGroup:
    """A context with worker processes. They are killed when the `with` block ends.

    work  runs in each process, called with tasks, results, and `args`
    Why not multiprocessing: spawned processes import the caller's main module, and forked ones
    copy locks whose threads do not exist in them.
    """

    def __init__(self, num_workers: int, work: Work, *args: Any):
        self._num_workers, self._start = num_workers, (work, args)
        self._tasks: queue.Queue = queue.Queue(maxsize=num_workers)
        self._results: queue.Queue = queue.Queue()
        self._processes: list[subprocess.Popen] = []
        self._collectors: list[threading.Thread] = []
        self._error: Exception | None = None  # the first error of a process

    def __enter__(self) -> "WorkerGroup":
        try:
            start = pickle.dumps(self._start)
            for _ in range(self._num_workers):
                self._processes.append(_started_process())
            for process in self._processes:
                feeder = threading.Thread(target=self._feed, args=(process, start), daemon=True)
                collector = threading.Thread(target=self._collect, args=(process,), daemon=True)
                self._collectors.append(collector)
                feeder.start()
                collector.start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_exception) -> None:
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.wait()
        for _ in self._processes:  # wake its thread, which waits for a task
            with contextlib.suppress(queue.Full):
                self._tasks.put_nowait(_END)

    def put(self, task: Any) -> None:
        """Adds a task; waits until the queue has room.

        Raises: UserError when a process has ended, or the error that a process raised.
        """
        data = pickle.dumps(task, pickle.HIGHEST_PROTOCOL)
        while True:
            try:
                return self._tasks.put((task is None, data), timeout=_LOOK_AGAIN_S)
            except queue.Full:
                self._raise_error()
                if ended := self._ended():  # although none should end yet
                    raise _death(ended[0]) from None

    def get(self) -> Any:
        """The next result. Raises: UserError when a process has died, or the error it raised."""
        while True:
            self._raise_error()
            try:
                return self._results.get(timeout=_LOOK_AGAIN_S)
            except queue.Empty:
                self._raise_error()
                ended = self._ended()
                dead = [process for process in ended if process.returncode]
                if (dead or len(ended) == len(self._processes)) and self._results.empty():
                    raise _death((dead or ended)[0]) from None

    def ready(self) -> Iterator[Any]:
        """The results that have already arrived; does not wait."""
        while True:
            try:
                yield self._results.get_nowait()
            except queue.Empty:
                return

    def _raise_error(self) -> None:
        if self._error is not None:
            raise self._error

    def _ended(self) -> list[subprocess.Popen]:
        """The processes that have ended and whose results have all been collected."""
        return [
            process
            for process, collector in zip(self._processes, self._collectors)
            if process.poll() is not None and not collector.is_alive()
        ]

    def _feed(self, process: subprocess.Popen, start: bytes) -> None:
        """Thread for one process: writes tasks to it as fast as it reads them."""
        with contextlib.suppress(OSError):
            _write(process.stdin, start)
            while (task := self._tasks.get()) is not _END:
                is_last, data = task
                _write(process.stdin, data)
                if is_last:
                    return

    def _collect(self, process: subprocess.Popen) -> None:
        with contextlib.suppress(EOFError, OSError):
            while True:
                is_error, result = pickle.loads(_read(process.stdout))
                if is_error:
                    self._error = self._error or result
                else:
                    self._results.put(result)


def _death(process: subprocess.Popen) -> UserError:
    return UserError(
        f"tokenizer: a process ended with status {process.returncode}; is there enough memory? "
        "--num_workers 1 needs less"
    )


def _started_process() -> subprocess.Popen:
    path = [os.path.abspath(entry) for entry in sys.path]  # "" is the current folder
    argv = [sys.executable, "-c", _PROGRAM.format(path=path)]
    # block Ctrl-C in the new process until it ignores the signal itself
    is_posix = hasattr(signal, "pthread_sigmask")
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT}) if is_posix else None
    try:
        return subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    finally:
        if is_posix:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _write(file: BinaryIO, data: bytes) -> None:
    file.write(len(data).to_bytes(_LENGTH_BYTES, "little"))
    file.write(data)
    file.flush()


def _read(file: BinaryIO) -> bytes:
    """One message. Raises: EOFError when the other side has ended."""
    size = int.from_bytes(_exactly(file, _LENGTH_BYTES), "little")
    return _exactly(file, size)


def _exactly(file: BinaryIO, size: int) -> bytes:
    data = file.read(size)
    if len(data) != size:
        raise EOFError
    return data


# ---- in the process ----


class _Pipe:
    """Reads tasks, writes results; the process exits when its parent ends, even if killed."""

    def __init__(self):
        self._tasks = os.fdopen(os.dup(0), "rb")
        self._results = os.fdopen(os.dup(1), "wb")
        os.dup2(2, 1)  # printed text must not mix with results

    def get(self) -> Any:
        try:
            return pickle.loads(_read(self._tasks))
        except EOFError:
            os._exit(1)

    def put(self, result: Any, is_error: bool = False) -> None:
        try:
            _write(self._results, pickle.dumps((is_error, result), pickle.HIGHEST_PROTOCOL))
        except BrokenPipeError:
            os._exit(1)


def serve() -> None:
    """The main function of a worker process: calls `work` with tasks, results and `args`."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C, and ends this
    pipe = _Pipe()
    work, args = pipe.get()
    try:
        work(pipe, pipe, *args)
    except (ValueError, MemoryError) as error:
        pipe.put(error, is_error=True)
