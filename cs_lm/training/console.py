"""Terminal output of a run: log lines, progress bar, stopwatch, formats of numbers."""

import contextlib
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TextIO

from cs_lm.training.throughput import Speed

_PREFIXES = {logging.WARNING: "WARNING: ", logging.ERROR: "error: "}


class _LineHandler(logging.Handler):
    """Passes each message to a function as a line; warnings and errors get a prefix."""

    def __init__(self, write_line: Callable[[str], None]):
        super().__init__()
        self._write_line = write_line

    def emit(self, record: logging.LogRecord) -> None:
        self._write_line(_PREFIXES.get(record.levelno, "") + record.getMessage())


@contextmanager
def log_to(write_line: Callable[[str], None], level: int = logging.INFO) -> Iterator[None]:
    """While entered, passes each message of the logger `cs_lm` to the function, as a line.

    level  messages below it are left out
    This replaces the function of an outer `log_to`; other handlers of the logger stay.
    """
    logger = logging.getLogger("cs_lm")
    before, level_before = logger.handlers[:], logger.level
    handler = _LineHandler(write_line)
    handler.setLevel(level)
    others = [one for one in before if not isinstance(one, _LineHandler)]
    logger.handlers[:] = [*others, handler]
    logger.setLevel(min(logging.INFO, level_before or logging.INFO))
    propagates, logger.propagate = logger.propagate, not logging.getLogger().handlers
    try:
        yield
    finally:
        logger.propagate = propagates
        logger.handlers[:] = before
        logger.setLevel(level_before)


class Stopwatch:
    """Elapsed seconds; time inside `pause()` does not count."""

    def __init__(self):
        self._start = time.perf_counter()
        self._paused_s = 0.0

    @property
    def elapsed_s(self) -> float:
        return time.perf_counter() - self._start - self._paused_s

    @contextmanager
    def pause(self) -> Iterator[None]:
        start_s = time.perf_counter()
        try:
            yield
        finally:
            self._paused_s += time.perf_counter() - start_s


class Display:
    """A progress bar on a terminal if tqdm is installed, otherwise plain lines."""

    def __init__(self, num_steps: int, first_step: int, file: TextIO | None = None):
        self._file = file or sys.stdout
        self._num_steps = num_steps
        self._bar = None
        if self._file.isatty():
            try:
                from tqdm import tqdm
            except ImportError:
                return
            self._bar = tqdm(
                total=num_steps,
                initial=first_step,
                file=self._file,
                unit="step",
                dynamic_ncols=True,
            )

    def update(self, step: int) -> None:
        if self._bar is not None:
            self._bar.update(step - self._bar.n)

    def report(self, step: int, loss: float, lr: float, norm: float, speed: Speed) -> None:
        part = f"{speed.model_flops_per_s / 1e9:,.1f} GFLOP/s"
        if speed.matmul_utilisation is not None:
            part = f"{speed.matmul_utilisation:.0%} of peak"
        shown = (
            f"loss {loss:.4f} | lr {lr:.2e} | norm {norm:.2f} | {speed.tokens_per_s:,.0f} tokens/s "
            f"({part})"
        )
        if self._bar is not None:
            self._bar.set_postfix_str(shown)
        else:
            self.write_line(
                f"step {step}/{self._num_steps} | {shown} | ETA {format_duration(speed.eta_s)}"
            )

    def write_line(self, text: str) -> None:
        write = None if self._bar is None else self._bar.write
        print_line(text, self._file, write)

    def close(self) -> None:
        with contextlib.suppress(OSError):
            if self._bar is not None:
                self._bar.close()


def print_line(text: str, file: TextIO, write: Callable[..., None] | None = None) -> None:
    """Prints a line; a closed terminal or pipe does not stop the work.

    write  a progress bar's own method to print above the bar
    """
    try:
        if write is not None:
            write(text, file=file)
        else:
            print(text, file=file, flush=True)
    except UnicodeEncodeError:  # generated text may have characters that the console cannot encode
        print_line(shown_on(file, text), file, write)
    except BrokenPipeError:  # the reader closed the pipe: discard all further output
        os.dup2(os.open(os.devnull, os.O_WRONLY), file.fileno())
    except OSError:  # a closed terminal, a full disk
        pass


def shown_on(file: TextIO, text: str) -> str:
    """The text, with escape codes for characters that the file's encoding does not have."""
    encoding = file.encoding or "ascii"
    return text.encode(encoding, "backslashreplace").decode(encoding)


def format_duration(seconds: float) -> str:
    """1:02:03, or 2:03 below an hour."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02d}:{second:02d}" if hours else f"{minute}:{second:02d}"


def format_bytes(num_bytes: float) -> str:
    """1.23 MB; a kB is 1,000 bytes."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if num_bytes < 1000 or unit == "TB":
            return f"{num_bytes:.3g} {unit}"
        num_bytes /= 1000
    raise AssertionError
