"""Entries of `Ops` with hand-derived gradients that take less time or memory than `ops.py`.

`FAST` names exactly the entries that differ; one test holds each of them to the definition, in
value and in gradient.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from cs_lm.device import as_autocast, product_dtype
from cs_lm.ops import CLEAR, IGNORE_INDEX, check_targets
from cs_lm.tiled_attention import LOG2_E, attention


class _RMSNorm(torch.autograd.Function):
    """With n = x / rms(x) and gradient g: dw = sum(g n), dx = (g w - n mean(g w n)) / rms(x)."""

    @staticmethod
    def forward(ctx, x, weight, eps, dtype):
        normal, scale = _normalised(x, weight, eps, dtype)
        ctx.save_for_backward(x, weight, scale)
        return normal

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output):
        x, weight, scale = ctx.saved_tensors
        normal = x * scale
        product = normal * grad_output
        mean = (product @ weight.to(product.dtype)).div_(x.shape[-1]).unsqueeze(-1)  # (N, 1)
        grad_x = (grad_output * weight).to(product.dtype)
        grad_x.addcmul_(normal, mean, value=-1).mul_(scale)
        return grad_x.to(x.dtype), product.sum(0).to(weight.dtype), None, None


def _normalised(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    scale = wide.square().mean(-1, keepdim=True).add_(eps).rsqrt_()  # (N, 1)
    return (wide * scale).mul_(weight).to(dtype), scale


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`ops.rms_norm` that keeps its input and one number a row for backward.

    Under autocast it gives what the products behind it would round it to.
    """
    if not torch.is_grad_enabled():
        return _normalised(x, weight, eps, product_dtype(x))[0]
    rows = x.reshape(-1, x.shape[-1])
    return _RMSNorm.apply(rows, weight, eps, product_dtype(x)).view(x.shape)


class _Turn(torch.autograd.Function):
    """Pairs as complex numbers, times those of the rotation; the gradient turns back."""

    @staticmethod
    def forward(ctx, x, rotation):
        ctx.save_for_backward(rotation)
        return _turned(x, rotation)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output):
        (rotation,) = ctx.saved_tensors
        return _turned(grad_output, rotation.conj()), None


def _turned(x: Tensor, rotation: Tensor) -> Tensor:
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    pairs = torch.view_as_complex(wide.unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * rotation).flatten(-2).to(x.dtype)


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """`ops.rope` as one complex product."""
    if torch.compiler.is_compiling():  # which writes real loops only
        return CLEAR.rope(x, cos, sin)
    wide = torch.promote_types(x.dtype, torch.float32)
    rotation = torch.complex(cos.to(wide), sin.to(wide))
    return _Turn.apply(x, rotation) if torch.is_grad_enabled() else _turned(x, rotation)


class _SwiGLU(torch.autograd.Function):
    """Keeps x and both products with it; the rest is computed again.

    With a = W1 x, b = W3 x, s = sigmoid(a), and u = W2^T g for the gradient g:

        db = u a s        da = u b (s + a s (1 - s))
    """

    @staticmethod
    def forward(ctx, x, w1, w2, w3):
        gate, value = x @ w1.T, x @ w3.T  # (N, F)
        ctx.save_for_backward(x, w1, w2, w3, gate, value)
        hidden = torch.sigmoid(gate).mul_(gate).mul_(value)
        return hidden @ w2.T

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output):
        x, w1, w2, w3, gate, value = ctx.saved_tensors
        sigmoid = torch.sigmoid(gate)
        silu = gate * sigmoid
        grad_hidden = grad_output @ w2
        grad_value = grad_hidden * silu
        grad_w2 = grad_output.T @ (silu * value)
        slope = torch.addcmul(silu, sigmoid, silu, value=-1).add_(sigmoid)
        grad_gate = grad_hidden.mul_(value).mul_(slope)
        del sigmoid, silu, slope
        grad_x = (grad_gate @ w1).addmm_(grad_value, w3)
        return grad_x, grad_gate.T @ x, grad_w2, grad_value.T @ x


