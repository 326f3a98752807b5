"""Attention in tiles: a block of queries against blocks of keys, with a hand-derived gradient."""

import math
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from cs_lm.device import as_autocast
from cs_lm.ops import CLEAR, softmax

LOG2_E = math.log2(math.e)

# A tile has so many scores of each head, and an eighth of the queries within these bounds: where
# there are few, narrow tiles leave out more of the masked half.
_HEAD_SCORES = 1 << 16
_LEAST_QUERIES, _MOST_QUERIES = 64, 256
# Scores of all heads of a tile: on a CPU they stay in its cache, elsewhere they fill the device.
_CPU_TILE_SCORES = 1 << 20
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
        output = _new_heads(q, v.shape[-1])
        log_normaliser = q.new_empty(*q.shape[:-1], 1, dtype=wide)
        memory = _memory(q, k)
        for heads in _head_blocks(q, k):
            keys, values = _flat(k[heads]), _flat(v[heads])  # (n, S, K)
            for rows, tiles in _tiles(q, k, causal):
                queries = _flat(q[heads][..., rows, :])
                peak = total = summed = None
                for tile in tiles:
                    scores = _scores(
                        memory, queries, keys[:, tile], _first_masked(q, k, rows, tile, causal),
                        None if mask is None else mask[heads][..., rows, tile],
                    )  # fmt: skip
                    new_peak = scores.amax(-1, keepdim=True)
                    if mask is not None:  # a row may be all -inf
                        new_peak.clamp_(min=torch.finfo(wide).min)
                    if peak is not None:
                        new_peak = torch.maximum(peak, new_peak)
                    weights = scores.sub_(new_peak).exp2_()
                    new_total = weights.sum(-1, keepdim=True)
                    new_sum = (weights.to(v.dtype) @ values[:, tile]).to(wide)
                    if peak is not None:
                        earlier = peak.sub_(new_peak).exp2_()
                        new_total.addcmul_(total, earlier)
                        new_sum.addcmul_(summed, earlier)
                    peak, total, summed = new_peak, new_total, new_sum
                total.clamp_(min=1.0)  # it is, but for a row of -inf alone
                _put(output[heads][..., rows, :], summed.div_(total))
                _put(log_normaliser[heads][..., rows, :], total.log2_().add_(peak))
        ctx.save_for_backward(q, k, v, mask, output, log_normaliser)
        ctx.causal = causal
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output):
        q, k, v, mask, output, log_normaliser = ctx.saved_tensors
        scale, wide = q.shape[-1] ** -0.5, log_normaliser.dtype
        grad_q, grad_k, grad_v = (_new_heads(x, x.shape[-1]) for x in (q, k, v))
        memory, more_memory = _memory(q, k), _memory(q, k)
        for heads in _head_blocks(q, k):
            keys, values = _flat(k[heads]), _flat(v[heads])
            grad_keys, grad_values = (torch.zeros_like(x, dtype=wide) for x in (keys, values))
            for rows, tiles in _tiles(q, k, ctx.causal):
                queries, grad_rows, averages, normalisers = (
                    _flat(x[heads][..., rows, :]) for x in (q, grad_output, output, log_normaliser)
                )
                mean = (grad_rows * averages).sum(-1, keepdim=True, dtype=wide)
                grad_queries = torch.zeros_like(queries, dtype=wide)
                for tile in tiles:
                    scores = _scores(
                        memory, queries, keys[:, tile], _first_masked(q, k, rows, tile, ctx.causal),
                        None if mask is None else mask[heads][..., rows, tile],
                    )  # fmt: skip
                    weights = scores.sub_(normalisers).exp2_()
                    _add_product(grad_values[:, tile], weights.to(v.dtype).mT, grad_rows)
                    grad_scores = _products(more_memory, grad_rows, values[:, tile].mT).to(wide)
                    grad_scores = grad_scores.sub_(mean).mul_(weights).to(q.dtype)
                    _add_product(grad_queries, grad_scores, keys[:, tile], scale)
                    _add_product(grad_keys[:, tile], grad_scores.mT, queries, scale)
                _put(grad_q[heads][..., rows, :], grad_queries)
            _put(grad_k[heads], grad_keys)
            _put(grad_v[heads], grad_values)
        return grad_q, grad_k, grad_v, None, None


def _new_heads(x: Tensor, size: int) -> Tensor:
    """(B, H, T, size), in memory (B, T, H, size) as the projections around attention have it."""
    return x.new_empty(x.shape[0], x.shape[2], x.shape[1], size).transpose(1, 2)


