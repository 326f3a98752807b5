"""Signal handlers for Ctrl-C, SIGTERM and others: the process stops without losing work."""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

# On Windows there are only two. Clusters send SIGUSR1 or SIGUSR2 before they end a job.
_NAMES = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2")
STOP_SIGNALS = tuple(getattr(signal, name) for name in _NAMES if hasattr(signal, name))


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

    A second one ends it at once; a file that is being written keeps its temporary name. Among
    several processes it does not: one Ctrl-C reaches each of them from the terminal and again
    from torchrun, which kills those that take too long.
    """

    def __init__(self, greatest: Callable[[int], int] | None = None):
        """greatest  gives the greatest number of several processes; None: there is only one"""
        self._greatest = greatest
        self.received: signal.Signals | None = None
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "StopSignals":
        self._previous = _set_handlers(self._note)
        return self

    def __exit__(self, *_exception) -> None:
        _restore_handlers(self._previous)

    def check(self) -> None:
        """Raises: StopRequested when a signal has arrived, at this rank or at another one.

        All ranks must call it.
        """
        number = self.received or 0
        if self._greatest is not None:
            number = self._greatest(number)
        if number:
            raise StopRequested(signal.Signals(number))

    def check_alone(self) -> None:
        """The same where ranks are not in step: does nothing among several processes."""
        if self._greatest is None:
            self.check()

    def _note(self, number: int, _frame) -> None:
        if self.received is not None and self._greatest is None:
            os._exit(128 + number)
        self.received = signal.Signals(number)


@contextmanager
def raise_on_signal() -> Iterator[None]:
    """While entered, a stop signal raises StopRequested at once, in the main thread.

    For work that may stop at any moment, but must end its processes or delete temporary files.
    An import of compiled modules may turn that exception into another one: it is raised again.
    """
    received: list[signal.Signals] = []

    def stop(number: int, _frame) -> None:
        _set_handlers(lambda again, _frame: os._exit(128 + again))
        received.append(signal.Signals(number))
        raise StopRequested(received[0])

    previous = _set_handlers(stop)
    try:
        yield
    except (ImportError, AttributeError) as error:
        if received:
            raise StopRequested(received[0]) from error
        raise
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
        if number.name != "SIGHUP" or signal.getsignal(number) is not signal.SIG_IGN
    }


def _restore_handlers(previous: dict[signal.Signals, Any]) -> None:
    for number, handler in previous.items():
        signal.signal(number, handler)
