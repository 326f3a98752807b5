"""The Transformer language model, and the loss of any language model."""

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import Tensor, nn

from cs_lm.config import GPT2Config, ModelConfig
from cs_lm.fast_block import transformer_block
from cs_lm.fast_ops import FAST
from cs_lm.kv_cache import KVCache, positions_after
from cs_lm.layers import Embedding, Linear, MultiHeadSelfAttention, RMSNorm, RoPE, Rotation, SwiGLU
from cs_lm.ops import IGNORE_INDEX, Ops
from cs_lm.recompute import recomputed


class TransformerBlock(nn.Module):
    """Pre-norm block: attention, then feed-forward, each added to the residual stream.

    In training on FAST it runs as one operation and does not call its layers; for hooks on them, or
    layers of another kind, set `as_one` to False.
    """

    def __init__(self, config: ModelConfig, ops: Ops = FAST, generator=None, device=None):
        super().__init__()
        self.as_one = ops is FAST  # in training: `fast_block.py`
        self.ln1 = RMSNorm(config.d_model, config.norm_eps, ops, device)
        self.attn = MultiHeadSelfAttention(config.d_model, config.num_heads, ops, generator, device)
        self.ln2 = RMSNorm(config.d_model, config.norm_eps, ops, device)
        self.ffn = SwiGLU(config.d_model, config.d_ff, ops, generator, device)

    def forward(
        self,
        x: Tensor,
        rotation: Rotation,
        mask: Tensor | None = None,
        cache: KVCache | None = None,
        layer: int = 0,
    ) -> Tensor:  # (..., T, D) -> (..., T, D)
        plain = mask is None and cache is None and rotation[0].dim() == 2
        if self.as_one and plain and torch.is_grad_enabled() and not torch.compiler.is_compiling():
            return self._as_one(x, rotation)
        x = x + self.attn(self.ln1(x), rotation, mask, cache, layer)
        return x + self.ffn(self.ln2(x))

    def _as_one(self, x: Tensor, rotation: Rotation) -> Tensor:
        attn, ffn = self.attn, self.ffn
        layers = (
            attn.q_proj, attn.k_proj, attn.v_proj, attn.output_proj, ffn.w1, ffn.w2, ffn.w3,
        )  # fmt: skip
        weights = tuple(layer.weight for layer in layers)
        gains = self.ln1.weight, self.ln2.weight
        return transformer_block(x, *rotation, attn.num_heads, self.ln1.eps, gains, weights)


class TransformerLM(nn.Module):
    """Scores of every next token, from the tokens before it.

    ops        which version of the operations to build on (`ops.CLEAR` or `fast_ops.FAST`)
    generator  where the initial weights come from; None is torch's global generator
    activation_checkpointing  keep only each block's input for backward, and compute the block again
    Raises: ValueError for a config that cannot be built.
    """

    def __init__(
        self,
        config: ModelConfig,
        ops: Ops = FAST,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
        activation_checkpointing: bool = False,
    ):
        super().__init__()
        if problems := config.problems():
            raise ValueError("\n".join(problems))
        self.config = config
        self.ops = ops
        self.activation_checkpointing = activation_checkpointing
        self.token_embeddings = Embedding(config.vocab_size, config.d_model, generator, device)
        self.layers = nn.ModuleList(
            TransformerBlock(config, ops, generator, device) for _ in range(config.num_layers)
        )
        self.ln_final = RMSNorm(config.d_model, config.norm_eps, ops, device)
        self.lm_head = Linear(config.d_model, config.vocab_size, generator, device)
        head_size = config.d_model // config.num_heads
        self.rope = RoPE(config.rope_theta, head_size, config.context_length, ops, device)

    @property
    def head_weight(self) -> Tensor:
        """(V, D), what scores are made with."""
        return self.lm_head.weight

    def hidden_states(
        self,
        token_ids: Tensor,
        token_positions: Tensor | None = None,
        mask: Tensor | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """What the last layer sees: (..., T) ids to (..., T, D).

        token_positions  (..., T); by default they go on from the cache's length, or from 0
        mask             (..., T, S) boolean, True = attend, besides causality
        cache            keys and values of earlier tokens, extended by these
        Raises: ValueError for a sequence longer than the context.
        """
        next_positions = positions_after(cache, token_ids, self.config.context_length)
        if token_positions is None:
            token_positions = next_positions
        rotation = self.rope.rotation(token_positions)
        x = self.token_embeddings(token_ids)  # (..., T, D)
        recomputing = self.activation_checkpointing and torch.is_grad_enabled() and cache is None
        for index, layer in enumerate(self.layers):
            block = functools.partial(layer, rotation=rotation, mask=mask, cache=cache, layer=index)
            x = recomputed(block, x, list(layer.parameters())) if recomputing else block(x)
        if cache is not None:
            cache.advance(token_ids.shape[-1])
        return self.ln_final(x)

    def forward(
        self,
        token_ids: Tensor,
        token_positions: Tensor | None = None,
        mask: Tensor | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """Scores of the next token at every position: (..., T) ids to (..., T, V)."""
        return self.lm_head(self.hidden_states(token_ids, token_positions, mask, cache))


class LanguageModel(Protocol):
    """What training, evaluation and decoding need of a model: any that predicts the next token."""

    config: ModelConfig | GPT2Config
    ops: Ops
    training: bool
    head_weight: Tensor  # (V, D)

    def hidden_states(
        self, token_ids: Tensor, token_positions: Tensor | None = None,
        mask: Tensor | None = None, cache: KVCache | None = None,
    ) -> Tensor: ...  # fmt: skip


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """In evaluation mode while entered: nothing is dropped."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def next_token_loss(
    model: LanguageModel, x: Tensor, y: Tensor, ignore_index: int = IGNORE_INDEX
) -> tuple[Tensor, Tensor]:
    """`cross_entropy` of the targets y (..., T) given x (..., T): sum [nats] and count."""
    hidden = model.hidden_states(x)
    return model.ops.linear_cross_entropy(hidden, model.head_weight, y, ignore_index)


def cast_weights(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """The model with weights of another dtype, for generation; its tables stay as they are."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model


def new_cache(model: LanguageModel, batch_size: int, capacity: int) -> KVCache:
    """In the weights' dtype; on a CPU at least float32, as its bfloat16 products copy the keys."""
    config, weight = model.config, model.head_weight
    head_size = config.d_model // config.num_heads
    dtype = weight.dtype
    if weight.device.type == "cpu":
        dtype = torch.promote_types(dtype, torch.float32)
    return KVCache(
        config.num_layers, batch_size, config.num_heads, capacity, head_size,
        dtype, weight.device,
    )  # fmt: skip