def swiglu(x: Tensor, w1: Tensor, w2: Tensor, w3: Tensor) -> Tensor:
    """`ops.swiglu` that keeps two tensors of the hidden width for backward instead of four."""
    x, w1, w2, w3 = as_autocast(x, w1, w2, w3)
    return _SwiGLU.apply(x.reshape(-1, x.shape[-1]), w1, w2, w3).view(*x.shape[:-1], -1)


# Scores that exist at one time (64 MB in float32): as many rows of them as products need to be
# quick. On a CPU the passes between the products go over parts that stay in its cache.
_BLOCK_SCORES = 1 << 24
_CACHE_SCORES = 1 << 18


class _LinearCrossEntropy(torch.autograd.Function):
    """Loss and both gradients in one pass over blocks of rows; only the gradients are kept."""

    @staticmethod
    def forward(ctx, x, weight, targets, ignore_index, with_gradients):
        rows = min(max(1, _BLOCK_SCORES // weight.shape[0]), len(x))
        wide = torch.promote_types(x.dtype, torch.float32)
        loss_sum = torch.zeros((), dtype=wide, device=x.device)
        grad_x = torch.empty_like(x) if with_gradients else None
        grad_weight = torch.zeros_like(weight, dtype=wide) if with_gradients else None
        memory = x.new_empty(rows, weight.shape[0])
        for start in range(0, len(x), rows):
            block, block_targets = x[start : start + rows], targets[start : start + rows]
            scores = memory[: len(block)]  # (n, V)
            torch.addmm(scores, block, weight.T, beta=0, alpha=LOG2_E, out=scores)
            _add_losses(scores, block_targets, ignore_index, loss_sum, with_gradients)
            if with_gradients:
                torch.mm(scores, weight, out=grad_x[start : start + rows])
                if scores.dtype == wide:
                    grad_weight.addmm_(scores.T, block)
                else:
                    grad_weight += scores.T @ block
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
    scores: Tensor, targets: Tensor, ignore_index: int, loss_sum: Tensor, with_gradients: bool
) -> None:
    """Adds the losses of log2(e) scores (n, V) to `loss_sum`, and uses the scores' memory.

    Their gradients, if wanted, are left in it: d loss / d score = probability - [is target].
    """
    wide = loss_sum.dtype
    rows = len(scores)
    if scores.device.type == "cpu":
        rows = max(1, _CACHE_SCORES // scores.shape[-1])
    for part, part_targets in zip(scores.split(rows), targets.split(rows)):
        counted = (part_targets != ignore_index).unsqueeze(-1)  # (n, 1)
        safe_targets = part_targets.unsqueeze(-1).where(counted, 0)
        part_scores = part.to(wide)
        peak = part_scores.amax(-1, keepdim=True).clamp(min=torch.finfo(wide).min)
        part_scores.sub_(peak)
        target_scores = part_scores.gather(-1, safe_targets)
        normaliser = part_scores.exp2_().sum(-1, keepdim=True)
        losses = (normaliser.log2() - target_scores).where(counted, 0.0)
        loss_sum += losses.sum() / LOG2_E
        if with_gradients:
            part_scores.mul_(counted / normaliser)
            part_scores.scatter_add_(-1, safe_targets, -counted.to(wide))
            if part.dtype != wide:
                part.copy_(part_scores)


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
    x, weight = as_autocast(x, weight)
    return _LinearCrossEntropy.apply(
        x.reshape(-1, x.shape[-1]), weight, targets.reshape(-1), ignore_index, with_gradients
    )


FAST = CLEAR._replace(
    rms_norm=rms_norm,
    rope=rope,
    swiglu=swiglu,
    attention=attention,
    linear_cross_entropy=linear_cross_entropy,
)
