"""Keeps the memory of freed tensors in the process, which is faster on a CPU."""

import ctypes
import sys

# Constants of glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4


def keep_freed_memory() -> None:
    """Keeps the memory of freed tensors for the next tensors; Linux with glibc only.

    Otherwise glibc returns large CPU tensors to the system, which clears each page again when it
    is used next: tens of thousands of page faults in each training step.
    Cost: memory is not returned until the process ends.
    """
    if sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
        if mallopt is not None:
            mallopt(_M_MMAP_MAX, 0)
            mallopt(_M_TRIM_THRESHOLD, -1)  # never trim
