"""The dtype in which a matrix product takes its operands."""

import torch
from torch import Tensor


def autocast_dtype(x: Tensor) -> torch.dtype:
    """What a matrix product would make of an operand: autocast's dtype of float32, else its own."""
    device = x.device.type
    if x.dtype != torch.float32 or not torch.amp.is_autocast_available(device):
        return x.dtype
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def cast_to_autocast(*tensors: Tensor) -> list[Tensor]:
    """The operands of a matrix product, as it would take them."""
    return [x.to(autocast_dtype(x)) for x in tensors]
