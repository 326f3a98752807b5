"""The Transformer language model."""

import torch
from torch import Tensor, nn

from cs_lm.config.model import ModelConfig
from cs_lm.models.base import FinishLayer, LanguageModel, leave_it
from cs_lm.models.init import linear_std
from cs_lm.models.kv_cache import KVCache
from cs_lm.models.layers import (
    DEFAULT,
    Embedding,
    Factory,
    Linear,
    MultiHeadSelfAttention,
    RMSNorm,
    RoPE,
    Rotation,
    SwiGLU,
    has_no_hooks,
    is_product,
)
from cs_lm.ops import reference
from cs_lm.ops.fused import FAST
from cs_lm.ops.fused_block import transformer_block
from cs_lm.ops.reference import Ops


class TransformerBlock(nn.Module):
    """Pre-norm block: attention, then feed-forward, each added to the residual stream.

    In training with FAST it runs as one operation (ops/fused_block.py) and does not call its
    layers. It calls each layer if one of them has a bias, a hook, another forward or another
    class, or if `fused` is False.
    """

    def __init__(self, config: ModelConfig, ops: Ops = FAST, *, factory: Factory = DEFAULT):
        super().__init__()
        self.fused = ops is FAST  # in training: ops/fused_block.py
        d_model = config.d_model
        self.ln1 = RMSNorm(d_model, eps=config.norm_eps, ops=ops, factory=factory)
        self.attn = MultiHeadSelfAttention(d_model, config.num_heads, ops=ops, factory=factory)
        self.ln2 = RMSNorm(d_model, eps=config.norm_eps, ops=ops, factory=factory)
        self.ffn = SwiGLU(d_model, config.d_ff, ops=ops, factory=factory)

    def forward(
        self,
        x: Tensor,
        rotation: Rotation,
        mask: Tensor | None = None,
        cache: KVCache | None = None,
        layer: int = 0,
    ) -> Tensor:  # (..., T, D) -> (..., T, D)
        plain = mask is None and cache is None and rotation[0].dim() == 2
        learning = torch.is_grad_enabled() and not torch.compiler.is_compiling()
        if self.fused and plain and learning and x.numel() and self._layers_are_unchanged():
            return self._fused_forward(x, rotation)
        x = x + self.attn(self.ln1(x), rotation, mask, cache, layer)
        return x + self.ffn(self.ln2(x))

    def _layers_are_unchanged(self) -> bool:
        """Whether calling the layers one by one gives the same result as `_fused_forward`."""
        own = self._modules
        if any(type(own.get(name)) is not kind for name, kind in _PARTS.items()):
            return False
        projections = [own[name]._modules.get(part) for name, part in _PROJECTIONS]
        return (
            all(map(is_product, projections))
            and all(map(has_no_hooks, own.values()))
            and all(own[name].ops is FAST for name in _PARTS)
        )

    def _fused_forward(self, x: Tensor, rotation: Rotation) -> Tensor:
        weights = tuple(self._modules[name]._modules[part].weight for name, part in _PROJECTIONS)
        gains, eps = (self.ln1.weight, self.ln2.weight), (self.ln1.eps, self.ln2.eps)
        return transformer_block(x, *rotation, self.attn.num_heads, eps, gains, weights)


_PARTS = {"ln1": RMSNorm, "attn": MultiHeadSelfAttention, "ln2": RMSNorm, "ffn": SwiGLU}
_PROJECTIONS = (
    *(("attn", part) for part in ("q_proj", "k_proj", "v_proj", "output_proj")),
    *(("ffn", part) for part in ("w1", "w2", "w3")),
)


def rope_frequencies(config: ModelConfig) -> Tensor:
    """The rotary frequencies of the model: (K/2) float64 [radians per position]."""
    return reference.inverse_frequencies(config.rope_theta, config.d_model // config.num_heads)


class TransformerLM(LanguageModel):
    """The model of `ModelConfig`: RMS norms, rotary positions, SwiGLU, no biases.

    generator  draws the initial weights; None: torch's global generator
    See `LanguageModel` for the rest.
    """

    def __init__(
        self,
        config: ModelConfig,
        ops: Ops = FAST,
        *,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
        activation_checkpointing: bool = False,
        finish_layer: FinishLayer = leave_it,
    ):
        super().__init__(config, ops, activation_checkpointing)
        factory = Factory(generator, device)
        vocab_size, d_model = config.vocab_size, config.d_model
        self.token_embeddings = Embedding(vocab_size, d_model, factory=factory)
        self.layers = nn.ModuleList()
        for _ in range(config.num_layers):
            self.layers.append(TransformerBlock(config, ops, factory=factory))
            finish_layer(self.layers[-1])
        self.ln_final = RMSNorm(d_model, eps=config.norm_eps, ops=ops, factory=factory)
        self.lm_head = Linear(d_model, vocab_size, ops=ops, factory=factory)
        if config.mup_base_width is not None:
            self._scale_head(config.mup_base_width)
        self.make_tables(device)

    @torch.no_grad()
    def _scale_head(self, base: int) -> None:
        """muP: the head's weights are those of the base width, times base width / width.

        Source: Yang et al. 2022, Tensor Programs V, table 3; optim/param_groups.py has the rest.
        """
        vocab_size, d_model = self.lm_head.weight.shape
        wanted = linear_std(base, vocab_size) * base / d_model
        self.lm_head.weight.mul_(wanted / linear_std(d_model, vocab_size))

    def make_tables(self, device: torch.device | str | None = None) -> None:
        frequencies = rope_frequencies(self.config)
        self.rope = RoPE(frequencies, self.config.context_length, ops=self.ops, device=device)

    def embed(self, token_ids: Tensor, token_positions: Tensor) -> tuple[Tensor, list[dict]]:
        rotation = self.rope.rotation(token_positions)
        return self.token_embeddings(token_ids), [{"rotation": rotation}] * len(self.layers)
