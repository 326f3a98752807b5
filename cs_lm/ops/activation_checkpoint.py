"""Activation checkpointing: backward computes activations again instead of keeping them."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class _Recomputed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, function, autocast, x, *parameters):
        ctx.function, ctx.autocast = function, autocast
        ctx.save_for_backward(x, *parameters)
        return function(x)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output):
        x, *parameters = ctx.saved_tensors
        x = x.detach().requires_grad_()
        device, dtype, enabled = ctx.autocast
        with torch.enable_grad(), torch.autocast(device, dtype, enabled):
            output = ctx.function(x)
        wanted = ctx.needs_input_grad[2:]  # a parameter may be frozen
        inputs = [each for each, is_wanted in zip((x, *parameters), wanted) if is_wanted]
        gradients = iter(torch.autograd.grad(output, inputs, grad_output))
        return None, None, *(next(gradients) if is_wanted else None for is_wanted in wanted)


def checkpoint_activations(
    function: Callable[[Tensor], Tensor], x: Tensor, parameters: Sequence[Tensor]
) -> Tensor:
    """function(x), keeping only x for backward. Backward runs the function a second time.

    The function may use the parameters. It must give the same result both times, up to rounding.
    The second run uses the autocast settings of the first.
    Source: Chen et al. 2016, Training deep nets with sublinear memory cost.
    """
    device = x.device.type
    enabled = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    dtype = torch.get_autocast_dtype(device) if enabled else torch.bfloat16
    return _Recomputed.apply(function, (device, dtype, enabled), x, *parameters)
