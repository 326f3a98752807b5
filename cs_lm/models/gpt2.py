"""GPT-2: layer norms, learnt positions, GELU, biases, dropout, and a head tied to the embedding."""

import functools

import torch
from torch import Tensor, nn

from cs_lm.config.model import GPT2Config
from cs_lm.models.base import FinishLayer, LanguageModel, leave_it
from cs_lm.models.init import init_gpt2_, init_torch_default_
from cs_lm.models.kv_cache import KVCache
from cs_lm.models.layers import Embedding, LayerNorm, Linear, MultiHeadSelfAttention
from cs_lm.ops.dropout_mask import DropoutFn, dropout_at, new_state, next_pass, reseed
from cs_lm.ops.fused import FAST
from cs_lm.ops.reference import Ops


def _not_dropped(x: Tensor) -> Tensor:
    return x


class GPT2FeedForward(nn.Module):
    """W2 gelu(W1 x + b1) + b2, with weights w1 (F, D) and w2 (D, F)."""

    def __init__(self, d_model: int, d_ff: int, ops: Ops):
        super().__init__()
        self.w1 = Linear(d_model, d_ff, bias=True, ops=ops)
        self.w2 = Linear(d_ff, d_model, bias=True, ops=ops)
        self.ops = ops

    def forward(self, x: Tensor) -> Tensor:  # (..., D) -> (..., D)
        return self.w2(self.ops.gelu(self.w1(x)))


class GPT2Block(nn.Module):
    """Pre-norm block: attention, then feed-forward, each added to the residual stream."""

    def __init__(self, config: GPT2Config, ops: Ops):
        super().__init__()
        d_model = config.d_model
        self.ln1 = LayerNorm(d_model, eps=config.norm_eps, ops=ops)
        self.attn = MultiHeadSelfAttention(
            d_model, config.num_heads, ops=ops, qkv_bias=config.qkv_bias, output_bias=True
        )
        self.ln2 = LayerNorm(d_model, eps=config.norm_eps, ops=ops)
        self.ffn = GPT2FeedForward(d_model, config.d_ff, ops)

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        cache: KVCache | None = None,
        layer: int = 0,
        drops: tuple[DropoutFn | None, DropoutFn, DropoutFn] = (None, _not_dropped, _not_dropped),
    ) -> Tensor:  # (..., T, D) -> (..., T, D)
        """drops  dropout of the attention weights, attention output and feed-forward output"""
        drop_weights, drop_attended, drop_fed = drops
        attended = self.attn(self.ln1(x), None, mask, cache, layer, drop_weights)
        x = x + drop_attended(attended)
        return x + drop_fed(self.ffn(self.ln2(x)))


class GPT2LM(LanguageModel):
    """The model of `GPT2Config`.

    Dropout happens in training mode only. Its masks follow from the seed of `seed_dropout` and the
    number of forward passes since then; the state dict holds both.

    generator  draws the initial weights; None: torch's global generator
    See `LanguageModel` for the rest.
    Source: Radford et al. 2019, Language models are unsupervised multitask learners.
    """

    def __init__(
        self,
        config: GPT2Config,
        ops: Ops = FAST,
        *,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
        activation_checkpointing: bool = False,
        finish_layer: FinishLayer = leave_it,
    ):
        super().__init__(config, ops, activation_checkpointing)
        with torch.device("meta"):  # no memory yet: every matrix is drawn once, below
            self.token_embeddings = Embedding(config.vocab_size, config.d_model)
            self.position_embeddings = Embedding(config.context_length, config.d_model)
            self.layers = nn.ModuleList(GPT2Block(config, ops) for _ in range(config.num_layers))
            self.ln_final = LayerNorm(config.d_model, eps=config.norm_eps, ops=ops)
            tied = config.tied_head
            self.lm_head = None if tied else Linear(config.d_model, config.vocab_size, ops=ops)
        self.make_tables(device)
        if torch.device(device or "cpu").type != "meta":
            self.reset_parameters(generator, device or "cpu", finish_layer)

    def make_tables(self, device: torch.device | str | None = None) -> None:
        self.register_buffer("dropout_state", new_state(0, device))

    def reset_parameters(
        self,
        generator: torch.Generator | None,
        device: torch.device | str,
        finish_layer: FinishLayer = leave_it,
    ) -> None:
        """Sets every parameter to a new initial value, in the order of the state dict."""
        config = self.config
        names = [name for name, _ in self.named_parameters()]
        last_of = {next(n for n in names[::-1] if n.startswith(f"layers.{i}.")): layer
                   for i, layer in enumerate(self.layers)}  # fmt: skip
        for name in names:
            path, _, kind = name.rpartition(".")
            owner = self.get_submodule(path)
            parameter = getattr(owner, kind)
            weight = torch.zeros_like(parameter, device=device)
            if isinstance(owner, LayerNorm):
                weight.fill_(1.0 if kind == "weight" else 0.0)
            elif config.init == "torch":
                init_torch_default_(name, weight, owner.weight.shape[1], generator)
            elif kind == "weight":
                init_gpt2_(name, weight, config.num_layers, generator)
            setattr(owner, kind, nn.Parameter(weight))
            if name in last_of:
                finish_layer(last_of[name])

    def seed_dropout(self, seed: int) -> None:
        reseed(self.dropout_state, seed)

    def embed(self, token_ids: Tensor, token_positions: Tensor) -> tuple[Tensor, list[dict]]:
        x = self.token_embeddings(token_ids) + self.position_embeddings(token_positions)
        num_layers, rate = self.config.num_layers, self.config.drop_rate
        if not self.training or not rate:
            return x, [{}] * num_layers
        key, first_row = next_pass(self.dropout_state), self.first_row
        drop = functools.partial(dropout_at, rate, key, first_row=first_row)
        streams = [range(3 * index + 1, 3 * index + 4) for index in range(num_layers)]
        return drop(0)(x), [{"drops": tuple(map(drop, three))} for three in streams]
