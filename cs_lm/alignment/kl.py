"""How far a policy has moved from its reference: the Kullback-Leibler divergence.

    KL = sum_v p_v (log p_v - log q_v)         [nats]

with p the policy's distribution of the next token and q the reference's. `kl_k1` and `kl_k3`
estimate it from one sampled token; `exact_kl` computes it. Source of the names: Schulman 2020,
Approximating KL divergence.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from cs_lm.ops.log_probs import BLOCK_LOGITS
from cs_lm.ops.reference import at_least_float32, log_softmax

# Before an exponential, a log-ratio is limited to this [nats].
MAX_LOG_RATIO = 20.0


def exp_of_log_ratio(log_ratio: Tensor) -> Tensor:
    """exp, with the log-ratio limited to +-20. Its gradient is 0 beyond the limits."""
    return torch.exp(log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO))


def kl_k1(log_probs: Tensor, ref_log_probs: Tensor) -> Tensor:
    """log p - log q of sampled tokens: unbiased, and negative for some of them.

    Its gradient has mean 0, so it serves as a penalty in a reward, never as a loss.
    """
    return log_probs - ref_log_probs


def kl_k3(log_probs: Tensor, ref_log_probs: Tensor) -> Tensor:
    """q / p - 1 - log(q / p) of sampled tokens: unbiased, never negative, and usable as a loss."""
    log_ratio = (ref_log_probs - log_probs).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    return torch.expm1(log_ratio) - log_ratio


def exact_kl(log_probs: Tensor, ref_log_probs: Tensor) -> Tensor:
    """The divergence of two distributions. Shapes: both (..., V), returns (...)

    A token that the policy cannot choose adds nothing, whatever the reference says.
    """
    probabilities = log_probs.exp()
    difference = (log_probs - ref_log_probs).masked_fill(probabilities == 0, 0.0)
    return (probabilities * difference).sum(-1)


@torch.no_grad()
def linear_exact_kl(
    x: Tensor, weight: Tensor, ref_x: Tensor, ref_weight: Tensor, temperature: float = 1.0
) -> Tensor:
    """`exact_kl` of the logits x W^T / temperature of both models, without gradients.

    It goes over blocks of rows, and never holds all logits.
    Shapes: x and ref_x (N, D), weights (V, D), returns (N); the D of both models may differ
    """
    size = max(1, BLOCK_LOGITS // len(weight))
    found = [x.new_zeros(0, dtype=torch.promote_types(x.dtype, torch.float32))]
    for rows, ref_rows in zip(x.split(size), ref_x.split(size), strict=True):
        logits, ref_logits = rows @ weight.T, ref_rows @ ref_weight.T
        both = (log_softmax(at_least_float32(z) / temperature) for z in (logits, ref_logits))
        found.append(exact_kl(*both))
    return torch.cat(found)


class KLController(Protocol):
    """The coefficient of the KL penalty, which may change from update to update."""

    coefficient: float

    def update(self, kl: float, num_episodes: int) -> None:
        """After an update.

        kl            mean divergence of an answer [nats]
        num_episodes  answers in the update
        """


@dataclass
class FixedKL:
    """A coefficient that never changes."""

    coefficient: float

    def update(self, kl: float, num_episodes: int) -> None:
        pass


@dataclass
class AdaptiveKL:
    """A coefficient that rises while the divergence is above the target, and falls below it.

        e = clip(kl / target - 1, -0.2, 0.2)      coefficient *= 1 + e * num_episodes / horizon

    target   divergence to keep [nats per answer]
    horizon  answers after which a full error has changed the coefficient by a fifth
    Source: Ziegler et al. 2019, Fine-tuning language models from human preferences, section 2.2.
    """

    coefficient: float
    target: float
    horizon: float = 10_000

    def update(self, kl: float, num_episodes: int) -> None:
        error = min(0.2, max(-0.2, kl / self.target - 1))
        self.coefficient *= 1 + error * num_episodes / self.horizon
