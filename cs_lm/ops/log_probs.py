"""`linear_log_probs` and `log_sigmoid` with hand-derived gradients, for `fused.py`."""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from cs_lm.ops.autocast import cast_to_autocast
from cs_lm.ops.manual_backward import cached_parts
from cs_lm.ops.reference import IGNORE_INDEX, at_least_float32, check_targets
from cs_lm.ops.reference import log_sigmoid as clear_log_sigmoid
from cs_lm.ops.tiled_attention import LOG2_E

# Logits in memory at one time (64 MB in float32): enough rows for fast matrix products.
BLOCK_LOGITS = 1 << 24
# 2^x is 0 below this in every dtype; it stands for -inf, whose product with 0 would be NaN.
_LEAST = -16384.0


class _LinearLogProbs(torch.autograd.Function):
    """Goes over blocks of rows. Backward computes their logits again, so none are kept."""

    @staticmethod
    def forward(ctx, x, weight, targets, scale):
        wide = torch.promote_types(x.dtype, torch.float32)
        log_probs = torch.empty(len(x), 1, dtype=wide, device=x.device)
        entropies = torch.empty_like(log_probs)
        for rows, logits in _blocks(x, weight, scale):
            of_rows = targets[rows], log_probs[rows], entropies[rows]
            for part, part_targets, log_prob, entropy in cached_parts(logits, *of_rows):
                target_logits, shifted, weights, total = _softmax_parts(part, part_targets, wide)
                log_total = total.log2()
                log_prob.copy_((target_logits - log_total) / LOG2_E)
                mean = shifted.mul_(weights).sum(-1, keepdim=True) / total
                entropy.copy_((log_total - mean) / LOG2_E)
        ctx.save_for_backward(x, weight, targets, entropies)
        ctx.scale = scale
        ctx.set_materialize_grads(False)
        return log_probs, entropies

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_log_probs, grad_entropies):
        """With z the logits, p their softmax, H its entropy, and g and h the gradients given:

        dz_v = g ([v = t] - p_v) - h p_v (log p_v + H)
        """
        x, weight, targets, entropies = ctx.saved_tensors
        with_entropy = grad_entropies is not None
        g = torch.zeros_like(entropies) if grad_log_probs is None else grad_log_probs
        h = grad_entropies if with_entropy else entropies
        grad_x = torch.empty_like(x)
        grad_weight = torch.zeros_like(weight, dtype=entropies.dtype)
        for rows, logits in _blocks(x, weight, ctx.scale):
            of_rows = (tensor[rows] for tensor in (targets, g, h, entropies))
            for part in cached_parts(logits, *of_rows):
                _to_gradient(*part, with_entropy)
            torch.mm(logits, weight, out=grad_x[rows])
            if logits.dtype == grad_weight.dtype:
                grad_weight.addmm_(logits.T, x[rows])
            else:
                grad_weight += logits.T @ x[rows]
        scale = ctx.scale / LOG2_E
        return grad_x.mul_(scale), grad_weight.mul_(scale).to(weight.dtype), None, None


def _blocks(x: Tensor, weight: Tensor, scale: float) -> Iterator[tuple[slice, Tensor]]:
    """Rows, and their logits times `scale`; all blocks use the same memory."""
    size = max(1, min(BLOCK_LOGITS // len(weight), len(x)))
    memory = x.new_empty(size, len(weight))
    for start in range(0, len(x), size):
        rows = slice(start, min(start + size, len(x)))
        logits = memory[: rows.stop - start]
        yield rows, torch.addmm(logits, x[rows], weight.T, beta=0, alpha=scale, out=logits)


def _softmax_parts(logits: Tensor, targets: Tensor, wide: torch.dtype) -> tuple[Tensor, ...]:
    """Of logits (n, V) to base 2, minus their maximum: that of the target, all, 2^all, its sum."""
    logits = logits.to(wide)
    peak = logits.amax(-1, keepdim=True).clamp(min=torch.finfo(wide).min)
    shifted = logits.sub_(peak)
    target_logits = shifted.gather(-1, targets)
    weights = torch.exp2(shifted.clamp_(min=_LEAST))
    return target_logits, shifted, weights, weights.sum(-1, keepdim=True).clamp_(min=1.0)


def _to_gradient(
    logits: Tensor, targets: Tensor, g: Tensor, h: Tensor, entropies: Tensor, with_entropy: bool
) -> None:
    """Overwrites logits (n, V) by their gradient; the others are (n, 1)."""
    _, shifted, weights, total = _softmax_parts(logits, targets, entropies.dtype)
    probabilities = weights.div_(total)
    if with_entropy:
        surprise = shifted.sub_(total.log2()).div_(LOG2_E).add_(entropies)
        probabilities.mul_(surprise.mul_(h).add_(g)).neg_()
    else:
        probabilities.mul_(-g)
    logits.copy_(probabilities.scatter_add_(-1, targets, g))


def linear_log_probs(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    temperature: float = 1.0,
    ignore_index: int = IGNORE_INDEX,
) -> tuple[Tensor, Tensor]:
    """`ops.linear_log_probs` without ever holding all logits, or their gradient."""
    check_targets(targets, x.shape[:-1], weight.shape[0], ignore_index)
    x, weight = cast_to_autocast(x, weight)
    counted = targets != ignore_index
    rows = torch.where(counted, targets, 0).reshape(-1, 1)
    scale = LOG2_E / temperature
    found = _LinearLogProbs.apply(x.reshape(-1, x.shape[-1]), weight, rows, scale)
    log_probs, entropies = (each.view(targets.shape) for each in found)
    return torch.where(counted, log_probs, 0.0), torch.where(counted, entropies, 0.0)


class _LogSigmoid(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return clear_log_sigmoid(x)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output):
        (x,) = ctx.saved_tensors
        return (grad_output * torch.sigmoid(-at_least_float32(x))).to(x.dtype)


def log_sigmoid(x: Tensor) -> Tensor:
    """`ops.log_sigmoid` that keeps only its input for backward."""
    return _LogSigmoid.apply(x)
