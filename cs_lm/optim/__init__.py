"""AdamW, the gradient clipper, the parameter groups and the learning-rate schedule.

Nothing here knows a training loop.
Read `adamw` first, then `clip`, `param_groups`, `schedule`.
"""
