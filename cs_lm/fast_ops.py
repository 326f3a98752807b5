"""Entries of `Ops` with hand-derived gradients that take less time or memory than `ops.py`.

`FAST` names exactly the entries that differ; one test holds each of them to the definition, in
value and in gradient.
"""

import math

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from cs_lm.ops import CLEAR, IGNORE_INDEX, check_targets

_LOG2_E = math.log2(math.e)


def _as_autocast(*tensors: Tensor) -> list[Tensor]:
    """What a matrix product under autocast would make of its operands."""
    device = tensors[0].device.type
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return list(tensors)
    dtype = torch.get_autocast_dtype(device)
    return [t.to(dtype) if t.dtype == torch.float32 else t for t in tensors]


class _RMSNorm(torch.autograd.Function):
    """With n = x / rms(x) and gradient g: dw = sum(g n), dx = (g w - n mean(g w n)) / rms(x)."""

    @staticmethod
    def forward(ctx, x, weight, eps, dtype):
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        scale = wide.square().mean(-1, keepdim=True).add_(eps).rsqrt_()  # (N, 1)
        ctx.save_for_backward(x, weight, scale)
        return (wide * scale).mul_(weight).to(dtype)

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


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`ops.rms_norm` that keeps its input and one number a row for backward.

    Under autocast it gives what the products behind it would round it to.
    """
    dtype = _as_autocast(x)[0].dtype if x.dtype == torch.float32 else x.dtype
    return _RMSNorm.apply(x.reshape(-1, x.shape[-1]), weight, eps, dtype).view(x.shape)


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
    wide = torch.promote_types(x.dtype, torch.float32)
    return _Turn.apply(x, torch.complex(cos.to(wide), sin.to(wide)))


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
    x, w1, w2, w3 = _as_autocast(x, w1, w2, w3)
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
            torch.addmm(scores, block, weight.T, beta=0, alpha=_LOG2_E, out=scores)
            _losses_and_gradients(scores, block_targets, ignore_index, loss_sum)
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


def _losses_and_gradients(
    scores: Tensor, targets: Tensor, ignore_index: int, loss_sum: Tensor
) -> None:
    """Adds the losses to `loss_sum`, and turns the scores (n, V) into their gradients in place.

    d loss / d score = probability - [is target]
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
        loss_sum += losses.sum() / _LOG2_E
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
    x, weight = _as_autocast(x, weight)
    return _LinearCrossEntropy.apply(
        x.reshape(-1, x.shape[-1]), weight, targets.reshape(-1), ignore_index, with_gradients
    )


# A tile of scores has so many queries, and as many keys and heads as keep its size: on a CPU it
# stays in the cache; elsewhere it is large enough to fill the device.
_TILE_QUERIES = 128
_TILE_KEYS = 1024
_CPU_TILE_SCORES = 1 << 19
_TILE_SCORES = 1 << 26


class _Attention(torch.autograd.Function):
    """Attention tile by tile; keeps the row normalisers, and no attention weights.

    With P = softmax(S), O = P v and dO the gradient by O, a tile's gradients are

        dv = P^T dO      dS = P * (dO v^T - rowsum(dO * O))      dq = dS k      dk = dS^T q

    and P = exp(S - log-normaliser) is computed again (Dao et al. 2022, FlashAttention, appendix B).
    All logarithms are to base 2: exp2 takes a third of the time of exp on a CPU.
    A row's maximum and sum over the tiles seen so far are corrected by each further tile (Milakov
    and Gimelshein 2018).
    """

    @staticmethod
    def forward(ctx, q, k, v, mask, causal):
        wide = torch.promote_types(q.dtype, torch.float32)
        output = q.new_empty(*q.shape[:-1], v.shape[-1])
        log_normaliser = q.new_empty(*q.shape[:-1], 1, dtype=wide)
        for heads, rows, tiles in _tiles(q, k, causal):
            peak = total = summed = None
            for keys in tiles:
                scores = _scores(q, k, mask, causal, heads, rows, keys)
                new_peak = scores.amax(-1, keepdim=True)
                if mask is not None:  # a row may be all -inf
                    new_peak.clamp_(min=torch.finfo(wide).min)
                if peak is not None:
                    new_peak = torch.maximum(peak, new_peak)
                weights = scores.sub_(new_peak).exp2_()
                new_total = weights.sum(-1, keepdim=True)
                new_sum = (weights.to(v.dtype) @ v[heads, keys]).to(wide)
                if peak is not None:
                    earlier = peak.sub_(new_peak).exp2_()
                    new_total.addcmul_(total, earlier)
                    new_sum.addcmul_(summed, earlier)
                peak, total, summed = new_peak, new_total, new_sum
            total.clamp_(min=1.0)  # it is, but for a row of -inf alone
            output[heads, rows] = summed.div_(total)
            log_normaliser[heads, rows] = total.log2_().add_(peak)
        ctx.save_for_backward(q, k, v, mask, output, log_normaliser)
        ctx.causal = causal
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output):
        q, k, v, mask, output, log_normaliser = ctx.saved_tensors
        scale, wide = q.shape[-1] ** -0.5, log_normaliser.dtype
        grad_output = grad_output.contiguous()
        grad_q, grad_k, grad_v = (torch.zeros_like(x, dtype=wide) for x in (q, k, v))
        for heads, rows, tiles in _tiles(q, k, ctx.causal):
            grad_rows, q_rows = grad_output[heads, rows], q[heads, rows]
            mean = (grad_rows * output[heads, rows]).sum(-1, keepdim=True, dtype=wide)
            for keys in tiles:
                scores = _scores(q, k, mask, ctx.causal, heads, rows, keys)
                weights = scores.sub_(log_normaliser[heads, rows]).exp2_()
                _add_product(grad_v[heads, keys], weights.to(v.dtype).mT, grad_rows)
                grad_scores = (grad_rows @ v[heads, keys].mT).to(wide).sub_(mean).mul_(weights)
                grad_scores = grad_scores.to(q.dtype)
                _add_product(grad_q[heads, rows], grad_scores, k[heads, keys], scale)
                _add_product(grad_k[heads, keys], grad_scores.mT, q_rows, scale)
        return grad_q.to(q.dtype), grad_k.to(k.dtype), grad_v.to(v.dtype), None, None


