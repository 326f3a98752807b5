"""Saves checkpoints in a background thread while training continues."""

import logging
import threading
import time
from collections.abc import Callable
from typing import Any

from cs_lm.distributed.ranks import Ranks
from cs_lm.training.checkpoint import copied
from cs_lm.training.checkpoint_manager import CheckpointManager

_log = logging.getLogger("cs_lm")
# Pause before each attempt of a save that must not fail [s].
SAVE_AGAIN_S = (0, 1, 5)


class BackgroundSaver:
    """Saves checkpoints in a thread; training waits only for a copy of its state in memory.

    Only one save runs at a time: the next one waits for it. A failed save logs a warning and does
    not change `saved_step`.

    ranks  each saves its parts, and all of them do the same; they need a channel of their own,
           which training does not use. None: this process saves all of it
    """

    def __init__(
        self,
        manager: CheckpointManager,
        saved_step: int = -1,
        before: Callable[[], None] = lambda: None,
        ranks: Ranks | None = None,
    ):
        """before  called before each save: it syncs files that must be on the disk earlier"""
        self._manager, self._before, self._ranks = manager, before, ranks
        self._thread: threading.Thread | None = None
        self.saved_step = self.asked_step = saved_step
        self.has_failed = False

    def save(self, content: dict[str, Any]) -> None:
        self.wait()
        self.asked_step = content["iteration"]
        self._start(self._save, copied(content))

    def save_best(self, step: int, valid_loss: float, measured_on: dict[str, Any]) -> None:
        """Keeps that step's checkpoint as the best, when its save has ended."""
        self._start(self._save_best, self._thread, step, valid_loss, measured_on)

    def save_surely(self, save: Callable[[], None]) -> bool:
        """Calls `save` and waits, with retries; logs an error and returns False if all fail."""
        for pause_s in SAVE_AGAIN_S:
            time.sleep(pause_s)
            save()
            self.wait()
            if self.saved_step == self.asked_step and not self.has_failed:
                return True
        again = "again" if self.saved_step < 0 else "with --resume to continue from there"
        _log.error(
            "the last step could not be saved; %s; free disk space, then run the same command %s",
            self.kept,
            again,
        )
        return False

    @property
    def kept(self) -> str:
        """Text for messages: which checkpoint is safe on the disk."""
        if self.saved_step < 0:
            return "there is no checkpoint yet"
        return f"the checkpoint of step {self.saved_step} is kept"

    def wait(self) -> None:
        """Waits until no save is running."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def is_saving(self, wait_s: float) -> bool:
        """Whether a save still runs after that time."""
        if self._thread is not None:
            self._thread.join(wait_s)
        return self._thread is not None and self._thread.is_alive()

    def abandon(self) -> None:
        """Does not wait for a save any more: another rank is lost, and it cannot end."""
        self._thread = None

    def _start(self, function: Callable[..., None], *arguments: Any) -> None:
        self._thread = threading.Thread(target=function, args=arguments, name="save", daemon=True)
        self._thread.start()

    def _save(self, content: dict[str, Any]) -> None:
        step = content["iteration"]
        try:
            self._before()
            if self._ranks is None:
                self._manager.save(content)
            else:
                self._manager.save_parts(content, self._ranks)
            self.saved_step, self.has_failed = step, False
        except Exception as error:  # a failed save must not end the run
            self.has_failed, self.asked_step = True, self.saved_step
            _log.warning("cannot save step %d (%s); %s; will retry", step, error, self.kept)

    def _save_best(
        self,
        before: threading.Thread | None,
        step: int,
        valid_loss: float,
        measured_on: dict[str, Any],
    ) -> None:
        if before is not None:
            before.join()
        if self.saved_step != step:
            _log.warning("cannot keep step %d as the best checkpoint: its save failed", step)
            return
        try:
            self._manager.save_best(step, valid_loss, measured_on)
        except Exception as error:
            _log.warning("step %d could not be kept as the best (%s)", step, error)
