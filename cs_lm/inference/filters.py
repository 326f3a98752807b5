"""The filters of sampling: pure functions from logits to logits.

V is the vocabulary, `...` any leading axes. A token that a filter leaves out gets -inf.
"""

import math

import torch
from torch import Tensor

from cs_lm.ops.reference import log_softmax, softmax


def repetition_penalty_logits(logits: Tensor, token_ids: Tensor, penalty: float) -> Tensor:
    """The logits, lower for the given tokens: positive ones divided, negative ones multiplied.

    A token that occurs several times is penalised once. Shapes: logits (..., V), token_ids (..., N)
    Source: Keskar et al. 2019, CTRL, made sign-aware.
    """
    old = logits.gather(-1, token_ids)
    return logits.scatter(-1, token_ids, torch.where(old > 0, old / penalty, old * penalty))


def count_penalty_logits(
    logits: Tensor, token_ids: Tensor, frequency: float, presence: float
) -> Tensor:
    """The logits minus `frequency` times each token's count, minus `presence` if it occurs at all.

    Shapes: logits (..., V), token_ids (..., N)
    Source: the definition of frequency_penalty and presence_penalty in OpenAI's API.
    """
    counts = torch.zeros_like(logits)
    counts.scatter_add_(-1, token_ids, torch.ones_like(token_ids, dtype=logits.dtype))
    return logits - frequency * counts - presence * (counts > 0)


def no_repeat_ngram_logits(
    logits: Tensor, token_ids: Tensor, size: int, num_padding: Tensor
) -> Tensor:
    """The logits, -inf for each token that would complete a sequence of `size` tokens again.

    num_padding  entries at the left of each row that are no tokens
    Shapes: logits (B, V), token_ids (B, N), num_padding (B)
    Source: Paulus et al. 2017 (there for three tokens, in beam search).
    """
    length = token_ids.shape[-1]
    if length < size:
        return logits
    windows = token_ids.unfold(-1, size, 1)  # (B, N - size + 1, size)
    newest = token_ids[:, length - size + 1 :].unsqueeze(1)  # (B, 1, size - 1)
    starts = torch.arange(windows.shape[1], device=token_ids.device)
    again = (windows[..., :-1] == newest).all(-1) & (starts >= num_padding.unsqueeze(-1))
    # windows that do not match write to an extra column
    banned = torch.zeros(len(logits), logits.shape[-1] + 1, dtype=torch.bool, device=logits.device)
    banned.scatter_(-1, torch.where(again, windows[..., -1], logits.shape[-1]), True)
    return logits.masked_fill(banned[:, :-1], -math.inf)


def allowed_logits(logits: Tensor, allowed: Tensor) -> Tensor:
    """The logits, -inf for tokens that are not allowed. Shapes: logits (..., V), allowed (V)"""
    return logits.masked_fill(~allowed, -math.inf)


def apply_temperature(logits: Tensor, temperature: float) -> Tensor:
    """Above 1 flattens the distribution, below 1 sharpens it. `temperature` > 0."""
    return logits / temperature


def top_k_logits(logits: Tensor, k: int) -> Tensor:
    """The logits, -inf for all but the k highest; of equal ones, those that `topk` puts first."""
    k = min(k, logits.shape[-1])
    values, places = logits.topk(k, dim=-1)
    return torch.full_like(logits, -math.inf).scatter(-1, places, values)


def top_p_logits(logits: Tensor, p: float) -> Tensor:
    """The logits, -inf outside the smallest set of likeliest tokens that sum to at least p.

    p is a probability. The likeliest token always stays.
    Source: Holtzman et al. 2020, nucleus sampling.
    """
    values, places = logits.sort(dim=-1, descending=True, stable=True)
    return torch.empty_like(logits).scatter(-1, places, _up_to(values, softmax(values), p))


def min_p_logits(logits: Tensor, share: float) -> Tensor:
    """The logits, -inf for tokens less likely than `share` of the likeliest one's probability.

    Source: Nguyen et al. 2024, min-p sampling.
    """
    # p < share * max(p), as a difference of logits: exact for any size of the logits
    peak = logits.amax(-1, keepdim=True)
    return logits.masked_fill(logits < peak + math.log(share), -math.inf)


def typical_logits(logits: Tensor, p: float) -> Tensor:
    """The logits, -inf outside the smallest set of most typical tokens that sum to at least p.

    The most typical token is the one whose surprise -log(q) is closest to its expectation, the
    entropy of the distribution q. It always stays. Of equally typical tokens, all stay.
    Source: Meister et al. 2022, locally typical sampling.
    """
    log_probs = log_softmax(logits)
    probabilities, surprises = log_probs.exp(), -log_probs
    entropy = (probabilities * surprises).nan_to_num(0.0).sum(-1, keepdim=True)  # 0 inf is 0
    distance = (surprises - entropy).abs()
    nearest, places = distance.sort(dim=-1, stable=True)
    mass = probabilities.gather(-1, places).cumsum(-1)
    last = (mass < p).sum(-1, keepdim=True).clamp(max=logits.shape[-1] - 1)
    return logits.masked_fill(distance > nearest.gather(-1, last), -math.inf)


def _up_to(logits: Tensor, probabilities: Tensor, p: float) -> Tensor:
    """The logits, -inf for those whose predecessors along the last axis sum to p already."""
    mass_before = probabilities.cumsum(-1) - probabilities
    kept = logits.masked_fill(mass_before >= p, -math.inf)
    kept[..., 0] = logits[..., 0]
    return kept