def _tiles(q: Tensor, k: Tensor, causal: bool):
    """(heads, queries, the key ranges that they see), as slices, for (N, T, K) and (N, S, K)."""
    num_heads, num_queries, num_keys = len(q), q.shape[-2], k.shape[-2]
    most = _CPU_TILE_SCORES if q.device.type == "cpu" else _TILE_SCORES
    per_head = min(num_queries, _TILE_QUERIES) * min(num_keys, _TILE_KEYS)
    heads = max(1, most // max(1, per_head))
    for head in range(0, num_heads, heads):
        for start in range(0, num_queries, _TILE_QUERIES):
            end = min(start + _TILE_QUERIES, num_queries)
            seen = num_keys - num_queries + end if causal else num_keys
            tiles = [slice(key, min(key + _TILE_KEYS, seen)) for key in range(0, seen, _TILE_KEYS)]
            yield slice(head, head + heads), slice(start, end), tiles


def _scores(q, k, mask, causal, heads: slice, rows: slice, keys: slice) -> Tensor:
    """log2(e) q k^T / sqrt(K) of a tile, at least float32, -inf where a query may not attend."""
    queries, seen = q[heads, rows], k[heads, keys]
    num_queries, num_keys = queries.shape[-2], seen.shape[-2]
    scale = _LOG2_E * q.shape[-1] ** -0.5
    first = rows.start + k.shape[-2] - q.shape[-2]  # the last key of the first query
    if causal and keys.stop > first + 1:
        last = torch.arange(first, first + num_queries, device=q.device).unsqueeze(-1)
        later = torch.arange(keys.start, keys.stop, device=q.device) > last
        bias = queries.new_zeros(num_queries, num_keys).masked_fill_(later, -math.inf)
        scores = torch.baddbmm(bias, queries, seen.mT, alpha=scale)
    else:
        nothing = queries.new_empty(len(queries), num_queries, num_keys)
        scores = torch.baddbmm(nothing, queries, seen.mT, beta=0, alpha=scale)
    scores = scores.to(torch.promote_types(q.dtype, torch.float32))
    if mask is not None:
        scores.masked_fill_(~mask[heads, rows, keys], -math.inf)
    return scores


def _add_product(total: Tensor, first: Tensor, second: Tensor, scale: float = 1.0) -> None:
    if first.dtype == total.dtype:
        total.baddbmm_(first, second, alpha=scale)
    else:  # float32 sums of bfloat16 products
        total.add_(first @ second, alpha=scale)


def attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, causal: bool = False
) -> Tensor:
    """`ops.attention` without holding (T, S) scores, and without computing masked tiles.

    q, k and v have the same leading axes.
    """
    if causal and k.shape[-2] < q.shape[-2]:  # queries before the first key
        return CLEAR.attention(q, k, v, mask, causal)
    q, k, v = _as_autocast(q, k, v)
    if mask is not None:
        mask = mask.expand(*q.shape[:-1], k.shape[-2]).reshape(-1, q.shape[-2], k.shape[-2])
    flat = (x.reshape(-1, *x.shape[-2:]) for x in (q, k, v))
    return _Attention.apply(*flat, mask, causal).view(*q.shape[:-1], v.shape[-1])


FAST = CLEAR._replace(
    rms_norm=rms_norm,
    rope=rope,
    swiglu=swiglu,
    attention=attention,
    linear_cross_entropy=linear_cross_entropy,
)
