"""This library under the names of an assignment-style harness. No logic of its own."""

from __future__ import annotations

import torch

from cs_lm.config.model import ModelConfig
from cs_lm.data.batches import load_windows, sample_windows
from cs_lm.data.token_store import ArrayTokens
from cs_lm.models.layers import (
    Embedding,
    Linear,
    MultiHeadSelfAttention,
    RMSNorm,
    RoPE,
    SwiGLU,
)
from cs_lm.models.transformer import TransformerBlock, TransformerLM
from cs_lm.ops import reference as ops
from cs_lm.optim.adamw import AdamW
from cs_lm.optim.clip import clip_gradients
from cs_lm.optim.schedule import cosine_schedule
from cs_lm.tokenizer import BPETokenizer, train_bpe
from cs_lm.training.checkpoint import load_checkpoint, save_checkpoint


def _with_weights(module, weights):
    module.load_state_dict(weights)
    return module


def run_linear(d_in, d_out, weights, in_features):
    return _with_weights(Linear(d_in, d_out), {"weight": weights})(in_features)


def run_embedding(vocab_size, d_model, weights, token_ids):
    return _with_weights(Embedding(vocab_size, d_model), {"weight": weights})(token_ids)


def run_swiglu(d_model, d_ff, w1_weight, w2_weight, w3_weight, in_features):
    weights = {"w1.weight": w1_weight, "w2.weight": w2_weight, "w3.weight": w3_weight}
    return _with_weights(SwiGLU(d_model, d_ff), weights)(in_features)


def run_scaled_dot_product_attention(Q, K, V, mask=None):
    return ops.attention(Q, K, V, mask)


def _attention(d_model, num_heads, q_proj_weight, k_proj_weight, v_proj_weight, o_proj_weight):
    weights = {
        "q_proj.weight": q_proj_weight,
        "k_proj.weight": k_proj_weight,
        "v_proj.weight": v_proj_weight,
        "output_proj.weight": o_proj_weight,
    }
    return _with_weights(MultiHeadSelfAttention(d_model, num_heads), weights)


def run_multihead_self_attention(
    d_model, num_heads, q_proj_weight, k_proj_weight, v_proj_weight, o_proj_weight, in_features
):
    weights = (q_proj_weight, k_proj_weight, v_proj_weight, o_proj_weight)
    return _attention(d_model, num_heads, *weights)(in_features)


def run_multihead_self_attention_with_rope(
    d_model,
    num_heads,
    max_seq_len,
    theta,
    q_proj_weight,
    k_proj_weight,
    v_proj_weight,
    o_proj_weight,
    in_features,
    token_positions=None,
):
    if token_positions is None:
        token_positions = torch.arange(in_features.shape[-2])
    rotation = RoPE(ops.inverse_frequencies(theta, d_model // num_heads), max_seq_len).rotation(
        token_positions
    )
    weights = (q_proj_weight, k_proj_weight, v_proj_weight, o_proj_weight)
    return _attention(d_model, num_heads, *weights)(in_features, rotation)


def run_rope(d_k, theta, max_seq_len, in_query_or_key, token_positions):
    return RoPE(ops.inverse_frequencies(theta, d_k), max_seq_len)(in_query_or_key, token_positions)


def run_transformer_block(d_model, num_heads, d_ff, max_seq_len, theta, weights, in_features):
    config = ModelConfig(d_model, num_heads, d_ff, 1, 1, max_seq_len, theta)
    rope = RoPE(ops.inverse_frequencies(theta, d_model // num_heads), max_seq_len)
    rotation = rope.rotation(torch.arange(in_features.shape[-2]))
    return _with_weights(TransformerBlock(config), weights)(in_features, rotation)


def run_transformer_lm(
    vocab_size,
    context_length,
    d_model,
    num_layers,
    num_heads,
    d_ff,
    rope_theta,
    weights,
    in_indices,
):
    config = ModelConfig(
        d_model, num_heads, d_ff, vocab_size, num_layers, context_length, rope_theta
    )
    return _with_weights(TransformerLM(config), weights)(in_indices)


def run_rmsnorm(d_model, eps, weights, in_features):
    return _with_weights(RMSNorm(d_model, eps=eps), {"weight": weights})(in_features)


def run_silu(in_features):
    return ops.silu(in_features)


def run_get_batch(dataset, batch_size, context_length, device):
    tokens = ArrayTokens(dataset)
    seed = int(torch.randint(2**62, ()))  # a new batch for each call
    starts = sample_windows(tokens, batch_size, context_length, seed)(0)
    return load_windows(tokens, starts, context_length, torch.device(device))


def run_softmax(in_features, dim):
    return ops.softmax(in_features, dim)


def run_cross_entropy(inputs, targets):
    loss_sum, num_counted = ops.cross_entropy(inputs, targets)
    return loss_sum / num_counted


def run_gradient_clipping(parameters, max_l2_norm):
    clip_gradients(parameters, max_l2_norm)


def get_adamw_cls():
    return AdamW


def run_get_lr_cosine_schedule(
    it, max_learning_rate, min_learning_rate, warmup_iters, cosine_cycle_iters
):
    return cosine_schedule(
        it, max_learning_rate, min_learning_rate, warmup_iters, cosine_cycle_iters
    )


def run_save_checkpoint(model, optimizer, iteration, out):
    save_checkpoint(model, optimizer, iteration, out)


def run_load_checkpoint(src, model, optimizer):
    return load_checkpoint(src, model, optimizer)


def get_tokenizer(vocab, merges, special_tokens=None):
    return BPETokenizer(vocab, merges, special_tokens)


def run_train_bpe(input_path, vocab_size, special_tokens, **kwargs):
    return train_bpe(input_path, vocab_size, special_tokens, **kwargs)
