"""The learning rate as a pure function of the step."""

import math

from cs_lm.config.optim import OptimConfig


def cosine_schedule(it: int, lr_max: float, lr_min: float, warmup: int, cycle: int) -> float:
    """Learning rate: a linear warm-up, then a cosine, then a constant.

    It is 0 at it = 0, lr_max at it = warmup, and lr_min from it = cycle on.
    With f = (it - warmup) / (cycle - warmup) the cosine part is

        lr_min + (1 + cos(pi f)) / 2 * (lr_max - lr_min)
    """
    if it <= warmup and warmup > 0:
        return lr_max * it / warmup
    if it >= cycle:
        return lr_min
    fraction = (it - warmup) / (cycle - warmup)
    return lr_min + 0.5 * (1 + math.cos(math.pi * fraction)) * (lr_max - lr_min)


def learning_rate(step: int, num_steps: int, optim: OptimConfig) -> float:
    """The rate of update `step` (0 is the first) in a run of `num_steps` updates.

    With T = num_steps, w = round(warmup_ratio * T), at least 1, and c = round(warmfix_ratio * T),
    for w < c < T:

        step 0    lr / w      not 0, which would waste the first update
        step w-1  lr          the highest
        step w    just below lr, the cosine begins
        step c-1  lr_min      constant from here on, also after step T-1
    """
    warmup = round(optim.warmup_ratio * num_steps)
    cycle = round(optim.warmfix_ratio * num_steps)
    if cycle > 0:
        warmup = max(1, warmup)
    return cosine_schedule(step + 1, optim.lr, optim.lr_min, warmup, cycle)
