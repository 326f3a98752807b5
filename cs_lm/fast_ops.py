"""Entries of `Ops` with hand-derived gradients that take less time or memory than `ops.py`.

`FAST` names exactly the entries that differ; one test holds each of them to the definition, in
value and in gradient.
"""

import torch
from torch import Tensor

from cs_lm.ops import CLEAR, IGNORE_INDEX, check_targets

# Rows of scores that exist at one time: 256 rows of 8,192 float32 scores are 8 MB.
_BLOCK_SCORES = 1 << 21


class _LinearCrossEntropy(torch.autograd.Function):
    """Loss and both gradients in one pass over blocks of rows; only the gradients are kept."""

    @staticmethod
    def forward(ctx, x, weight, targets, ignore_index, with_gradients):
        rows = max(1, _BLOCK_SCORES // weight.shape[0])
        wide = torch.promote_types(x.dtype, torch.float32)
        loss_sum = torch.zeros((), dtype=wide, device=x.device)
        grad_x = torch.empty_like(x) if with_gradients else None
        grad_weight = torch.zeros_like(weight, dtype=wide) if with_gradients else None
        for start in range(0, x.shape[0], rows):
            block, block_targets = x[start : start + rows], targets[start : start + rows]
            counted = (block_targets != ignore_index).unsqueeze(-1)  # (n, 1)
            safe_targets = block_targets.unsqueeze(-1).where(counted, 0)  # (n, 1)
            scores = (block @ weight.T).to(wide)  # (n, V)
            peak = scores.amax(-1, keepdim=True).clamp(min=torch.finfo(wide).min)
            scores.sub_(peak)
            target_scores = scores.gather(-1, safe_targets)  # (n, 1)
            normaliser = scores.exp_().sum(-1, keepdim=True)
            loss_sum += (normaliser.log() - target_scores).where(counted, 0.0).sum()
            if with_gradients:  # d loss / d score = probability - [is target]
                scores.mul_(counted / normaliser)
                scores.scatter_add_(-1, safe_targets, -counted.to(wide))
                grad_scores = scores.to(x.dtype)
                grad_x[start : start + rows] = grad_scores @ weight
                grad_weight += grad_scores.T @ block
        num_counted = (targets != ignore_index).sum()
        if with_gradients:
            ctx.save_for_backward(grad_x, grad_weight.to(weight.dtype))
        ctx.mark_non_differentiable(num_counted)
        return loss_sum, num_counted

    @staticmethod
    def backward(ctx, grad_loss, _grad_count):
        grad_x, grad_weight = ctx.saved_tensors
        return grad_x * grad_loss, grad_weight * grad_loss, None, None, None


def linear_cross_entropy(
    x: Tensor, weight: Tensor, targets: Tensor, ignore_index: int = IGNORE_INDEX
) -> tuple[Tensor, Tensor]:
    """`ops.linear_cross_entropy` without ever holding all scores.

    The gradient by the scores of a block is probability minus one-hot target, known as soon as
    its loss is: so both input gradients are formed in the forward pass, block by block, and
    backward only scales them.
    """
    check_targets(targets, x.shape[:-1], weight.shape[0], ignore_index)
    with_gradients = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    return _LinearCrossEntropy.apply(
        x.reshape(-1, x.shape[-1]), weight, targets.reshape(-1), ignore_index, with_gradients
    )


FAST = CLEAR._replace(linear_cross_entropy=linear_cross_entropy)
