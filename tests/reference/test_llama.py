"""The whole model beside transformers' Llama: same weights, permuted RoPE, same scores."""

import pytest
import torch

from cs_lm.config.model import ModelConfig
from cs_lm.models.transformer import TransformerLM
from cs_lm.ops.fused import FAST
from cs_lm.ops.reference import CLEAR
from tests.tolerances import OTHER_LIBRARY

CONFIG = ModelConfig(
    d_model=24,
    num_heads=3,
    d_ff=40,
    vocab_size=61,
    num_layers=2,
    context_length=32,
    rope_theta=5000.0,
)


def pairs_to_halves(weight: torch.Tensor) -> torch.Tensor:
    """Rows (0,1), (2,3), ... of each head become row i and row i + K/2, as Llama has them."""
    heads = weight.unflatten(0, (CONFIG.num_heads, -1, 2))  # (H, K/2, 2, D)
    return heads.transpose(1, 2).flatten(0, 2)


def llama_weights(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    names = {
        "output_proj": "o_proj",
        "attn.": "self_attn.",
        "ln1": "input_layernorm",
        "ln2": "post_attention_layernorm",
        "ffn.w1": "mlp.gate_proj",
        "ffn.w2": "mlp.down_proj",
        "ffn.w3": "mlp.up_proj",
        "ln_final": "norm",
        "token_embeddings": "embed_tokens",
    }
    converted = {}
    for key, value in state.items():
        if "q_proj" in key or "k_proj" in key:
            value = pairs_to_halves(value)
        for ours, theirs in names.items():
            key = key.replace(ours, theirs)
        converted[key if key.startswith("lm_head") else f"model.{key}"] = value
    return converted


def llama_with_weights_of(ours: TransformerLM, **tokens):
    """`transformers`' model of `CONFIG` with the same weights; tokens: ids with a meaning."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    theirs = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            hidden_size=CONFIG.d_model,
            num_attention_heads=CONFIG.num_heads,
            num_key_value_heads=CONFIG.num_heads,
            intermediate_size=CONFIG.d_ff,
            vocab_size=CONFIG.vocab_size,
            num_hidden_layers=CONFIG.num_layers,
            max_position_embeddings=CONFIG.context_length,
            rms_norm_eps=CONFIG.norm_eps,
            rope_parameters={"rope_type": "default", "rope_theta": CONFIG.rope_theta},
            attention_bias=False,
            tie_word_embeddings=False,
            **tokens,
        )
    ).eval()
    theirs.load_state_dict(llama_weights(ours.state_dict()))
    return theirs


@pytest.mark.parametrize("ops", [CLEAR, FAST], ids=["clear", "fast"])
def test_scores_equal_llama(generator, ops):
    ours = TransformerLM(CONFIG, ops, generator=generator)
    theirs = llama_with_weights_of(ours)
    ids = torch.randint(0, CONFIG.vocab_size, (2, 29), generator=generator)
    with torch.no_grad():
        torch.testing.assert_close(ours(ids), theirs(ids).logits, **OTHER_LIBRARY)
