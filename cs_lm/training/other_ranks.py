"""What the ranks besides rank 0 have in place of log, display and checkpoints: nothing."""

from collections.abc import Callable
from typing import Any

from cs_lm.training.console import Stopwatch


class NoLog:
    def write(self, kind: str, **values: Any) -> None:
        pass

    def sync(self) -> None:
        pass


class NoReporter:
    """Has the methods of `Reporter`."""

    def __init__(self):
        self.log, self.logged, self.watch = NoLog(), [], Stopwatch()
        self.elapsed_s = 0.0

    def begin(self, step: int, elapsed_s: float, is_resumed: bool) -> None:
        pass

    def start_watch(self) -> None:
        pass

    def update(self, step: int) -> None:
        pass

    def report(self, *numbers: Any) -> None:
        pass

    def record(self, kind: str, step: int, tokens: int, **values: Any) -> None:
        pass

    def end(self, step: int, tokens: int, found: dict[str, Any] | None) -> None:
        pass

    def plot(self) -> None:
        pass

    def close(self) -> None:
        pass


class NoSaver:
    """Has the methods of `BackgroundSaver`. Rank 0 saves."""

    asked_step, has_failed, kept = -1, False, "rank 0 saves"

    def save(self, content: dict[str, Any]) -> None:
        pass

    def save_best(self, step: int, valid_loss: float, measured_on: dict[str, Any]) -> None:
        pass

    def is_saving(self, wait_s: float) -> bool:
        return False

    def save_surely(self, save: Callable[[], None]) -> bool:
        return True

    def wait(self) -> None:
        pass
