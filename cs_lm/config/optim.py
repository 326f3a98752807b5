"""The settings of AdamW, its learning rate and the gradient clipper."""

import math
from dataclasses import dataclass

from cs_lm.config.fields import setting
from cs_lm.errors import Problem


@dataclass(frozen=True)
class OptimConfig:
    """AdamW, its learning rate over time, and the gradient clipper."""

    lr: float = setting(1e-4, "highest learning rate, after warm-up")
    lr_min: float = setting(1e-5, "learning rate after the cosine")
    warmup_ratio: float = setting(0.1, "linear warm-up", "of steps")
    warmfix_ratio: float = setting(0.9, "end of the cosine decay; constant lr after it", "of steps")
    weight_decay: float = setting(0.01, "decoupled decay; not for norms and embeddings")
    betas: tuple[float, float] = setting(
        (0.9, 0.95), "AdamW betas: decay of the two moment estimates"
    )
    eps: float = setting(1e-8, "AdamW epsilon, added to the square root of the second moment")
    max_norm: float = setting(1.0, "gradients are scaled down to this L2 norm; inf: never")

    def validate(self) -> list[Problem]:
        found = []
        for name, most in (("lr", 1e3), ("eps", 1e3), ("max_norm", math.inf)):
            if not 0 < getattr(self, name) <= most:
                need = "more than 0" + (f", at most {most:g}" if most < math.inf else "")
                found.append(Problem(f"--{name}", f"got {getattr(self, name)}", need))
        if not 0 <= self.lr_min <= self.lr:
            found.append(Problem("--lr_min", f"got {self.lr_min}", f"0 to --lr ({self.lr})"))
        if not 0 <= self.warmup_ratio <= self.warmfix_ratio <= 1:
            what = f"got {self.warmup_ratio} and {self.warmfix_ratio}"
            need = "0 <= warmup_ratio <= warmfix_ratio <= 1"
            found.append(Problem("--warmup_ratio, --warmfix_ratio", what, need))
        if not 0 <= self.weight_decay <= 1e3:
            found.append(Problem("--weight_decay", f"got {self.weight_decay}", "0 to 1000"))
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            what = f"got {' '.join(map(str, self.betas))}"
            found.append(Problem("--betas", what, "two numbers from 0 to below 1"))
        return found
