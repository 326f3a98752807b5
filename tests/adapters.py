"""This library under the names of an assignment-style harness. No logic of its own."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch.utils.data import DataLoader

from cs_lm.alignment.advantages import group_advantages
from cs_lm.alignment.conversations import Rendered, alpaca_text
from cs_lm.alignment.examples import token_rows, wrapped
from cs_lm.alignment.losses import dpo_rewards, policy_losses, preference_losses, reduced
from cs_lm.alignment.masked import masked_mean, masked_sum
from cs_lm.config.model import ModelConfig
from cs_lm.data.batches import load_windows, sample_windows
from cs_lm.data.token_store import ArrayTokens
from cs_lm.distributed.data_parallel import ReplicatedModule
from cs_lm.distributed.sharded_module import ShardedModule
from cs_lm.distributed.sharded_optimizer import ShardedOptimizer
from cs_lm.evaluation.tasks import chosen_letter, last_number
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
from cs_lm.ops.tiled_attention import LOG2_E, attention_backward, attention_forward, row_sums
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


# ---- alignment; tokenizers and models here are those of `transformers` ----


def _rendered(prompt_ids, output_ids):
    return Rendered(prompt_ids + output_ids, [False] * len(prompt_ids) + [True] * len(output_ids))


def run_tokenize_prompt_and_output(prompt_strs, output_strs, tokenizer):
    def encode(text):
        return tokenizer.encode(text, add_special_tokens=False)

    pairs = zip(prompt_strs, output_strs, strict=True)
    rendered = [_rendered(encode(prompt), encode(output)) for prompt, output in pairs]
    ids, is_answer = token_rows(rendered, tokenizer.pad_token_id or 0)
    return {"input_ids": ids[:, :-1], "labels": ids[:, 1:], "response_mask": is_answer[:, 1:]}


def run_compute_entropy(logits):
    return ops.token_log_probs(logits, logits.new_zeros(logits.shape[:-1], dtype=torch.int64))[1]


def run_get_response_log_probs(model, input_ids, labels, return_token_entropy=False):
    log_probs, entropy = ops.token_log_probs(model(input_ids).logits, labels)
    return {"log_probs": log_probs} | ({"token_entropy": entropy} if return_token_entropy else {})


def run_masked_normalize(tensor, mask, dim=None, normalize_constant=1.0):
    return masked_sum(tensor, mask.bool(), dim) / normalize_constant


def run_masked_mean(tensor, mask, dim=None):
    return masked_mean(tensor, mask.bool(), dim)


def run_sft_microbatch_train_step(
    policy_log_probs, response_mask, gradient_accumulation_steps, normalize_constant=1.0
):
    of_answers = masked_sum(policy_log_probs, response_mask.bool(), -1) / normalize_constant
    loss = -of_answers.mean() / gradient_accumulation_steps
    loss.backward()
    return loss.detach(), {}


def run_compute_group_normalized_rewards(
    reward_fn,
    rollout_responses,
    repeated_ground_truths,
    group_size,
    advantage_eps,
    normalize_by_std,
):
    scored = map(reward_fn, rollout_responses, repeated_ground_truths)
    rewards = torch.tensor([float(one["reward"]) for one in scored])
    advantages = group_advantages(rewards, group_size, advantage_eps, normalize_by_std)
    return advantages, rewards, {"mean": rewards.mean(), "std": rewards.std()}


def run_compute_naive_policy_gradient_loss(raw_rewards_or_advantages, policy_log_probs):
    return -raw_rewards_or_advantages * policy_log_probs


def run_compute_grpo_clip_loss(advantages, policy_log_probs, old_log_probs, cliprange):
    losses, clipped = policy_losses(policy_log_probs, old_log_probs, advantages, clip=cliprange)
    return losses, {"clipped": clipped}


def run_compute_policy_gradient_loss(
    policy_log_probs,
    loss_type,
    raw_rewards=None,
    advantages=None,
    old_log_probs=None,
    cliprange=None,
):
    if loss_type == "grpo_clip":
        return run_compute_grpo_clip_loss(advantages, policy_log_probs, old_log_probs, cliprange)
    weights = {"no_baseline": raw_rewards, "reinforce_with_baseline": advantages}[loss_type]
    return run_compute_naive_policy_gradient_loss(weights, policy_log_probs), {}


def run_grpo_microbatch_train_step(
    policy_log_probs,
    response_mask,
    gradient_accumulation_steps,
    loss_type,
    raw_rewards=None,
    advantages=None,
    old_log_probs=None,
    cliprange=None,
):
    losses, found = run_compute_policy_gradient_loss(
        policy_log_probs, loss_type, raw_rewards, advantages, old_log_probs, cliprange
    )
    total, count = reduced(losses, response_mask.bool(), "sequence")
    loss = total / count / gradient_accumulation_steps
    loss.backward()
    return loss.detach(), found


def get_packed_sft_dataset(tokenizer, dataset_path, seq_length, shuffle):
    lines = Path(dataset_path).read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines if line.strip()]
    if shuffle:
        records = [records[i] for i in torch.randperm(len(records)).tolist()]
    texts = [
        [*tokenizer.encode(alpaca_text(one["prompt"], one["response"])), tokenizer.eos_token_id]
        for one in records
    ]
    rows = zip(*wrapped(texts, seq_length), strict=True)
    return [{"input_ids": inputs, "labels": labels} for inputs, labels in rows]


def run_iterate_batches(dataset, batch_size, shuffle):
    return DataLoader(dataset, batch_size, shuffle)


def run_parse_mmlu_response(mmlu_example, model_output):
    return chosen_letter(model_output)


def run_parse_gsm8k_response(model_output):
    return last_number(model_output)


def run_compute_per_instance_dpo_loss(
    lm, lm_ref, tokenizer, beta, prompt, response_chosen, response_rejected
):
    def log_prob(model, response):
        prompt_ids = tokenizer.encode(alpaca_text(prompt, ""))
        response_ids = tokenizer.encode(response, add_special_tokens=False)
        rendered = _rendered(prompt_ids, [*response_ids, tokenizer.eos_token_id])
        ids, is_answer = token_rows([rendered])
        ids = ids.to(next(model.parameters()).device)
        log_probs, _ = ops.token_log_probs(model(ids[:, :-1]).logits, ids[:, 1:])
        return masked_sum(log_probs, is_answer[:, 1:].to(ids.device))

    device = next(lm.parameters()).device
    chosen, rejected = (
        dpo_rewards(log_prob(lm, response), log_prob(lm_ref, response).to(device), beta)
        for response in (response_chosen, response_rejected)
    )
    return preference_losses(chosen - rejected)


# ---- many machines; the suite has joined its processes already ----


def get_ddp(module):
    return ReplicatedModule(module)


def ddp_on_after_backward(ddp_model, optimizer):
    ddp_model.finish()


def get_fsdp(module, compute_dtype=None):
    """Spreads the weights of the suite's layers, by the names of their classes."""
    is_sharded = lambda layer: type(layer).__name__ in ("Linear", "Embedding")  # noqa: E731
    return ShardedModule(module, is_sharded, compute_dtype)


