"""Attention as one Triton kernel, for CUDA: scores stay in the processor's own memory.

Each program has some queries of one row, and goes through the keys in tiles. It keeps the greatest
score so far and the sum of exponentials below it, and rescales what it has when the greatest score
grows (Dao et al. 2022, FlashAttention). Needs the package `triton`, which torch for CUDA brings.
With the environment variable TRITON_INTERPRET=1, Triton runs it on a CPU, slowly.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from cs_lm.ops.tiled_attention import LOG2_E

_TILE = 64  # queries, and keys, at once


@triton.jit
def _attend(
    q_start, k_start, v_start, output_start, sums_start,
    num_queries, num_keys, width, scale,
    IS_CAUSAL: tl.constexpr, TILE: tl.constexpr, PADDED_WIDTH: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(1).to(tl.int64)
    queries = tl.program_id(0) * TILE + tl.arange(0, TILE)
    columns = tl.arange(0, PADDED_WIDTH)
    in_queries = (queries < num_queries)[:, None] & (columns < width)[None, :]
    places = (row * num_queries + queries)[:, None] * width + columns[None, :]
    q = tl.load(q_start + places, mask=in_queries, other=0.0)

    greatest = tl.full((TILE,), float("-inf"), tl.float32)
    total = tl.zeros((TILE,), tl.float32)
    output = tl.zeros((TILE, PADDED_WIDTH), tl.float32)
    last_key = queries + num_keys - num_queries  # that a query sees, where it is causal
    end = num_keys
    if IS_CAUSAL:
        end = tl.minimum(num_keys, (tl.program_id(0) + 1) * TILE + num_keys - num_queries)
    for first in range(0, end, TILE):
        keys = first + tl.arange(0, TILE)
        in_keys = (keys < num_keys)[:, None] & (columns < width)[None, :]
        key_places = (row * num_keys + keys)[:, None] * width + columns[None, :]
        k = tl.load(k_start + key_places, mask=in_keys, other=0.0)
        v = tl.load(v_start + key_places, mask=in_keys, other=0.0)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        is_seen = (keys < num_keys)[None, :]
        if IS_CAUSAL:
            is_seen = is_seen & (keys[None, :] <= last_key[:, None])
        scores = tl.where(is_seen, scores, float("-inf"))
        new_greatest = tl.maximum(greatest, tl.max(scores, 1))
        weights = tl.exp2(scores - new_greatest[:, None])
        shrink = tl.exp2(greatest - new_greatest)
        total = total * shrink + tl.sum(weights, 1)
        products = tl.dot(weights.to(v.dtype), v, input_precision="ieee")
        output = output * shrink[:, None] + products
        greatest = new_greatest

    output = output / total[:, None]
    tl.store(output_start + places, output.to(q.dtype), mask=in_queries)
    sums = greatest + tl.log2(total)
    tl.store(sums_start + row * num_queries + queries, sums, mask=queries < num_queries)


def attention_forward(
    q: Tensor, k: Tensor, v: Tensor, is_causal: bool = False
) -> tuple[Tensor, Tensor]:
    """Attention of (..., T_q, D) queries, (..., T_k, D) keys and values, and its (..., T_q) sums.

    is_causal  query i sees the keys up to i + T_k - T_q; T_q may not be greater than T_k
    Numerics: scores and sums are float32, products of float32 tensors too (no TF32). The sums are
    logarithms to base 2 of the sums of exponentials, as those of `tiled_attention`, without its
    last dimension.
    """
    q, k, v = (x.contiguous() for x in (q, k, v))
    *rows, num_queries, width = q.shape
    num_keys, num_rows = k.shape[-2], math.prod(rows)
    output, sums = torch.empty_like(q), q.new_empty(*rows, num_queries, dtype=torch.float32)
    grid = triton.cdiv(num_queries, _TILE), num_rows
    _attend[grid](
        q, k, v, output, sums, num_queries, num_keys, width, LOG2_E / math.sqrt(width),
        IS_CAUSAL=is_causal, TILE=_TILE, PADDED_WIDTH=max(16, triton.next_power_of_2(width)),
    )  # fmt: skip
    return output, sums
