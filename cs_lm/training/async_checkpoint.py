"""Saves checkpoints in a thread while training goes on."""

import logging
import threading
import time
from collections.abc import Callable
from typing import Any

from cs_lm.training.checkpoint import copied
from cs_lm.training.checkpoint_manager import CheckpointManager

_log = logging.getLogger("cs_lm")
# Before each attempt to save what would otherwise be lost.
SAVE_AGAIN_S = (0, 1, 5)


class BackgroundSaver:
    """Saves while training goes on, which waits for no more than the copy of its state in memory.

    One save at a time: the next one waits for it. A save that fails is a warning in the log, and
    leaves `saved_step` as it was.
    """

    def __init__(
        self,
        manager: CheckpointManager,
        saved_step: int = -1,
        before: Callable[[], None] = lambda: None,
    ):
        """before  called before each save: what must be on the disk earlier"""
        self._manager, self._before = manager, before
        self._thread: threading.Thread | None = None
        self.saved_step = self.asked_step = saved_step
        self.has_failed = False

    def save(self, content: dict[str, Any]) -> None:
        self.wait()
        self.asked_step = content["iteration"]
        self._start(self._save, copied(content))

    def save_best(self, step: int, valid_loss: float, measured_on: dict[str, Any]) -> bool:
        """After the save of that step; whether it succeeded."""
        self.wait()
        if self.saved_step == step:
            self._start(self._save_best, step, valid_loss, measured_on)
        else:
            _log.warning("step %d is not kept as the best: it could not be saved", step)
        return self.saved_step == step

    def save_surely(self, save: Callable[[], None]) -> bool:
        """Calls `save` and waits for it, several times if need be; says so where all fail."""
        for pause_s in SAVE_AGAIN_S:
            time.sleep(pause_s)
            save()
            self.wait()
            if self.saved_step == self.asked_step and not self.has_failed:
                return True
        again = "starts it again" if self.saved_step < 0 else "with --resume goes on from there"
        _log.error(
            "the last step could not be saved; %s; make room on the disk, then the same command %s",
            self.kept,
            again,
        )
        return False

    @property
    def kept(self) -> str:
        """What a message can say of the work that is safe."""
        if self.saved_step < 0:
            return "there is no checkpoint yet"
        return f"the checkpoint of step {self.saved_step} is kept"

    def wait(self) -> None:
        """Until nothing is being written."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _start(self, function: Callable[..., None], *arguments: Any) -> None:
        self._thread = threading.Thread(target=function, args=arguments, name="save", daemon=True)
        self._thread.start()

    def _save(self, content: dict[str, Any]) -> None:
        step = content["iteration"]
        try:
            self._before()
            self._manager.save(content)
            self.saved_step, self.has_failed = step, False
        except Exception as error:  # whatever it is, it must not end the run
            self.has_failed, self.asked_step = True, self.saved_step
            _log.warning(
                "step %d could not be saved (%s); %s; it is tried again", step, error, self.kept
            )

    def _save_best(self, step: int, valid_loss: float, measured_on: dict[str, Any]) -> None:
        try:
            self._manager.save_best(step, valid_loss, measured_on)
        except Exception as error:
            _log.warning("step %d could not be kept as the best (%s)", step, error)