def fsdp_on_after_backward(fsdp_model, optimizer):
    fsdp_model.finish()


def fsdp_gather_full_params(fsdp_model):
    return fsdp_model.whole_parameters()


def get_sharded_optimizer(params, optimizer_cls, **kwargs):
    return ShardedOptimizer(params, optimizer_cls, **kwargs)


def _kept(ctx, q, k, v, output, log2_sums, is_causal):
    ctx.save_for_backward(q, k, v, output, log2_sums / LOG2_E)
    ctx.is_causal = is_causal
    return output


class _Attention(torch.autograd.Function):
    """q, k and v (B, T, D). Keeps the log-sum-exp of each row, natural logarithm, (B, T)."""

    @staticmethod
    def forward(ctx, q, k, v, is_causal=False):
        output, log2_sums = attention_forward(*(x[:, None] for x in (q, k, v)), None, is_causal)
        return _kept(ctx, q, k, v, output[:, 0], log2_sums[:, 0, :, 0], is_causal)

    @staticmethod
    def backward(ctx, grad_output):
        q, k, v, output, log_sums = ctx.saved_tensors
        mean, log2_sums = row_sums(grad_output * output), log_sums[..., None] * LOG2_E
        q, k, v, grad_output, mean, log2_sums = (
            x[:, None] for x in (q, k, v, grad_output, mean, log2_sums)
        )
        gradients = attention_backward(grad_output, mean, q, k, v, None, log2_sums, ctx.is_causal)
        return *(x[:, 0] for x in gradients), None


def get_flashattention_autograd_function_pytorch():
    return _Attention


def get_flashattention_autograd_function_triton():
    """Needs triton, and CUDA tensors unless TRITON_INTERPRET=1."""
    from cs_lm.ops.triton_attention import attention_forward as triton_forward

    class TritonAttention(_Attention):
        @staticmethod
        def forward(ctx, q, k, v, is_causal=False):
            return _kept(ctx, q, k, v, *triton_forward(q, k, v, is_causal), is_causal)

    return TritonAttention
