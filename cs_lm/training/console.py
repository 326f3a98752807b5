"""What a run shows on the terminal."""

import contextlib
import os
import sys
import time
from typing import TextIO

from cs_lm.training.throughput import Speed


class Stopwatch:
    """Seconds, of which those inside `pause()` do not count."""

    def __init__(self):
        self._start = time.perf_counter()
        self._paused_s = 0.0

    @property
    def elapsed_s(self) -> float:
        return time.perf_counter() - self._start - self._paused_s

    def pause(self) -> "_Pause":
        return _Pause(self)

    def add_pause(self, seconds: float) -> None:
        self._paused_s += seconds


class _Pause:
    def __init__(self, watch: Stopwatch):
        self._watch = watch

    def __enter__(self) -> None:
        self._start = time.perf_counter()

    def __exit__(self, *_exception) -> None:
        self._watch.add_pause(time.perf_counter() - self._start)


class Display:
    """A progress bar on a terminal that has tqdm, plain lines anywhere else."""

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
        if speed.utilisation is not None:
            part = f"{speed.utilisation:.0%} of peak"
        shown = (
            f"loss {loss:.4f} | lr {lr:.2e} | norm {norm:.2f} | {speed.tokens_per_s:,.0f} tokens/s "
            f"({part})"
        )
        if self._bar is not None:
            self._bar.set_postfix_str(shown)
        else:
            self.say(
                f"step {step}/{self._num_steps} | {shown} | ETA {format_duration(speed.eta_s)}"
            )

    def say(self, text: str) -> None:
        try:
            if self._bar is not None:
                self._bar.write(text, file=self._file)
            else:
                print(text, file=self._file, flush=True)
        except UnicodeEncodeError:  # what a model writes may have characters that no console shows
            self.say(shown_on(self._file, text))
        except BrokenPipeError:  # nobody reads any more: that is no reason to stop training
            os.dup2(os.open(os.devnull, os.O_WRONLY), self._file.fileno())
        except OSError:  # a terminal that is gone, a full disk
            pass

    def close(self) -> None:
        with contextlib.suppress(OSError):
            if self._bar is not None:
                self._bar.close()


def shown_on(file: TextIO, text: str) -> str:
    """The text with codes in the place of characters that the file's encoding does not have."""
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
