"""The gradient clipper."""

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

# A CPU adds squares one after the other, in float32. The error of the norm is 3e-3 for 40 M
# numbers, and 2e-5 for 65,536 equal ones. With rows of this length it is at most 2e-7.
_ROW = 1 << 10


Norm = Callable[[list[Tensor]], Tensor]


def _norm(gradients: list[Tensor]) -> Tensor:
    """The root of the sum of all squares, a scalar of at least float32.

    Numerics: on a CPU, norms of short rows are combined in float64. The error is 1e-9 for 100 M
    random numbers, in 0.6 of the time of one norm for each gradient. Other devices add in trees.
    """
    wide = torch.promote_types(gradients[0].dtype, torch.float32)
    if gradients[0].device.type != "cpu":
        return torch.stack(torch._foreach_norm(gradients, 2, dtype=wide)).square().sum().sqrt()
    norms, short = [], []
    for gradient in gradients:
        if gradient.numel() <= _ROW:
            short.append(gradient)
            continue
        numbers = gradient.reshape(-1)
        whole = numbers.numel() // _ROW * _ROW
        norms.append(torch.linalg.vector_norm(numbers[:whole].view(-1, _ROW), dim=1, dtype=wide))
        if whole < numbers.numel():
            short.append(numbers[whole:])
    if short:
        norms.append(torch.stack(torch._foreach_norm(short, 2, dtype=wide)))
    return torch.cat(norms).double().square().sum().sqrt().to(wide)


def clip_gradients(
    parameters: Iterable[Tensor],
    max_norm: float,
    divide_by: Tensor | None = None,
    joint_norm: Callable[[list[Tensor], Norm], Tensor] | None = None,
) -> Tensor:
    """Scales all gradients in place so that their joint L2 norm is at most `max_norm`.

    divide_by  a positive scalar that divides the gradients first: it turns those of a sum into
               those of a mean
    joint_norm  where each process has a part of the gradients: from these, and from what computes
               their norm, to the norm of all
    Returns the norm before clipping, a scalar on the gradients' device. Nothing here waits for
    the device. Parameters without a gradient are skipped.
    Why both at once: both are one factor, and each pass over the gradients costs time.
    """
    gradients = [p.grad for p in parameters if p.grad is not None]
    if not gradients:
        return torch.zeros(())
    norm = _norm(gradients) if joint_norm is None else joint_norm(gradients, _norm)
    scale = None
    if divide_by is not None:
        scale = 1 / divide_by.to(norm.dtype)
        norm = norm * scale
    if max_norm < math.inf:
        # the small number avoids 0 / 0 if max_norm and norm are both tiny
        clip = (max_norm / (norm + 1e-6)).clamp(max=1.0)
        scale = clip if scale is None else scale * clip
    if scale is not None:
        torch._foreach_mul_(gradients, scale)
    return norm
