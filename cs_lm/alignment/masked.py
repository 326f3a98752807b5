"""Sums, means and variances over the positions that a mask selects.

What stands in the other positions never matters, not even NaN: it is left out by selection, not by
a product with 0.
"""

import torch
from torch import Tensor


def select(x: Tensor, mask: Tensor | None) -> Tensor:
    """x where the mask is True, and 0 elsewhere; its gradient there is 0. None selects all."""
    return x if mask is None else torch.where(mask, x, 0.0)


def masked_sum(x: Tensor, mask: Tensor, dim: int | None = None) -> Tensor:
    """Shapes: x and mask (...), returns () without `dim`, else x's shape without that axis"""
    chosen = select(x, mask)
    return chosen.sum() if dim is None else chosen.sum(dim)


def masked_mean(x: Tensor, mask: Tensor, dim: int | None = None) -> Tensor:
    """As `masked_sum`, divided by the number of selected entries. Nothing selected gives NaN."""
    mask = mask.expand(x.shape)
    count = mask.sum() if dim is None else mask.sum(dim)
    return masked_sum(x, mask, dim) / count


def masked_variance(x: Tensor, mask: Tensor) -> Tensor:
    """The sample variance (divided by n - 1) of the selected entries: (); 0 for fewer than two."""
    count = mask.sum()
    centred = select(x, mask) - masked_sum(x, mask) / count.clamp(min=1)
    return masked_sum(centred.square(), mask) / (count - 1).clamp(min=1)


def last_selected(mask: Tensor) -> Tensor:
    """True at the last selected position of each row. Shapes: mask (B, T), returns (B, T)"""
    later = mask.flip(-1).cumsum(-1).flip(-1)  # selected positions from here on
    return mask & (later == 1)
