"""Every tolerance of the tests, by what limits the agreement."""

import torch

# Same formula, same precision, another order of additions.
ROUNDING = {
    torch.float64: {"rtol": 1e-10, "atol": 1e-11},
    torch.float32: {"rtol": 1e-5, "atol": 1e-6},
    torch.bfloat16: {"rtol": 2e-2, "atol": 2e-2},
}
# Gradients and whole models: rounding that went through several layers.
DEEP = {
    torch.float64: {"rtol": 1e-9, "atol": 1e-10},
    torch.float32: {"rtol": 1e-4, "atol": 1e-5},
    torch.bfloat16: {"rtol": 5e-2, "atol": 5e-2},
}
# Scores of a whole model with another library's weights layout.
OTHER_LIBRARY = {"rtol": 0.0, "atol": 1e-4}
# A thousand float32 updates.
MANY_UPDATES = {"rtol": 1e-4, "atol": 1e-6}
# A loss after up to a hundred float32 updates, on any processor, relative.
PINNED = 1e-3


def close(actual, expected, table=ROUNDING, dtype=None):
    torch.testing.assert_close(actual, expected, **table[dtype or expected.dtype])
