"""Progress of long work: a line that updates itself on a terminal, else a line now and then."""

import sys
import time
from typing import TextIO

from cs_lm.training.console import format_duration

TERMINAL_INTERVAL_S = 0.2
PLAIN_INTERVAL_S = 5.0


class ProgressLine:
    """Call it with a phase, the amount done, the total (None: unknown) and a remark."""

    def __init__(self, file: TextIO | None = None):
        self._file = file or sys.stderr
        self._is_terminal = self._file.isatty()
        self._interval_s = TERMINAL_INTERVAL_S if self._is_terminal else PLAIN_INTERVAL_S
        self._phase = ""
        self._width = 0

    def __call__(self, phase: str, done: int, total: int | None, remark: str = "") -> None:
        now = time.perf_counter()
        if phase != self._phase:
            self.close()
            self._phase, self._start_s, self._shown_s = phase, now, now
            if not self._is_terminal:
                return
        is_end = done == total
        if now - self._shown_s < self._interval_s and not (is_end and self._width):
            return
        self._shown_s = now
        self._show(self._line(done, total, now - self._start_s, remark))

    def close(self) -> None:
        """Ends the line that updates itself."""
        if self._width:
            print(file=self._file)
        self._width = 0

    def _line(self, done: int, total: int | None, elapsed_s: float, remark: str) -> str:
        shown = f"{self._phase}: {done:,}"
        if total is not None:
            shown += f" of {total:,} ({100 * done / max(1, total):.0f} %)"
            if 0 < done < total:
                left_s = elapsed_s * (total - done) / done
                shown += f", {format_duration(left_s)} left"
        return f"{shown}, {remark}" if remark else shown

    def _show(self, line: str) -> None:
        if self._is_terminal:
            print(f"\r{line:<{self._width}}", end="", file=self._file, flush=True)
            self._width = len(line)
        else:
            print(line, file=self._file, flush=True)
