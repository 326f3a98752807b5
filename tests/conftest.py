"""Fixtures for all tests: seeded generators, and real text where it is at hand."""

import os
from contextlib import ExitStack
from pathlib import Path

# Models of tests are tiny: two threads would wait for each other most of the time. Processes that
# tests start take it over: equal bits need an equal number of threads.
os.environ["OMP_NUM_THREADS"] = "1"

import pytest
import torch
from hypothesis import settings

from tests.ranks import rank_pool

# Machines are shared and slow at times: a test that takes long has not failed.
settings.register_profile("steady", deadline=None, derandomize=True, max_examples=100)
settings.load_profile("steady")

torch.set_num_threads(1)


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(1234)


@pytest.fixture(scope="session")
def corpora() -> Path:
    """The folder of real texts and GPT-2's vocabulary that CS_LM_CORPORA names."""
    folder = os.environ.get("CS_LM_CORPORA")
    if not folder:
        pytest.skip("CS_LM_CORPORA is not set: no folder with gpt2/ and tinyshakespeare.txt")
    return Path(folder)


def no_compiler(_function):
    """`torch.compile` on a machine that has no compiler."""

    def compiled(*_arguments):
        raise RuntimeError("\nNo compiler found\nand much more text")

    return compiled


@pytest.fixture(scope="session")
def pools():
    """Processes that are joined, by their number. Tests with them are of one xdist group."""
    with ExitStack() as stack:
        yield Pools(stack)


class Pools(dict):
    """A pool starts when it is asked for."""

    def __init__(self, stack: ExitStack):
        self._stack = stack

    def __missing__(self, size: int):
        self[size] = self._stack.enter_context(rank_pool(size))
        return self[size]
