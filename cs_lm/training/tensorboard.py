"""TensorBoard event files."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

_log = logging.getLogger("cs_lm")


class TensorBoardLog:
    """Writes TensorBoard event files, until a disk error; needs the package tensorboard.

    folder  None: nothing is written
    """

    def __init__(self, folder: Path | None):
        self._writer: Any = None
        if folder is not None:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(folder))

    def write(self, kind: str, step: int, values: dict[str, Any]) -> None:
        """Writes the floats among the values."""
        for name, value in values.items():
            if isinstance(value, float):
                self._attempt(
                    lambda name=name, value=value: self._writer.add_scalar(
                        f"{kind}/{name}", value, step
                    )
                )

    def close(self) -> None:
        self._attempt(lambda: self._writer.close())

    def _attempt(self, action: Callable[[], None]) -> None:
        if self._writer is None:
            return
        try:
            action()
        except OSError as error:
            self._writer = None
            _log.warning("TensorBoard events stopped (%s); training continues", error)
