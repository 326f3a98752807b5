"""A Transformer block as one operation with a hand-derived gradient.

It needs fewer passes over memory than autograd: a matrix product adds the residual stream, RoPE
writes into the tensor that attention reads, and one product takes the gradients of queries, keys
and values back.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from cs_lm.ops.autocast import autocast_dtype
from cs_lm.ops.manual_backward import (
    apply_rope,
    freqs_cis,
    rms_norm_backward,
    rms_norm_forward,
    swiglu_backward,
    swiglu_forward,
    view_as_complex_pairs,
)
from cs_lm.ops.tiled_attention import attention_backward, attention_forward, row_sums


class _Block(torch.autograd.Function):
    """Keeps both residual streams, q, k, v, attention's output, and the products with w1 and w3.

    Backward computes the normalised rows and the gated product again. Rows are (N, D), N = B T.
    """

    @staticmethod
    def forward(ctx, x, rotation, num_heads, eps, ln1, ln2, *weights):
        dtype = autocast_dtype(x)
        weights = [weight.to(dtype) for weight in weights]
        wq, wk, wv, wo, w1, w2, w3 = weights
        rows = x.reshape(-1, x.shape[-1])
        split = (-1, x.shape[-2], num_heads, x.shape[-1] // num_heads)  # B, T, H, K
        normal, scale1 = rms_norm_forward(rows, eps[0])
        h = normal.mul_(ln1).to(dtype)
        q, k, v = (_heads(h @ weight.T, split) for weight in (wq, wk, wv))
        q, k = (_apply_rope_into(head, rotation, head.new_empty(head.shape)) for head in (q, k))
        v = v.contiguous()
        attended, log_normaliser = attention_forward(q, k, v, None, True)
        middle = _add_product(rows, _rows(attended), wo)
        normal, scale2 = rms_norm_forward(middle, eps[1])
        h = normal.mul_(ln2).to(dtype)
        gate, value, hidden = swiglu_forward(h, w1, w3)
        output = _add_product(middle, hidden, w2)
        ctx.save_for_backward(
            rows,
            rotation,
            scale1,
            q,
            k,
            v,
            attended,
            log_normaliser,
            middle,
            scale2,
            gate,
            value,
            ln1,
            ln2,
            *weights,
        )
        ctx.shape, ctx.split = x.shape, split
        return output.view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output):
        (
            rows,
            rotation,
            scale1,
            q,
            k,
            v,
            attended,
            log_normaliser,
            middle,
            scale2,
            gate,
            value,
            ln1,
            ln2,
            *weights,
        ) = ctx.saved_tensors
        wq, wk, wv, wo, w1, w2, w3 = weights
        grad_output = grad_output.reshape(rows.shape)
        normal = middle * scale2
        grad_h, *of_feed_forward = swiglu_backward(
            grad_output.to(gate.dtype), (normal * ln2).to(gate.dtype), gate, value, w1, w2, w3
        )
        grad_middle, grad_ln2 = rms_norm_backward(grad_h, normal, scale2, ln2)
        grad_middle.add_(grad_output)
        grad = grad_middle.to(q.dtype)
        grad_attended = grad @ wo
        grad_wo = grad.T @ _rows(attended)
        mean = row_sums(_heads(grad_attended * _rows(attended), ctx.split))
        of_heads = attention_backward(
            _heads(grad_attended, ctx.split), mean, q, k, v, None, log_normaliser, True
        )
        grad_qkv = grad.new_empty(len(rows), 3, rows.shape[-1])
        back = rotation.conj()
        for i, turn in enumerate((back, back, None)):
            target = _heads(grad_qkv[:, i], ctx.split)
            target.copy_(of_heads[i]) if turn is None else _apply_rope_into(
                of_heads[i], turn, target
            )
        grad_qkv = grad_qkv.flatten(1)  # (N, 3 D)
        normal = rows * scale1
        grad_weights = grad_qkv.T @ (normal * ln1).to(grad.dtype)
        grad_x, grad_ln1 = rms_norm_backward(
            grad_qkv @ torch.cat((wq, wk, wv)), normal, scale1, ln1
        )
        grad_x.add_(grad_middle)
        of_weights = (*grad_weights.chunk(3), grad_wo, *of_feed_forward)
        of_weights = (gradient.to(ln1.dtype) for gradient in of_weights)
        return grad_x.view(ctx.shape), None, None, None, grad_ln1, grad_ln2, *of_weights


def _heads(rows: Tensor, split: tuple[int, int, int, int]) -> Tensor:  # (N, D) -> (B, H, T, K)
    return rows.view(split).transpose(1, 2)


def _rows(heads: Tensor) -> Tensor:  # (B, H, T, K) -> (N, D), no copy of attention's output
    return heads.transpose(1, 2).reshape(-1, heads.shape[1] * heads.shape[3])


def _apply_rope_into(x: Tensor, rotation: Tensor, target: Tensor) -> Tensor:
    """Writes x (B, H, T, K), rotated by `rotation` (T, K/2), into the target; any strides work."""
    if x.dtype in (torch.float32, torch.float64):
        torch.mul(view_as_complex_pairs(x), rotation, out=view_as_complex_pairs(target))
        return target
    return target.copy_(apply_rope(x, rotation))


def _add_product(x: Tensor, h: Tensor, weight: Tensor) -> Tensor:
    """x + h W^T in x's dtype."""
    return torch.addmm(x, h, weight.T) if x.dtype == h.dtype else x + h @ weight.T


def transformer_block(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    num_heads: int,
    eps: tuple[float, float],
    gains: tuple[Tensor, Tensor],
    weights: tuple[Tensor, ...],
) -> Tensor:
    """y + swiglu(rms_norm(y)) with y = x + attention(rms_norm(x)); attention is causal.

    eps      of the two norms
    gains    of the two norms, (D) each
    weights  wq, wk, wv, wo (D, D), w1 (F, D), w2 (D, F), w3 (F, D)
    Shapes: x (..., T, D), cos and sin (T, K/2), returns like x
    """
    rotation = freqs_cis(cos, sin)
    return _Block.apply(x, rotation, num_heads, eps, *gains, *weights)
