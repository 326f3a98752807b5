"""Lets the process keep the memory that tensors give back."""

import ctypes
import sys

# Numbers of glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4


def keep_freed_memory() -> None:
    """Lets the process keep what tensors give back, for the next ones; Linux with glibc only.

    Otherwise large tensors of a CPU go back to the system and are cleared page by page when they
    are made again: tens of thousands of page faults in each training step.
    Cost: memory is not returned until the process ends.
    """
    if sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
        if mallopt is not None:
            mallopt(_M_MMAP_MAX, 0)
            mallopt(_M_TRIM_THRESHOLD, -1)  # never
