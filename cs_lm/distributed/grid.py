"""The ranks as a grid: some compute other rows, some other positions, some other parts of weights.

    rank = ((stage * rows + row rank) * context + context rank) * tensor + tensor rank

so ranks that share weights are neighbours, on one machine as a rule.
"""

import math
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from cs_lm.distributed.ranks import ALONE, Ranks


class Team(NamedTuple):
    """The ranks that cut a model or a text in one way: their group, and this rank's number."""

    group: dist.ProcessGroup
    rank: int
    size: int


class Grid(NamedTuple):
    """This rank's place. A team is None if it has one member.

    data     the ranks with the same weights: they sum their gradients
    rows     those of `data` that compute other rows: they share the batch
    row      those of `data` that compute other positions of the same rows
    back     the members of `pipeline` in another group: gradients go to the stage before
    """

    data: Ranks
    rows: Ranks
    row: Ranks
    tensor: Team | None = None
    context: Team | None = None
    pipeline: Team | None = None
    back: Team | None = None


def grid_of(ranks: Ranks, tensor: int = 1, context: int = 1, pipeline: int = 1) -> Grid:
    """The product of the three divides the number of ranks. All ranks must call it."""
    if tensor * context * pipeline == 1:
        return Grid(ranks, ranks, ALONE)
    sizes = pipeline, ranks.size // (tensor * context * pipeline), context, tensor
    numbers = torch.arange(ranks.size).view(sizes)
    stages, rows, positions, parts = range(4)  # the dimensions
    of_rows, of_context = _team(ranks, numbers, rows), _team(ranks, numbers, positions)
    of_tensor, of_pipeline = _team(ranks, numbers, parts), _team(ranks, numbers, stages)
    return Grid(
        ranks.within(*_team(ranks, numbers, rows, positions)),
        ranks.within(*of_rows),
        ranks.within(*of_context),
        of_tensor if tensor > 1 else None,
        of_context if context > 1 else None,
        of_pipeline if pipeline > 1 else None,
        _team(ranks, numbers, stages) if pipeline > 1 else None,
    )


def _team(ranks: Ranks, numbers: Tensor, *dims: int) -> Team:
    """This rank's team: the ranks that differ from it in these dimensions only.

    All ranks make all groups, in the same order.
    """
    found = None
    last = range(numbers.dim() - len(dims), numbers.dim())
    size = math.prod(numbers.shape[dim] for dim in dims)
    for members in numbers.movedim(dims, tuple(last)).reshape(-1, size).tolist():
        group = dist.new_group(members)
        if ranks.rank in members:
            found = Team(group, members.index(ranks.rank), len(members))
    return found
