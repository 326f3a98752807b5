"""Entries of `Ops` with hand-derived gradients; they take less time or memory than `reference.py`.

`FAST` replaces exactly the entries that differ. One test compares each of them with the
definition, in value and in gradient.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from cs_lm.ops import manual_backward
from cs_lm.ops.autocast import autocast_dtype, cast_to_autocast
from cs_lm.ops.few_rows import are_few_rows, linear, product_of_few_rows
from cs_lm.ops.log_probs import BLOCK_LOGITS, linear_log_probs, log_sigmoid
from cs_lm.ops.manual_backward import (
    apply_rope,
    cached_parts,
    freqs_cis,
    layer_norm_backward,
    layer_norm_forward,
    rms_norm_backward,
    rms_norm_forward,
)
from cs_lm.ops.reference import CLEAR, IGNORE_INDEX, at_least_float32, check_targets
from cs_lm.ops.tiled_attention import LOG2_E, attention_backward, attention_forward, row_sums


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, eps, dtype):
        normal, scale = rms_norm_forward(x, eps)
        ctx.save_for_backward(x, weight, scale)
        return normal.mul_(weight).to(dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output):
        x, weight, scale = ctx.saved_tensors
        grad_x, grad_weight = rms_norm_backward(grad_output, x * scale, scale, weight)
        return grad_x.to(x.dtype), grad_weight, None, None


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`ops.rms_norm` that keeps its input and one number a row for backward.

    Under autocast the result has autocast's dtype, as the next matrix product would round it.
    """
    if not torch.is_grad_enabled():
        return rms_norm_forward(x, eps)[0].mul_(weight).to(autocast_dtype(x))
    rows = x.reshape(-1, x.shape[-1])
    return _RMSNorm.apply(rows, weight, eps, autocast_dtype(x)).view(x.shape)


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, eps, dtype):
        normal, scale = layer_norm_forward(x, eps)
        ctx.save_for_backward(normal, weight, scale)
        ctx.dtype = x.dtype
        return torch.addcmul(bias, normal, weight).to(dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output):
        normal, weight, scale = ctx.saved_tensors
        grad_x, *of_parameters = layer_norm_backward(grad_output, normal, scale, weight)
        return grad_x.to(ctx.dtype), *of_parameters, None, None


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """`ops.layer_norm` that keeps its normalised input and one number a row for backward.

    Under autocast the result has autocast's dtype, as the next matrix product would round it.
    Measured: forward and backward of 2,048 x 768 on two CPU cores take 0.66 of the definition's
    time (0.51 to 0.94), but 2.2 times that of torch's own layer_norm, which reads memory once.
    """
    rows = x.reshape(-1, x.shape[-1])
    return _LayerNorm.apply(rows, weight, bias, eps, autocast_dtype(x)).view(x.shape)


class _GELU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return manual_backward.gelu_forward(x)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output):
        return manual_backward.gelu_backward(*ctx.saved_tensors, grad_output)


def gelu(x: Tensor) -> Tensor:
    """`ops.gelu` that keeps only its input for backward.

    Measured: forward and backward of 2,048 x 3,072 on two CPU cores take 0.82 of the time of
    torch's own gelu (0.78 to 0.91) and 0.27 of the definition's.
    """
    return _GELU.apply(x.reshape(-1, x.shape[-1])).view(x.shape)


class _ApplyRope(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, rotation):
        ctx.save_for_backward(rotation)
        return apply_rope(x, rotation)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output):
        (rotation,) = ctx.saved_tensors
        return apply_rope(grad_output, rotation.conj()), None


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """`ops.rope` as one complex product."""
    if torch.compiler.is_compiling():  # it generates code for real numbers only
        return CLEAR.rope(x, cos, sin)
    rotation = freqs_cis(cos, sin)
    return _ApplyRope.apply(x, rotation) if torch.is_grad_enabled() else apply_rope(x, rotation)


class _SwiGLU(torch.autograd.Function):
    """Keeps x and its products with w1 and w3; backward computes the rest again."""

    @staticmethod
    def forward(ctx, x, w1, w2, w3):
        gate, value, hidden = manual_backward.swiglu_forward(x, w1, w3)
        ctx.save_for_backward(x, gate, value, w1, w2, w3)
        return hidden @ w2.T

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output):
        return manual_backward.swiglu_backward(grad_output, *ctx.saved_tensors)


def swiglu(x: Tensor, w1: Tensor, w2: Tensor, w3: Tensor) -> Tensor:
    """`ops.swiglu` that keeps two tensors of the hidden width for backward instead of four."""
    x, w1, w2, w3 = cast_to_autocast(x, w1, w2, w3)
    if not torch.is_grad_enabled():
        product = product_of_few_rows if are_few_rows(x) else linear
        rows = x.reshape(-1, x.shape[-1])
        hidden = manual_backward.gated(product(rows, w1), product(rows, w3))
        return linear(hidden, w2).view(*x.shape[:-1], len(w2))
    rows = _SwiGLU.apply(x.reshape(-1, x.shape[-1]), w1, w2, w3)
    return rows.view(*x.shape[:-1], len(w2))


