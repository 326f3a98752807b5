"""Signal handlers for Ctrl-C, SIGTERM and SIGHUP: the process stops without losing work."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_HANGUP = [signal.SIGHUP] if hasattr(signal, "SIGHUP") else []
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, *_HANGUP)


class StopRequested(BaseException):
    """Raised after a stop signal, at a point where the work may end."""

    def __init__(self, number: signal.Signals):
        super().__init__(number.name)
        self.number = number

    @property
    def exit_status(self) -> int:
        """Exit status as in shells: 130 for Ctrl-C, 143 for SIGTERM, 129 for SIGHUP."""
        return 128 + self.number


class StopSignals:
    """While entered, the first stop signal is recorded and does not end the process.

    A second one ends it at once; a file that is being written keeps its temporary name.
    """

    def __init__(self):
        self.received: signal.Signals | None = None
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "StopSignals":
        self._previous = _set_handlers(self._note)
        return self

    def __exit__(self, *_exception) -> None:
        _restore_handlers(self._previous)

    def check(self) -> None:
        """Raises: StopRequested when a signal has arrived."""
        if self.received is not None:
            raise StopRequested(self.received)

    def _note(self, number: int, _frame) -> None:
        if self.received is not None:
            os._exit(128 + number)
        self.received = signal.Signals(number)


@contextmanager
def raise_on_signal() -> Iterator[None]:
    """While entered, a stop signal raises StopRequested at once, in the main thread.

    For work that may stop at any moment, but must end its processes or delete temporary files.
    """

    def stop(number: int, _frame) -> None:
        _set_handlers(lambda again, _frame: os._exit(128 + again))
        raise StopRequested(signal.Signals(number))

    previous = _set_handlers(stop)
    try:
        yield
    finally:
        _restore_handlers(previous)


def _set_handlers(handler: Any) -> dict[signal.Signals, Any]:
    """Sets the handlers; returns the earlier ones. Python allows it in the main thread only."""
    if threading.current_thread() is not threading.main_thread():
        return {}
    return {
        number: signal.signal(number, handler)
        for number in STOP_SIGNALS
        # `nohup` ignores SIGHUP: it must stay ignored
        if number not in _HANGUP or signal.getsignal(number) is not signal.SIG_IGN
    }


def _restore_handlers(previous: dict[signal.Signals, Any]) -> None:
    for number, handler in previous.items():
        signal.signal(number, handler)
