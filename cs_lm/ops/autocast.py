"""The dtype that autocast gives the operands of a matrix product."""

import torch
from torch import Tensor


def autocast_dtype(x: Tensor) -> torch.dtype:
    """The dtype of x in a matrix product: autocast's dtype for float32, else its own dtype."""
    device = x.device.type
    if x.dtype != torch.float32 or not _is_enabled(device):
        return x.dtype
    return torch.get_autocast_dtype(device)


def cast_to_autocast(*tensors: Tensor) -> list[Tensor]:
    """The tensors, in the dtypes that a matrix product would cast them to."""
    if not _is_enabled(tensors[0].device.type):
        return list(tensors)
    return [x.to(autocast_dtype(x)) for x in tensors]


def _is_enabled(device: str) -> bool:
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
