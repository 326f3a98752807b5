"""Maps each tensor of another program's layout to our weights, and converts between them."""

import re
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from cs_lm.config.model import GPT2Config, ModelConfig


class TensorMapping(NamedTuple):
    """One tensor of theirs: one or more of our weights, concatenated along its last axis.

    transposed   theirs is (d_in, d_out), ours (d_out, d_in)
    num_heads    above 0: reorder rotary pairs; in a head of size K, a pair is rows 2i and 2i + 1
                 in ours, i and i + K/2 in theirs
    num_leading  number of axes of length 1 before the others in theirs
    """

    ours: tuple[str, ...]
    transposed: bool = False
    num_heads: int = 0
    num_leading: int = 0

    def theirs_shape(self, ours_shape: Sequence[int]) -> tuple[int, ...]:
        shape = tuple(reversed(ours_shape)) if self.transposed else tuple(ours_shape)
        return (1,) * self.num_leading + (*shape[:-1], shape[-1] * len(self.ours))

    def to_theirs(self, ours: Sequence[Tensor]) -> Tensor:
        parts = [_pairs_to_halves(x, self.num_heads) if self.num_heads else x for x in ours]
        parts = [x.T if self.transposed else x for x in parts]
        whole = torch.cat(parts, -1) if len(parts) > 1 else parts[0]
        return whole.view((1,) * self.num_leading + whole.shape) if self.num_leading else whole

    def to_ours(self, theirs: Tensor, take_over: bool) -> list[Tensor]:
        """Our weights, float32, in new memory; with `take_over` in their memory, if possible.

        This allocates nothing else: memory that is freed in between stays with the process.
        """
        whole = theirs.reshape(theirs.shape[self.num_leading :])
        parts = [x.T if self.transposed else x for x in whole.chunk(len(self.ours), -1)]
        parts = [_halves_to_pairs(x, self.num_heads) if self.num_heads else x for x in parts]
        is_all = theirs.untyped_storage().nbytes() == theirs.numel() * theirs.element_size()
        if take_over and is_all and len(parts) == 1 and parts[0].is_contiguous():
            return [parts[0].float()]
        return [torch.empty(x.shape, dtype=torch.float32).copy_(x) for x in parts]


Layout = dict[str, TensorMapping]


def _pairs_to_halves(weight: Tensor, num_heads: int) -> Tensor:
    return weight.unflatten(0, (num_heads, -1, 2)).transpose(1, 2).flatten(0, 2)


def _halves_to_pairs(weight: Tensor, num_heads: int) -> Tensor:
    return weight.unflatten(0, (num_heads, 2, -1)).transpose(1, 2).flatten(0, 2)


_QKV = ("q_proj", "k_proj", "v_proj")


def gpt2_layout(config: GPT2Config) -> Layout:
    """transformers' `GPT2LMHeadModel`, without the optional prefix `transformer.`."""
    layout = {
        "wte.weight": TensorMapping(("token_embeddings.weight",)),
        "wpe.weight": TensorMapping(("position_embeddings.weight",)),
        "ln_f.weight": TensorMapping(("ln_final.weight",)),
        "ln_f.bias": TensorMapping(("ln_final.bias",)),
    }
    if not config.tied_head:
        layout["lm_head.weight"] = TensorMapping(("lm_head.weight",))
    for i in range(config.num_layers):
        for kind in ("weight", "bias"):
            is_matrix = kind == "weight"
            ours = f"layers.{i}"
            for theirs, names, transposed in (
                ("ln_1", ("ln1",), False),
                ("attn.c_attn", [f"attn.{n}" for n in _QKV], is_matrix),
                ("attn.c_proj", ("attn.output_proj",), is_matrix),
                ("ln_2", ("ln2",), False),
                ("mlp.c_fc", ("ffn.w1",), is_matrix),
                ("mlp.c_proj", ("ffn.w2",), is_matrix),
            ):
                entry = TensorMapping(tuple(f"{ours}.{name}.{kind}" for name in names), transposed)
                layout[f"h.{i}.{theirs}.{kind}"] = entry
    return layout


def openai_layout(config: GPT2Config) -> Layout:
    """The TensorFlow checkpoints that OpenAI published; their head is tied to the embedding."""
    return {
        _openai_name(name): entry._replace(num_leading=int(entry.transposed))
        for name, entry in gpt2_layout(config).items()
    }


def _openai_name(name: str) -> str:
    """h.0.attn.c_attn.weight becomes model/h0/attn/c_attn/w; gains get g, embeddings nothing."""
    path, _, kind = name.rpartition(".")
    path = re.sub(r"^h\.(\d+)\.", r"h\1.", path).replace(".", "/")
    if path in ("wte", "wpe"):
        return f"model/{path}"
    is_norm = path.rpartition("/")[2].startswith("ln_")
    return f"model/{path}/{'b' if kind == 'bias' else 'g' if is_norm else 'w'}"


def llama_layout(config: ModelConfig) -> Layout:
    """transformers' `LlamaForCausalLM`, with one key head per query head and without biases."""
    layout = {
        "model.embed_tokens.weight": TensorMapping(("token_embeddings.weight",)),
        "model.norm.weight": TensorMapping(("ln_final.weight",)),
        "lm_head.weight": TensorMapping(("lm_head.weight",)),
    }
    for i in range(config.num_layers):
        for theirs, ours in (
            ("input_layernorm", "ln1"),
            ("self_attn.q_proj", "attn.q_proj"),
            ("self_attn.k_proj", "attn.k_proj"),
            ("self_attn.v_proj", "attn.v_proj"),
            ("self_attn.o_proj", "attn.output_proj"),
            ("post_attention_layernorm", "ln2"),
            ("mlp.gate_proj", "ffn.w1"),
            ("mlp.down_proj", "ffn.w2"),
            ("mlp.up_proj", "ffn.w3"),
        ):
            turns = theirs in ("self_attn.q_proj", "self_attn.k_proj")
            entry = TensorMapping(
                (f"layers.{i}.{ours}.weight",), num_heads=config.num_heads * turns
            )
            layout[f"model.layers.{i}.{theirs}.weight"] = entry
    return layout


# Tensors in files that are not weights: causal masks and rotary frequencies.
_NO_WEIGHTS = re.compile(
    r"h\.\d+\.attn\.(bias|masked_bias)|model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq"
)


def canonical_name(theirs: str, layout: str) -> str | None:
    """The name in the layout, without an optional prefix; None for a tensor that is no weight."""
    name = theirs.removeprefix("transformer.") if layout == "gpt2" else theirs
    return None if _NO_WEIGHTS.fullmatch(name) else name