def _tile_queries(q: Tensor) -> int:
    return min(max(q.shape[-2] // 8, _LEAST_QUERIES), _MOST_QUERIES)


def _heads_and_entries(q: Tensor, k: Tensor) -> tuple[int, int]:
    """How many heads, and if it is all of them, of how many batch entries, make a tile."""
    batch_size, num_heads, num_queries, num_keys = *q.shape[:-1], k.shape[-2]
    most = _CPU_TILE_SCORES if q.device.type == "cpu" else _TILE_SCORES
    rows = _tile_queries(q)
    per_head = max(1, min(num_queries, rows) * min(num_keys, _HEAD_SCORES // rows))
    heads = min(max(1, most // per_head), num_heads)
    return heads, min(max(1, most // (per_head * num_heads)), batch_size)


def _head_blocks(q: Tensor, k: Tensor) -> Iterator[tuple[slice, slice]]:
    """Slices of (B, H): whole batch entries, or a part of one."""
    heads, entries = _heads_and_entries(q, k)
    for entry in range(0, q.shape[0], entries):
        for head in range(0, q.shape[1], heads):
            yield slice(entry, entry + entries), slice(head, head + heads)


def _tiles(q: Tensor, k: Tensor, causal: bool) -> Iterator[tuple[slice, list[slice]]]:
    """Ranges of queries, and for each the ranges of keys that they see."""
    num_queries, num_keys = q.shape[-2], k.shape[-2]
    size = _tile_queries(q)
    key_size = _HEAD_SCORES // size
    for start in range(0, num_queries, size):
        end = min(start + size, num_queries)
        seen = num_keys - num_queries + end if causal else num_keys
        tiles = [slice(key, min(key + key_size, seen)) for key in range(0, seen, key_size)]
        yield slice(start, end), tiles


def _first_masked(q: Tensor, k: Tensor, rows: slice, tile: slice, causal: bool) -> int | None:
    """The key of the tile, from its start, that the tile's first query may not see any more."""
    first = rows.start + k.shape[-2] - q.shape[-2] + 1
    return first - tile.start if causal and tile.stop > first else None


def _memory(q: Tensor, k: Tensor) -> Tensor:
    """Room for the scores of one tile, for all tiles after each other."""
    heads, entries = _heads_and_entries(q, k)
    rows = _tile_queries(q)
    return q.new_empty(heads * entries * rows * (_HEAD_SCORES // rows))


def _products(memory: Tensor, first: Tensor, second: Tensor) -> Tensor:
    shape = (len(first), first.shape[-2], second.shape[-1])
    return torch.bmm(first, second, out=memory[: math.prod(shape)].view(shape))


def _scores(
    memory: Tensor, queries: Tensor, keys: Tensor, first_masked: int | None, mask: Tensor | None
) -> Tensor:
    """log2(e) q k^T / sqrt(K) of a tile, at least float32, -inf where a query may not attend."""
    scale = LOG2_E * queries.shape[-1] ** -0.5
    shape = (len(queries), queries.shape[-2], keys.shape[-2])
    scores = memory[: math.prod(shape)].view(shape)
    if first_masked is None:
        torch.baddbmm(scores, queries, keys.mT, beta=0, alpha=scale, out=scores)
    else:
        device = queries.device
        last = torch.arange(first_masked, first_masked + shape[1], device=device).unsqueeze(-1)
        later = torch.arange(shape[2], device=device) >= last
        bias = queries.new_zeros(shape[1:]).masked_fill_(later, -math.inf)
        torch.baddbmm(bias, queries, keys.mT, alpha=scale, out=scores)
    scores = scores.to(torch.promote_types(queries.dtype, torch.float32))
    return scores if mask is None else scores.masked_fill_(~_flat(mask), -math.inf)


def _flat(x: Tensor) -> Tensor:  # (b, h, T, K) -> (b h, T, K)
    return x.reshape(-1, *x.shape[-2:])


def _put(target: Tensor, flat: Tensor) -> None:
    target.copy_(flat.view(target.shape))


def _add_product(total: Tensor, first: Tensor, second: Tensor, scale: float = 1.0) -> None:
    if first.dtype == total.dtype:
        total.baddbmm_(first, second, alpha=scale)
    else:  # float32 sums of bfloat16 products
        total.add_(first @ second, alpha=scale)


def _of_one_query(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """A step of decoding: a row of scores a head, and no copy of the keys and values."""
    scores = k @ (q * q.shape[-1] ** -0.5).mT  # (..., S, 1): in bfloat16 quicker than q k^T
    scores = scores.mT
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf)
    return softmax(scores) @ v


def attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, causal: bool = False
) -> Tensor:
    """`ops.attention` without holding (T, S) scores, and without computing masked tiles.

    q, k and v have the same leading axes.
    """
    if causal and k.shape[-2] < q.shape[-2]:  # queries before the first key
        return CLEAR.attention(q, k, v, mask, causal)
    q, k, v = as_autocast(q, k, v)
    if q.shape[-2] == 1 and not torch.is_grad_enabled():
        return _of_one_query(q, k, v, mask)
    num_heads = q.shape[-3] if q.dim() > 2 else 1
    if mask is not None:
        mask = mask.expand(*q.shape[:-1], k.shape[-2])
        mask = mask.reshape(-1, num_heads, *mask.shape[-2:])
    four = (x.reshape(-1, num_heads, *x.shape[-2:]) for x in (q, k, v))
    return _Attention.apply(*four, mask, causal).reshape(*q.shape[:-1], v.shape[-1])
