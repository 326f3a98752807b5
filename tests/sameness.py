"""Whether two values are equal to the last bit, tensors inside them too."""

from typing import Any

import torch

NEVER_EQUAL = frozenset(("elapsed_s", "out_dir"))  # of two runs


def assert_equal(one: Any, other: Any, where: str = "") -> None:
    """where  names the value in a failure; entries of `NEVER_EQUAL` are left out"""
    assert type(one) is type(other), where
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other), where
    elif isinstance(one, dict):
        assert one.keys() == other.keys(), where
        for key in one.keys() - NEVER_EQUAL:
            assert_equal(one[key], other[key], f"{where}.{key}")
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other), where
        for number, (a, b) in enumerate(zip(one, other)):
            assert_equal(a, b, f"{where}.{number}")
    else:
        assert one == other, (where, one, other)
