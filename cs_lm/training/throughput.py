"""How fast a run goes: tokens and model FLOP a second, and the time that is left."""

from dataclasses import dataclass

from cs_lm.config.run import RunConfig
from cs_lm.models.stats import flops_per_token


@dataclass(frozen=True)
class Speed:
    """utilisation  part of what the device's matrix products can do, at most 1; None: not known"""

    tokens_per_s: float
    model_flops_per_s: float
    utilisation: float | None
    eta_s: float


class SpeedMeter:
    """Speeds between two looks at the clock.

    peak_flops_per_s  what matrix products were measured to do. A run that does more shows that the
                      measurement was disturbed: it is raised then.
    """

    def __init__(self, config: RunConfig, step: int, num_steps: int, peak: float | None):
        self._tokens_per_step = config.tokens_per_step
        self._flops_per_token = flops_per_token(config.model, config.seq_length)
        self._first_step = self._last_step = step
        self._last_s, self._num_steps = 0.0, num_steps
        self.peak_flops_per_s = peak

    def look(self, step: int, elapsed_s: float) -> Speed:
        """Since the last look; `elapsed_s` is the time of training since the meter was made."""
        tokens = (step - self._last_step) * self._tokens_per_step
        tokens_per_s = tokens / (elapsed_s - self._last_s)
        self._last_step, self._last_s = step, elapsed_s
        flops_per_s = tokens_per_s * self._flops_per_token
        utilisation = None
        if self.peak_flops_per_s is not None:
            self.peak_flops_per_s = max(self.peak_flops_per_s, flops_per_s)
            utilisation = flops_per_s / self.peak_flops_per_s
        eta_s = (self._num_steps - step) * elapsed_s / (step - self._first_step)
        return Speed(tokens_per_s, flops_per_s, utilisation, eta_s)
