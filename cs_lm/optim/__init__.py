"""AdamW, the gradient clipper, the parameter groups and the learning-rate schedule.

Nothing here depends on a training loop.
Read `adamw` first, then `clip`, `param_groups`, `schedule`.
"""
