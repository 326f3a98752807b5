"""The gradient clipper."""

import math
from collections.abc import Iterable

import torch
from torch import Tensor

# A CPU adds squares one after the other, in float32: at 40 M of them the norm is off by 3e-3, of
# equal ones by 2e-5 at 65,536 already. In rows of so many it is off by 2e-7 at most.
_ROW = 1 << 10


def _joint_norm(gradients: list[Tensor]) -> Tensor:
    """The root of the sum of all squares, a scalar of at least float32.

    Numerics: on a CPU, norms of short rows are added up in float64: 1e-9 off at 100 M random
    numbers, in 0.6 of the time of one norm for each gradient. Other devices add in trees as it is.
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
    parameters: Iterable[Tensor], max_norm: float, divide_by: Tensor | None = None
) -> Tensor:
    """Scales all gradients in place so that their joint L2 norm is at most `max_norm`.

    divide_by  a positive scalar: first, the gradients of a sum become those of a mean
    Returns the norm before clipping, a scalar on the gradients' device; reading it is the
    caller's choice, nothing here waits for the device. Parameters without a gradient are skipped.
    Why both at once: each pass over the gradients costs time, and both are one factor.
    """
    gradients = [p.grad for p in parameters if p.grad is not None]
    if not gradients:
        return torch.zeros(())
    norm, scale = _joint_norm(gradients), None
    if divide_by is not None:
        scale = 1 / divide_by
        norm = norm * scale
    if max_norm < math.inf:
        # the small number keeps 0 / 0 away where max_norm and norm are both tiny
        clip = (max_norm / (norm + 1e-6)).clamp(max=1.0)
        scale = clip if scale is None else scale * clip
    if scale is not None:
        torch._foreach_mul_(gradients, scale)
    return norm
