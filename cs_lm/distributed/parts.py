"""Which part of a tensor a process holds, and how rows are cut."""

from typing import NamedTuple

from torch import Tensor


class Part(NamedTuple):
    """A rectangular part of a tensor.

    tensor  the numbers of the part
    start   where it begins in the whole tensor, in each dimension
    whole   the shape of the whole tensor
    """

    tensor: Tensor
    start: tuple[int, ...]
    whole: tuple[int, ...]


def whole_part(tensor: Tensor) -> Part:
    """All of the tensor."""
    return Part(tensor, (0,) * tensor.dim(), tuple(tensor.shape))


def rows_of(num_rows: int, rank: int, size: int) -> range:
    """The rows of one of `size` processes. All but the last ones have equally many.

    They are those of torch's `chunk`, which `fully_shard` cuts by; late ranks may have none.
    """
    step = -(-num_rows // size)
    return range(min(num_rows, rank * step), min(num_rows, (rank + 1) * step))


def row_part(tensor: Tensor, rank: int, size: int) -> Part:
    """The rows of one process, a view of the tensor, which has at least one dimension."""
    rows = rows_of(tensor.shape[0], rank, size)
    rest = (0,) * (tensor.dim() - 1)
    return Part(tensor[rows.start : rows.stop], (rows.start, *rest), tuple(tensor.shape))
