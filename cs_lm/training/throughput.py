"""How fast a run goes: tokens and model FLOP a second, and the time that is left."""

from dataclasses import dataclass

from cs_lm.training.task import Task


@dataclass(frozen=True)
class Speed:
    """matmul_utilisation  part of the device's matrix product rate, at most 1; None: not known"""

    tokens_per_s: float
    model_flops_per_s: float
    matmul_utilisation: float | None
    eta_s: float


class SpeedMeter:
    """Speeds between two looks at the clock.

    peak_flops_per_s  what matrix products were measured to do. A run that does more shows that the
                      measurement was disturbed: it is raised then.
    """

    def __init__(self, task: Task, step: int, peak_flops_per_s: float | None):
        self._task = task
        self._first_step = self._last_step = step
        self._last_s = 0.0
        self.peak_flops_per_s = peak_flops_per_s

    def look(self, step: int, elapsed_s: float) -> Speed:
        """Since the last look; `elapsed_s` is the time of training since the meter was made."""
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
