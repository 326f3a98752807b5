"""Attention in tiles: a block of queries against blocks of keys, with a hand-derived gradient."""

import math
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from cs_lm.ops.reference import at_least_float32

LOG2_E = math.log2(math.e)
_ALL = slice(None), slice(None)

# A tile has at most this many scores for each head, and an eighth of the queries, within these
# bounds: with few queries, small tiles skip more of the masked half.
_HEAD_SCORES = 1 << 16
_LEAST_QUERIES, _MOST_QUERIES = 64, 256
# Scores of all heads of a tile: they fit the cache of a CPU, or fill another device.
_CPU_TILE_SCORES = 1 << 20
_TILE_SCORES = 1 << 26


def attention_forward(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool
) -> tuple[Tensor, Tensor]:
    """Attention, computed tile by tile, and the row normalisers that backward needs.

    Shapes: q (B, H, T, K), k and v (B, H, S, K), mask (B, H, T, S), returns (B, H, T, K) and
    (B, H, T, 1); the memory layout of the output is (B, T, H, K)
    """
    output = _new_heads(q, v.shape[-1])
    log_normaliser = q.new_empty(
        *q.shape[:-1], 1, dtype=torch.promote_types(q.dtype, torch.float32)
    )
    (memory,) = _memory(q, k, 1)
    for heads in _head_blocks(q, k):
        keys, values = _flat(k, heads), _flat(v, heads)  # (n, S, K)
        for rows, tiles in _tiles(q, k, causal, mask, heads):
            queries = _flat(q, heads, rows)
            so_far = None
            for tile, first_masked in tiles:
                part = None if mask is None else _flat(mask[..., tile], heads, rows)
                scores = _scores(memory, queries, keys[:, tile], first_masked, part)
                so_far = _averaged(scores, values[:, tile], so_far, mask is not None)
            peak, total, summed = so_far
            total.clamp_(min=1.0)  # below 1 only in a row that is all -inf
            _put(output, summed.div_(total), heads, rows)
            _put(log_normaliser, total.log2_().add_(peak), heads, rows)
    return output, log_normaliser


