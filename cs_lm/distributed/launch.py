"""What `torchrun` tells each process that it starts. Needs no torch."""

import os
from typing import NamedTuple


class Launched(NamedTuple):
    """The number of a process, its number on its machine, and how many there are."""

    rank: int
    local_rank: int
    size: int


def launched() -> Launched | None:
    """None if this process was not started by `torchrun`, or by something with its variables."""
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE")
    if not all(os.environ.get(name, "").isdecimal() for name in (*names, "MASTER_PORT")):
        return None
    return Launched(*(int(os.environ[name]) for name in names))


def is_first_rank() -> bool:
    """Whether this process is rank 0, or alone."""
    place = launched()
    return place is None or place.rank == 0
