"""From a score for each answer to an advantage for each token.

B answers, T positions. `mask` is True at the tokens of the answer, its end token included; they
stand side by side. All results are 0 elsewhere.
"""

import torch
from torch import Tensor

from cs_lm.alignment.masked import last_selected, masked_mean, masked_variance, select


def token_rewards(scores: Tensor, kl: Tensor, mask: Tensor, coefficient: float) -> Tensor:
    """-coefficient * KL at each token, and the score of the answer at its last one.

    Shapes: scores (B), kl (B, T) [nats], mask (B, T), returns (B, T)
    """
    at_last = torch.where(last_selected(mask), scores.unsqueeze(-1), 0.0)
    return at_last - coefficient * select(kl, mask)


def gae(
    rewards: Tensor, values: Tensor, mask: Tensor, gamma: float = 1.0, lam: float = 0.95
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimates, and the returns that the values should predict.

        delta_t = R_t + gamma V_(t+1) - V_t
        A_t = delta_t + gamma lam A_(t+1)          G_t = A_t + V_t

    V and A after the last token of the answer are 0.
    Shapes: rewards, values and mask (B, T), returns two of (B, T)
    Source: Schulman et al. 2016, High-dimensional continuous control using generalized advantage
    estimation.
    """
    rewards, values = select(rewards, mask), select(values, mask)
    advantages = torch.zeros_like(values)
    next_value = next_advantage = torch.zeros_like(values[:, 0])
    for t in reversed(range(values.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        # outside the answer all three terms are 0, but for V and A of its first token
        next_advantage = select(delta + gamma * lam * next_advantage, mask[:, t])
        next_value = values[:, t]
        advantages[:, t] = next_advantage
    return advantages, advantages + values


def whitened(x: Tensor, mask: Tensor, keep_mean: bool = False, eps: float = 1e-8) -> Tensor:
    """x shifted to mean 0 (unless `keep_mean`) and scaled to variance 1 over the mask.

        (x - mean) / sqrt(variance + eps)

    Shapes: x and mask (B, T), returns (B, T)
    """
    mean = masked_mean(x, mask)
    centred = (x - mean) * torch.rsqrt(masked_variance(x, mask) + eps)
    return select(centred + mean if keep_mean else centred, mask)


def group_advantages(
    rewards: Tensor, group_size: int, eps: float = 1e-4, normalize_by_std: bool = True
) -> Tensor:
    """How much better an answer is than the others to its prompt.

        (r - mean) / (std + eps)            without `normalize_by_std`: r - mean

    The mean and the sample standard deviation are those of a group: `group_size` answers that
    follow each other. A group of equal rewards gives exactly 0.
    Shapes: rewards (N), returns (N)
    Raises: ValueError for a group of one answer, or N that is no multiple of the group size.
    Source: Shao et al. 2024, DeepSeekMath (with std); Liu et al. 2025, Understanding R1-Zero-like
    training (without).
    """
    if group_size < 2 or len(rewards) % group_size:
        raise ValueError(
            f"group_advantages: got {len(rewards)} rewards in groups of {group_size}, need at "
            "least 2 in a group, and whole groups"
        )
    groups = rewards.view(-1, group_size)
    advantages = groups - groups.mean(-1, keepdim=True)
    if normalize_by_std:
        advantages = advantages / (groups.std(-1, keepdim=True) + eps)
    is_equal = (groups == groups[:, :1]).all(-1, keepdim=True)
    return advantages.masked_fill(is_equal, 0.0).flatten()  # a rounded mean, or 0 / 0


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> Tensor:
    """1 - Var(G - V) / Var(G) over the mask: (); 1 if the values predict the returns exactly."""
    return 1 - masked_variance(returns - values, mask) / masked_variance(returns, mask)
