"""Entries of `Ops` with hand-derived gradients that take less time or memory than `ops.py`.

`FAST` names exactly the entries that differ; one test holds each of them to the definition, in
value and in gradient.
"""

import math

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from cs_lm.ops import CLEAR, IGNORE_INDEX, causal_mask, check_targets

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
    @once_differentiable
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


# Queries whose scores exist at one time: (64, S) a head stays in the processor's cache.
_BLOCK_QUERIES = 64


class _Attention(torch.autograd.Function):
    """Attention over blocks of queries; keeps the row normalisers, and no attention weights.

    With P = softmax(S), O = P v and dO the gradient by O, a block's gradients are

        dv = P^T dO      dS = P * (dO v^T - rowsum(dO * O))      dq = dS k      dk = dS^T q

    and P = exp(S - log-normaliser) is computed again (Dao et al. 2022, FlashAttention, appendix B).
    """

    @staticmethod
    def forward(ctx, q, k, v, mask, causal):
        wide = torch.promote_types(q.dtype, torch.float32)
        output = q.new_empty(*q.shape[:-1], v.shape[-1])
        log_normaliser = q.new_empty(*q.shape[:-1], 1, dtype=wide)
        for rows, scores, num_keys in _score_blocks(q, k, mask, causal):
            peak = scores.amax(-1, keepdim=True).clamp(min=torch.finfo(wide).min)
            weights = scores.sub_(peak).exp_()
            total = weights.sum(-1, keepdim=True).clamp(min=1.0)
            summed = weights.to(v.dtype) @ v[..., :num_keys, :]
            output[..., rows, :] = summed / total.to(summed.dtype)
            log_normaliser[..., rows, :] = total.log_().add_(peak)
        ctx.save_for_backward(q, k, v, mask, output, log_normaliser)
        ctx.causal = causal
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output):
        q, k, v, mask, output, log_normaliser = ctx.saved_tensors
        scale = q.shape[-1] ** -0.5
        grad_q, grad_k, grad_v = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        for rows, scores, num_keys in _score_blocks(q, k, mask, ctx.causal):
            keys, values = k[..., :num_keys, :], v[..., :num_keys, :]
            grad_rows = grad_output[..., rows, :]
            mean = (grad_rows * output[..., rows, :]).sum(-1, keepdim=True)
            weights = scores.sub_(log_normaliser[..., rows, :]).exp_()
            grad_v[..., :num_keys, :] += weights.to(v.dtype).transpose(-2, -1) @ grad_rows
            grad_scores = weights.mul_(grad_rows @ values.transpose(-2, -1) - mean)
            grad_scores = grad_scores.mul_(scale).to(q.dtype)
            grad_q[..., rows, :] = grad_scores @ keys
            grad_k[..., :num_keys, :] += grad_scores.transpose(-2, -1) @ q[..., rows, :]
        return grad_q, grad_k, grad_v, None, None


def _score_blocks(q, k, mask, causal):
    """(rows, masked scores of these queries, number of keys they can see), block after block."""
    num_queries, num_keys = q.shape[-2], k.shape[-2]
    wide = torch.promote_types(q.dtype, torch.float32)
    for start in range(0, num_queries, _BLOCK_QUERIES):
        end = min(start + _BLOCK_QUERIES, num_queries)
        seen = num_keys - num_queries + end if causal else num_keys
        block = q[..., start:end, :] * q.shape[-1] ** -0.5
        scores = (block @ k[..., :seen, :].transpose(-2, -1)).to(wide)  # (..., n, seen)
        if causal and end - start > 1:
            later = ~causal_mask(end - start, end - start, q.device)
            scores[..., seen - (end - start) :].masked_fill_(later, -math.inf)
        if mask is not None:
            scores.masked_fill_(~mask[..., start:end, :seen], -math.inf)
        yield slice(start, end), scores, seen


def attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, causal: bool = False
) -> Tensor:
    """`ops.attention` without holding (T, S) scores, and without computing masked blocks.

    q, k and v have the same leading axes.
    """
    if causal and k.shape[-2] < q.shape[-2]:  # queries before the first key
        return CLEAR.attention(q, k, v, mask, causal)
    if mask is not None:
        mask = mask.expand(*mask.shape[:-2], q.shape[-2], k.shape[-2])
    return _Attention.apply(q, k, v, mask, causal)


FAST = CLEAR._replace(attention=attention, linear_cross_entropy=linear_cross_entropy)