class _LinearCrossEntropy(torch.autograd.Function):
    """Loss and both gradients in one pass over blocks of rows; only the gradients are kept."""

    @staticmethod
    def forward(ctx, x, weight, targets, ignore_index, with_gradients):
        rows = max(1, min(BLOCK_LOGITS // weight.shape[0], len(x)))
        wide = torch.promote_types(x.dtype, torch.float32)
        loss_sum = torch.zeros((), dtype=wide, device=x.device)
        grad_x = torch.empty_like(x) if with_gradients else None
        grad_weight = torch.zeros_like(weight, dtype=wide) if with_gradients else None
        memory = x.new_empty(rows, weight.shape[0])
        for start in range(0, len(x), rows):
            block, block_targets = x[start : start + rows], targets[start : start + rows]
            logits = memory[: len(block)]  # (n, V)
            torch.addmm(logits, block, weight.T, beta=0, alpha=LOG2_E, out=logits)
            _add_losses(logits, block_targets, ignore_index, loss_sum, with_gradients)
            if with_gradients:
                torch.mm(logits, weight, out=grad_x[start : start + rows])
                if logits.dtype == wide:
                    grad_weight.addmm_(logits.T, block)
                else:
                    grad_weight += logits.T @ block
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


def _add_losses(
    logits: Tensor, targets: Tensor, ignore_index: int, loss_sum: Tensor, with_gradients: bool
) -> None:
    """Adds the losses of the logits (n, V), which come multiplied by log2(e), to `loss_sum`.

    Overwrites the logits; `with_gradients`, by d loss / d logit = probability - [is target].
    """
    wide = loss_sum.dtype
    for part, part_targets in cached_parts(logits, targets):
        counted = (part_targets != ignore_index).unsqueeze(-1)  # (n, 1)
        safe_targets = part_targets.unsqueeze(-1).where(counted, 0)
        part_logits = part.to(wide)
        peak = part_logits.amax(-1, keepdim=True).clamp(min=torch.finfo(wide).min)
        part_logits.sub_(peak)
        target_logits = part_logits.gather(-1, safe_targets)
        normaliser = part_logits.exp2_().sum(-1, keepdim=True)
        losses = (normaliser.log2() - target_logits).where(counted, 0.0)
        loss_sum += losses.sum() / LOG2_E
        if with_gradients:
            part_logits.mul_(counted / normaliser)
            part_logits.scatter_add_(-1, safe_targets, -counted.to(wide))
            if part.dtype != wide:
                part.copy_(part_logits)


def linear_cross_entropy(
    x: Tensor, weight: Tensor, targets: Tensor, ignore_index: int = IGNORE_INDEX
) -> tuple[Tensor, Tensor]:
    """`ops.linear_cross_entropy` without ever holding all logits.

    The gradient of a block's logits is probability minus one-hot target, and is known as soon as
    its loss is. So the forward pass computes both input gradients, block by block, and backward
    only scales them.
    """
    check_targets(targets, x.shape[:-1], weight.shape[0], ignore_index)
    with_gradients = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    x, weight = cast_to_autocast(x, weight)
    return _LinearCrossEntropy.apply(
        x.reshape(-1, x.shape[-1]), weight, targets.reshape(-1), ignore_index, with_gradients
    )


class _Attention(torch.autograd.Function):
    """Keeps the row normalisers for backward, and no attention weights."""

    @staticmethod
    def forward(ctx, q, k, v, mask, causal):
        output, log_normaliser = attention_forward(q, k, v, mask, causal)
        ctx.save_for_backward(q, k, v, mask, output, log_normaliser)
        ctx.causal = causal
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output):
        q, k, v, mask, output, log_normaliser = ctx.saved_tensors
        mean = row_sums(grad_output * output)
        of_heads = attention_backward(grad_output, mean, q, k, v, mask, log_normaliser, ctx.causal)
        return *of_heads, None, None


def _of_one_query(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Attention of a single query, for decoding, without a copy of the keys and values."""
    q = q * q.shape[-1] ** -0.5
    scores = q @ k.mT if k.dtype == torch.float32 else (k @ q.mT).mT  # the faster one of both
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf)
    wide = at_least_float32(scores)
    peak = wide.amax(-1, keepdim=True).clamp_(min=torch.finfo(wide.dtype).min)
    weights = (wide - peak).exp_()
    total = weights.sum(-1, keepdim=True).clamp_(min=1.0)  # below 1 only if all are -inf
    return (weights.to(v.dtype) @ v).div_(total)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    causal: bool = False,
    drop: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """`ops.attention` without holding (T, S) scores, and without computing masked tiles.

    q, k and v have the same leading axes. Calls `ops.attention` itself with `drop`, for causal
    queries before the first key, and for empty inputs.
    """
    is_empty = not q.numel() or not k.numel()
    if drop is not None or is_empty or (causal and k.shape[-2] < q.shape[-2]):
        return CLEAR.attention(q, k, v, mask, causal, drop)
    q, k, v = cast_to_autocast(q, k, v)
    if q.shape[-2] == 1 and not torch.is_grad_enabled():
        return _of_one_query(q, k, v, mask)
    num_heads = q.shape[-3] if q.dim() > 2 else 1
    if mask is not None:
        mask = mask.expand(*q.shape[:-1], k.shape[-2])
        mask = mask.reshape(-1, num_heads, *mask.shape[-2:])
    four = (x.reshape(-1, num_heads, *x.shape[-2:]) for x in (q, k, v))
    return _Attention.apply(*four, mask, causal).reshape(*q.shape[:-1], v.shape[-1])


FAST = CLEAR._replace(  # every entry has a quicker version today
    linear=linear,
    rms_norm=rms_norm,
    layer_norm=layer_norm,
    gelu=gelu,
    rope=rope,
    swiglu=swiglu,
    attention=attention,
    linear_cross_entropy=linear_cross_entropy,
    linear_log_probs=linear_log_probs,
    log_sigmoid=log_sigmoid,
)
OPS = {"clear": CLEAR, "fast": FAST}
