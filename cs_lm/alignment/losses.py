"""The losses of alignment, as pure functions: one formula each.

B answers, T positions; `mask` is True at the tokens of the answer, its end token included. Losses
of tokens or answers come out one by one; `reduced` and the trainers add them, and divide once by
their number over the whole update, so that the split into micro-batches does not matter.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from cs_lm.alignment.kl import exp_of_log_ratio, kl_k3
from cs_lm.alignment.masked import masked_sum, select
from cs_lm.ops.log_probs import log_sigmoid

SumAndCount = tuple[Tensor, Tensor]


def sft_loss(log_probs: Tensor, mask: Tensor) -> SumAndCount:
    """The surprise of the answers' tokens: sum [nats] and count. Shapes: both (B, T)"""
    return -masked_sum(log_probs, mask), mask.sum()


# ---- preferences ----


def preference_losses(differences: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """The surprise that the better one of two answers is better, by a difference of their scores.

        -(1 - s) log sigmoid(d) - s log sigmoid(-d)                        [nats]

    label_smoothing  s: the share of labels that are expected to be wrong
    Shapes: differences (...), returns (...)
    """
    losses = -(1 - label_smoothing) * log_sigmoid(differences)
    return losses - label_smoothing * log_sigmoid(-differences) if label_smoothing else losses


def ipo_losses(differences: Tensor, beta: float) -> Tensor:
    """(h - 1 / (2 beta))^2, with h the difference of two mean log-ratios: differences = beta h.

    Source: Azar et al. 2023, A general theoretical paradigm to understand learning from human
    preferences, equation 17.
    """
    return (differences / beta - 1 / (2 * beta)).square()


def ranking_losses(
    scores: Tensor,
    ranks: Tensor,
    mask: Tensor,
    pair_losses: Callable[[Tensor], Tensor] = preference_losses,
) -> tuple[Tensor, Tensor]:
    """The mean loss over all pairs of the ranked answers to a prompt, and the number of pairs.

    A pair counts if one answer is ranked above the other; equal ranks are a tie, and are left out.
    A prompt without pairs gives 0. P prompts, up to K answers.
    Shapes: scores (P, K), ranks (P, K) with 1 the best, mask (P, K), returns two of (P)
    Source: Ouyang et al. 2022, Training language models to follow instructions with human
    feedback, equation 1; with `dpo_rewards` as scores: Rafailov et al. 2023, equation 7.
    """
    scores = select(scores, mask)
    differences = scores.unsqueeze(-1) - scores.unsqueeze(-2)  # (P, K, K)
    is_above = ranks.unsqueeze(-1) < ranks.unsqueeze(-2)
    is_pair = is_above & mask.unsqueeze(-1) & mask.unsqueeze(-2)
    num_pairs = is_pair.sum((-2, -1))
    losses = select(pair_losses(select(differences, is_pair)), is_pair)
    return losses.sum((-2, -1)) / num_pairs.clamp(min=1), num_pairs


def dpo_rewards(log_probs: Tensor, ref_log_probs: Tensor, beta: float) -> Tensor:
    """The reward that a policy implies: beta (log p(answer) - log q(answer)), up to a constant.

    Both are sums over the tokens of an answer (means for `ipo_losses`).
    """
    return beta * (log_probs - ref_log_probs)


# ---- policies ----


def policy_losses(
    log_probs: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    mask: Tensor | None = None,
    clip: float = 0.2,
    clip_above: float | None = None,
) -> tuple[Tensor, Tensor]:
    """PPO's clipped loss of each token, and whether the clipped term is the larger one.

        max(-A r, -A clip(r, 1 - clip, 1 + clip_above))           with r = p / p_old

    clip_above  by default the same as `clip`
    Shapes: log_probs, old_log_probs, mask (B, T), advantages (B, T) or (B, 1), returns two (B, T)
    Source: Schulman et al. 2017, Proximal policy optimization algorithms, equation 7.
    """
    log_probs, old_log_probs = select(log_probs, mask), select(old_log_probs, mask)
    advantages = select(advantages, mask)
    ratio = exp_of_log_ratio(log_probs - old_log_probs)
    limited = ratio.clamp(1 - clip, 1 + (clip if clip_above is None else clip_above))
    plain, clipped = -advantages * ratio, -advantages * limited
    return torch.maximum(plain, clipped), clipped > plain


def value_losses(
    values: Tensor,
    old_values: Tensor,
    returns: Tensor,
    mask: Tensor | None = None,
    clip: float = 0.2,
) -> tuple[Tensor, Tensor]:
    """Half the squared error of each value, at least that of the value limited to old +- clip.

        max((V - G)^2, (clip(V, V_old - clip, V_old + clip) - G)^2) / 2

    Returns also whether the limited term is the larger one.
    Shapes: all (B, T), returns two of (B, T)
    """
    values, old_values, returns = (select(x, mask) for x in (values, old_values, returns))
    limited = torch.minimum(torch.maximum(values, old_values - clip), old_values + clip)
    plain, clipped = (values - returns).square(), (limited - returns).square()
    return torch.maximum(plain, clipped) / 2, clipped > plain


def grpo_losses(
    log_probs: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    mask: Tensor | None = None,
    ref_log_probs: Tensor | None = None,
    beta: float = 0.0,
    clip: float = 0.2,
    clip_above: float | None = None,
) -> tuple[Tensor, Tensor]:
    """`policy_losses`, plus beta times the divergence from a reference, by `kl_k3`.

    Source: Shao et al. 2024, DeepSeekMath, equation 3.
    """
    losses, clipped = policy_losses(
        log_probs, old_log_probs, advantages, mask, clip=clip, clip_above=clip_above
    )
    if ref_log_probs is not None and beta:
        losses = losses + beta * kl_k3(select(log_probs, mask), select(ref_log_probs, mask))
    return losses, clipped


REDUCTIONS = ("sequence", "token", "constant")


def reduced(losses: Tensor, mask: Tensor, reduction: str, max_length: int = 1) -> SumAndCount:
    """Sum and count of losses (B, T), whose quotient over a whole update is its loss.

    sequence  the mean of each answer; their mean: a token of a long answer weighs less
    token     the mean of all tokens: an answer weighs as much as it is long
    constant  the sum of each answer divided by `max_length`; their mean
    Source: DeepSeekMath (sequence); Yu et al. 2025, DAPO (token); Liu et al. 2025 (constant).
    """
    if reduction == "token":
        return masked_sum(losses, mask), mask.sum()
    of_answers = masked_sum(losses, mask, -1)
    lengths = mask.sum(-1)
    if reduction == "sequence":
        of_answers = of_answers / lengths.clamp(min=1)
    elif reduction == "constant":
        of_answers = of_answers / max_length
    else:
        raise ValueError(f"got reduction {reduction!r}, need one of {', '.join(REDUCTIONS)}")
    return of_answers.sum(), torch.tensor(len(mask), device=mask.device)
