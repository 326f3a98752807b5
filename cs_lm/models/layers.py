"""Layers: each holds parameters and calls the operation that uses them.

Sizes come first; all other arguments are keyword-only: `Linear(12, 20, bias=True)`.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from cs_lm.models.init import EMBEDDING_STD, linear_std, truncated_normal_
from cs_lm.models.kv_cache import KVCache
from cs_lm.ops import reference
from cs_lm.ops.dropout_mask import DropoutFn
from cs_lm.ops.reference import CLEAR, Ops

Rotation = tuple[Tensor, Tensor]  # cos and sin, each (..., T, K/2)


class Factory(NamedTuple):
    """Creates the parameters of layers.

    generator  draws the initial weights; None: torch's global generator
    """

    generator: torch.Generator | None = None
    device: torch.device | str | None = None
    dtype: torch.dtype | None = None

    def full(self, size: int, value: float) -> nn.Parameter:
        """(size), every entry the same."""
        return nn.Parameter(torch.full((size,), value, device=self.device, dtype=self.dtype))

    def normal(self, rows: int, columns: int, std: float) -> nn.Parameter:
        """(rows, columns), drawn by `truncated_normal_`."""
        weight = torch.empty(rows, columns, device=self.device, dtype=self.dtype)
        return nn.Parameter(truncated_normal_(weight, std, self.generator))


DEFAULT = Factory()


class Linear(nn.Module):
    """x W^T, plus a bias (d_out) that starts at 0 if `bias`; `weight` is (d_out, d_in)."""

    def __init__(
        self,
        d_in: int,
        d_out: int,
        *,
        bias: bool = False,
        ops: Ops = CLEAR,
        factory: Factory = DEFAULT,
    ):
        super().__init__()
        self.ops = ops
        self.weight = factory.normal(d_out, d_in, linear_std(d_in, d_out))
        self.bias = factory.full(d_out, 0.0) if bias else None

    def forward(self, x: Tensor) -> Tensor:  # (..., d_in) -> (..., d_out)
        return self.ops.linear(x, self.weight, self.bias)


def has_no_hooks(module: nn.Module) -> bool:
    """Whether the module has no hooks, and the `forward` of its class."""
    return not (
        module._forward_pre_hooks
        or module._forward_hooks
        or module._backward_pre_hooks
        or module._backward_hooks
        or "forward" in module.__dict__
    )


def is_product(module: nn.Module | None) -> bool:
    """Whether calling the module is a product with its weight, and nothing else."""
    return type(module) is Linear and module.bias is None and has_no_hooks(module)


class Embedding(nn.Module):
    """A learnt vector for each token id; `weight` is (V, D)."""

    def __init__(self, vocab_size: int, d_model: int, *, factory: Factory = DEFAULT):
        super().__init__()
        self.weight = factory.normal(vocab_size, d_model, EMBEDDING_STD)

    def forward(self, token_ids: Tensor) -> Tensor:  # (...) -> (..., D)
        return reference.embedding(token_ids, self.weight)


class RMSNorm(nn.Module):
    """Root-mean-square normalisation with a learnt gain that starts at 1."""

    def __init__(
        self, d_model: int, *, eps: float = 1e-5, ops: Ops = CLEAR, factory: Factory = DEFAULT
    ):
        super().__init__()
        self.weight = factory.full(d_model, 1.0)
        self.eps = eps
        self.ops = ops

    def forward(self, x: Tensor) -> Tensor:  # (..., D) -> (..., D)
        return self.ops.rms_norm(x, self.weight, self.eps)


class LayerNorm(nn.Module):
    """Normalisation to mean 0 and variance 1, with a learnt gain (initially 1) and bias (0)."""

    def __init__(
        self, d_model: int, *, eps: float = 1e-5, ops: Ops = CLEAR, factory: Factory = DEFAULT
    ):
        super().__init__()
        self.weight = factory.full(d_model, 1.0)
        self.bias = factory.full(d_model, 0.0)
        self.eps = eps
        self.ops = ops

    def forward(self, x: Tensor) -> Tensor:  # (..., D) -> (..., D)
        return self.ops.layer_norm(x, self.weight, self.bias, self.eps)


class RoPE(nn.Module):
    """Rotary position embedding: tables of cos and sin, built once and shared by all layers.

    Pair i of a head rotates by position * frequencies[i] radians. The tables are not parameters
    and not in the state dict, because they follow from the frequencies.

    frequencies  (K/2) float64 [radians per position], as `ops.inverse_frequencies` gives them
    """

    def __init__(
        self,
        frequencies: Tensor,
        context_length: int,
        *,
        ops: Ops = CLEAR,
        device: torch.device | str | None = None,
    ):
        super().__init__()
        self.ops = ops
        # float64 on the CPU: the same table, to the last bit, on every device
        angle = torch.arange(context_length, dtype=torch.float64).unsqueeze(-1) * frequencies
        for name, table in (("cos", angle.cos()), ("sin", angle.sin())):  # (context, K/2)
            self.register_buffer(name, table.float().to(device), persistent=False)

    def rotation(self, token_positions: Tensor) -> Rotation:
        """cos and sin at the positions: (..., T) -> two of (..., T, K/2).

        Raises: IndexError (on CPU) for a position at or beyond the context length.
        """
        return self.cos[token_positions], self.sin[token_positions]

    def forward(self, x: Tensor, token_positions: Tensor) -> Tensor:
        """x (..., T, K) rotated by its positions (..., T)."""
        return self.ops.rope(x, *self.rotation(token_positions))


class SwiGLU(nn.Module):
    """Gated feed-forward layer with weights w1 and w3 (F, D) and w2 (D, F)."""

    def __init__(self, d_model: int, d_ff: int, *, ops: Ops = CLEAR, factory: Factory = DEFAULT):
        super().__init__()
        self.w1 = Linear(d_model, d_ff, ops=ops, factory=factory)
        self.w2 = Linear(d_ff, d_model, ops=ops, factory=factory)
        self.w3 = Linear(d_model, d_ff, ops=ops, factory=factory)
        self.ops = ops

    def forward(self, x: Tensor) -> Tensor:  # (..., D) -> (..., D)
        layers = self.w1, self.w2, self.w3
        if all(map(is_product, layers)):
            return self.ops.swiglu(x, *(layer.weight for layer in layers))
        return self.w2(reference.silu(self.w1(x)) * self.w3(x))


class MultiHeadSelfAttention(nn.Module):
    """Causal self-attention of H heads of size K = D / H, with or without rotary positions.

    Raises: ValueError when num_heads does not divide d_model.
    """

    def __init__(
        self,
        d_model: int,
        num_heads: int,
        *,
        ops: Ops = CLEAR,
        qkv_bias: bool = False,
        output_bias: bool = False,
        factory: Factory = DEFAULT,
    ):
        super().__init__()
        if d_model % num_heads:
            raise ValueError(
                f"MultiHeadSelfAttention: got d_model {d_model} and {num_heads} heads, need "
                "num_heads to divide d_model"
            )
        self.num_heads = num_heads
        self.ops = ops
        self.q_proj = Linear(d_model, d_model, bias=qkv_bias, ops=ops, factory=factory)
        self.k_proj = Linear(d_model, d_model, bias=qkv_bias, ops=ops, factory=factory)
        self.v_proj = Linear(d_model, d_model, bias=qkv_bias, ops=ops, factory=factory)
        self.output_proj = Linear(d_model, d_model, bias=output_bias, ops=ops, factory=factory)

    def _split_heads(self, x: Tensor) -> Tensor:  # (..., T, D) -> (..., H, T, K)
        return x.unflatten(-1, (self.num_heads, -1)).transpose(-3, -2)

    def forward(
        self,
        x: Tensor,
        rotation: Rotation | None = None,
        mask: Tensor | None = None,
        cache: KVCache | None = None,
        layer: int = 0,
        drop: DropoutFn | None = None,
    ) -> Tensor:
        """The projected output of attention.

        mask   boolean, True = attend, in addition to the causal mask; the same for all heads
        cache  earlier positions of this layer; the new ones are added; x is then (B, T, D)
        drop   dropout of the attention weights
        Shapes: x (..., T, D), rotation two of (..., T, K/2), mask (..., T, S), returns like x
        """
        q, k, v = (self._split_heads(p(x)) for p in (self.q_proj, self.k_proj, self.v_proj))
        if rotation is not None:
            cos, sin = (table.unsqueeze(-3) for table in rotation)  # (..., 1, T, K/2)
            q, k = self.ops.rope(q, cos, sin), self.ops.rope(k, cos, sin)
        if cache is not None:
            k, v = cache.extend(layer, k, v)
            q = q.to(k.dtype)
        if mask is not None:
            mask = mask.unsqueeze(-3)  # (..., 1, T, S)
        heads = self.ops.attention(q, k, v, mask=mask, causal=True, drop=drop)  # (..., H, T, K)
        return self.output_proj(heads.transpose(-3, -2).flatten(-2).to(x.dtype))