def attention_backward(
    grad_output: Tensor,
    mean: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    log_normaliser: Tensor,
    causal: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v, in their shapes and contiguous.

    With P = softmax(S), O = P v and dO the gradient of O, a tile's gradients are

        dv = P^T dO      dS = P * (dO v^T - rowsum(dO * O))      dq = dS k      dk = dS^T q

    P = exp(S - log-normaliser) is computed again (Dao et al. 2022, FlashAttention, appendix B).

    mean  `row_sums` of dO * O, (B, H, T, 1)
    """
    scale, wide = q.shape[-1] ** -0.5, log_normaliser.dtype
    grad_q, grad_k, grad_v = (x.new_empty(x.shape) for x in (q, k, v))
    memory, more_memory = _memory(q, k, 2)
    for heads in _head_blocks(q, k):
        keys, values = _flat(k, heads), _flat(v, heads)
        grad_keys, grad_values = (torch.zeros_like(x, dtype=wide) for x in (keys, values))
        for rows, tiles in _tiles(q, k, causal, mask, heads):
            queries, grad_rows, means, normalisers = (
                _flat(x, heads, rows) for x in (q, grad_output, mean, log_normaliser)
            )
            grad_queries = torch.zeros_like(queries, dtype=wide)
            for tile, first_masked in tiles:
                part = None if mask is None else _flat(mask[..., tile], heads, rows)
                scores = _scores(memory, queries, keys[:, tile], first_masked, part)
                weights = scores.sub_(normalisers).exp2_()
                _add_product(grad_values[:, tile], weights.to(v.dtype).mT, grad_rows)
                grad_scores = at_least_float32(
                    _products(more_memory, grad_rows, values[:, tile].mT)
                )
                grad_scores = grad_scores.sub_(means).mul_(weights).to(q.dtype)
                _add_product(grad_queries, grad_scores, keys[:, tile], scale)
                _add_product(grad_keys[:, tile], grad_scores.mT, queries, scale)
            _put(grad_q, grad_queries, heads, rows)
        _put(grad_k, grad_keys, heads)
        _put(grad_v, grad_values, heads)
    return grad_q, grad_k, grad_v


def row_sums(x: Tensor) -> Tensor:
    """Sums over the last axis, which keeps size 1, in at least float32."""
    return x.sum(-1, keepdim=True, dtype=torch.promote_types(x.dtype, torch.float32))


def _averaged(
    scores: Tensor,
    values: Tensor,
    so_far: tuple[Tensor, Tensor, Tensor] | None,
    may_be_empty: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Each row's highest score, sum of weights and sum of weighted values, after one more tile.

    All logarithms are to base 2: exp2 takes a third of the time of exp on a CPU.
    Each tile corrects the maximum and the sums of the tiles before it (Milakov and Gimelshein
    2018).
    """
    peak = scores.amax(-1, keepdim=True)
    if may_be_empty:  # a row may be all -inf
        peak.clamp_(min=torch.finfo(scores.dtype).min)
    if so_far is not None:
        peak = torch.maximum(so_far[0], peak)
    weights = scores.sub_(peak).exp2_()
    total = weights.sum(-1, keepdim=True)
    summed = (weights.to(values.dtype) @ values).to(scores.dtype)
    if so_far is not None:
        earlier = so_far[0].sub_(peak).exp2_()
        total.addcmul_(so_far[1], earlier)
        summed.addcmul_(so_far[2], earlier)
    return peak, total, summed


def _new_heads(x: Tensor, size: int) -> Tensor:
    """Empty (B, H, T, size), with memory layout (B, T, H, size) like the projections around it."""
    return x.new_empty(x.shape[0], x.shape[2], x.shape[1], size).transpose(1, 2)


def _tile_queries(q: Tensor) -> int:
    return min(max(q.shape[-2] // 8, _LEAST_QUERIES), _MOST_QUERIES)


def _scores_of_a_head(q: Tensor, k: Tensor) -> int:
    """Scores of one head in the largest tile."""
    rows = _tile_queries(q)
    return min(q.shape[-2], rows) * min(k.shape[-2], _HEAD_SCORES // rows)


def _heads_and_entries(q: Tensor, k: Tensor) -> tuple[int, int]:
    """How many heads a tile has, and of how many batch entries (above 1 only with all heads)."""
    batch_size, num_heads = q.shape[:2]
    most = _CPU_TILE_SCORES if q.device.type == "cpu" else _TILE_SCORES
    per_head = max(1, _scores_of_a_head(q, k))
    heads = min(max(1, most // per_head), num_heads)
    return heads, min(max(1, most // (per_head * num_heads)), batch_size)


def _head_blocks(q: Tensor, k: Tensor) -> Iterator[tuple[slice, slice]]:
    """Slices of (B, H): whole batch entries, or some heads of one."""
    heads, entries = _heads_and_entries(q, k)
    if (entries, heads) == q.shape[:2]:
        yield _ALL
        return
    for entry in range(0, q.shape[0], entries):
        for head in range(0, q.shape[1], heads):
            yield slice(entry, entry + entries), slice(head, head + heads)


def _tiles(
    q: Tensor, k: Tensor, causal: bool, mask: Tensor | None, heads: tuple[slice, slice]
) -> Iterator[tuple[slice, list]]:
    """Ranges of queries, and for each the ranges of keys that they attend to.

    Each range of keys comes with the index, inside the range, of the first key that the first
    query may not attend to. It is None if there is no such key.
    """
    num_queries, num_keys = q.shape[-2], k.shape[-2]
    size = _tile_queries(q)
    key_size = _HEAD_SCORES // size
    for start in range(0, num_queries, size):
        end = min(start + size, num_queries)
        seen = num_keys - num_queries + end if causal else num_keys
        later = num_keys - num_queries + start + 1 if causal else num_keys
        first, seen = _unmasked(mask, heads, slice(start, end), seen)
        tiles = []
        for key in range(first, seen, key_size):
            stop = min(key + key_size, seen)
            tiles.append((slice(key, stop), later - key if stop > later else None))
        yield slice(start, end), tiles


def _unmasked(
    mask: Tensor | None, heads: tuple[slice, slice], rows: slice, seen: int
) -> tuple[int, int]:
    """The range of the first `seen` keys that some of the rows may attend to: at least one key.

    On a CPU only: elsewhere the host would wait for the device.
    """
    if mask is None or mask.device.type != "cpu" or torch.compiler.is_compiling():
        return 0, seen
    own = mask if heads is _ALL else mask[heads]
    if own.stride(1) == 0:  # the same for all heads
        own = own[:, :1]
    places = own[:, :, rows, :seen].any(dim=(0, 1, 2)).nonzero()
    return (places[0].item(), places[-1].item() + 1) if len(places) else (0, 1)


def _memory(q: Tensor, k: Tensor, count: int) -> Iterable[Tensor]:
    """`count` buffers for the scores of one tile; all tiles reuse them."""
    heads, entries = _heads_and_entries(q, k)
    return q.new_empty(count, heads * entries * _scores_of_a_head(q, k))


def _room(memory: Tensor, *shape: int) -> Tensor:
    return memory[: math.prod(shape)].view(shape)


def _products(memory: Tensor, first: Tensor, second: Tensor) -> Tensor:
    room = _room(memory, len(first), first.shape[-2], second.shape[-1])
    return torch.bmm(first, second, out=room)


def _scores(
    memory: Tensor, queries: Tensor, keys: Tensor, first_masked: int | None, mask: Tensor | None
) -> Tensor:
    """log2(e) q k^T / sqrt(K) of a tile, at least float32, -inf where a query may not attend."""
    scale = LOG2_E * queries.shape[-1] ** -0.5
    scores = _room(memory, len(queries), queries.shape[-2], keys.shape[-2])
    if first_masked is None:
        torch.baddbmm(scores, queries, keys.mT, beta=0, alpha=scale, out=scores)
    else:
        bias = queries.new_full(scores.shape[1:], -math.inf).triu_(first_masked)
        torch.baddbmm(bias, queries, keys.mT, alpha=scale, out=scores)
    scores = at_least_float32(scores)
    return scores if mask is None else scores.masked_fill_(~mask, -math.inf)


def _flat(x: Tensor, heads: tuple[slice, slice], rows: slice | None = None) -> Tensor:
    """The given heads and rows of x (B, H, T, K), as (b h, t, K)."""
    if heads is not _ALL:
        x = x[heads]
    if rows is not None and rows.stop - rows.start < x.shape[-2]:
        x = x[..., rows, :]
    return x.reshape(-1, *x.shape[-2:])


def _put(
    target: Tensor, flat: Tensor, heads: tuple[slice, slice], rows: slice | None = None
) -> None:
    if heads is not _ALL:
        target = target[heads]
    if rows is not None:
        target = target[..., rows, :]
    target.copy_(flat.view(target.shape))


def _add_product(total: Tensor, first: Tensor, second: Tensor, scale: float = 1.0) -> None:
    if first.dtype == total.dtype:
        total.baddbmm_(first, second, alpha=scale)
    else:  # float32 sums of bfloat16 products
        total.add_(first @ second, alpha=scale)
