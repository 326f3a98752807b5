"""Training speed: tokens and model FLOPs per second, and the remaining time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # commands that need no torch import this module
    from cs_lm.training.task import Task


@dataclass(frozen=True)
class Speed:
    """Speeds, and the remaining time.

    matmul_utilisation  fraction of the device's matrix product speed, at most 1; None: unknown
    """

    tokens_per_s: float
    model_flops_per_s: float
    matmul_utilisation: float | None
    eta_s: float


class SpeedMeter:
    """Measures the speed between two calls of `look`.

    peak_flops_per_s  measured speed of matrix products. A faster run shows that the measurement was
                      disturbed: then the peak is raised.
    """

    def __init__(self, task: Task, step: int, peak_flops_per_s: float | None):
        self._task = task
        self._first_step = self._last_step = step
        self._last_s = 0.0
        self.peak_flops_per_s = peak_flops_per_s

    def look(self, step: int, elapsed_s: float) -> Speed:
        """Speed since the last call; `elapsed_s` is the training time since the meter was made."""
        tokens = (step - self._last_step) * self._task.tokens_per_step
        tokens_per_s = tokens / (elapsed_s - self._last_s)
        self._last_step, self._last_s = step, elapsed_s
        flops_per_s = tokens_per_s * self._task.flops_per_token
        matmul_utilisation = None
        if self.peak_flops_per_s is not None:
            self.peak_flops_per_s = max(self.peak_flops_per_s, flops_per_s)
            matmul_utilisation = flops_per_s / self.peak_flops_per_s
        eta_s = (self._task.num_steps - step) * elapsed_s / (step - self._first_step)
        return Speed(tokens_per_s, flops_per_s, matmul_utilisation, eta_s)
