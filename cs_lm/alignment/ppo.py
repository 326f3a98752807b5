"""Proximal policy optimisation: a policy learns from the scores of answers that it draws itself.

    reward of a token = -coefficient * KL there, plus the score of the answer at its last token

A value model, which begins as the reward model, predicts the rewards that are still to come. With
text of the pre-training mixed in, this is PPO-ptx. Source: Ouyang et al. 2022, section 3.5.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from cs_lm.alignment.advantages import explained_variance, gae, token_rewards, whitened
from cs_lm.alignment.kl import AdaptiveKL, FixedKL, KLController, kl_k1
from cs_lm.alignment.losses import policy_losses, value_losses
from cs_lm.alignment.masked import masked_mean, masked_sum, masked_variance
from cs_lm.alignment.policy_task import (
    PolicyBatch,
    PolicyConfig,
    PolicySources,
    PolicyTask,
    Tensors,
)
from cs_lm.alignment.reward_model import ScalarModel
from cs_lm.config.fields import setting
from cs_lm.device import World
from cs_lm.errors import Problem, no_effect_without
from cs_lm.models.base import evaluating
from cs_lm.ops.fused import OPS
from cs_lm.optim.adamw import AdamW
from cs_lm.optim.param_groups import parameter_groups
from cs_lm.training.checkpoint import restore
from cs_lm.training.step import autocast_context


@dataclass(frozen=True)
class PPOConfig(PolicyConfig):
    """PPO and PPO-ptx."""

    kl_coef: float = setting(
        0.05, "how much a nat of divergence from the reference costs", minimum=0
    )
    kl_target: float | None = setting(
        None, "adapt --kl_coef, so that an answer's divergence comes near this", "nats"
    )
    kl_horizon: float = setting(
        10_000.0, "answers in which --kl_coef changes by at most a fifth, with --kl_target"
    )
    gamma: float = setting(1.0, "discount of rewards to come")
    lam: float = setting(0.95, "of generalised advantage estimates", minimum=0)
    value_clip: float = setting(0.2, "how far a value may move from its old one")
    value_lr: float | None = setting(None, "learning rate of the value model; default: --lr")

    def validate(self) -> list[Problem]:
        found = super().validate()
        for name in ("gamma", "lam"):
            if not 0 <= getattr(self, name) <= 1:
                found.append(Problem(f"--{name}", f"got {getattr(self, name)}", "0 to 1"))
        if self.kl_horizon != 10_000 and self.kl_target is None:
            found.append(no_effect_without("--kl_horizon", "--kl_target"))
        if self.kl_target is not None and self.kl_coef == 0:
            need = "above 0 with --kl_target, which multiplies it"
            found.append(Problem("--kl_coef", "got 0", need))
        if self.kl_target is not None and self.kl_horizon <= 0.2 * self.rollout_size:
            need = f"more than a fifth of --rollout_size ({0.2 * self.rollout_size:g})"
            found.append(Problem("--kl_horizon", f"got {self.kl_horizon:g}", need))
        return found


class ActorCritic(nn.Module):
    """The policy and the model that predicts its rewards."""

    def __init__(self, policy: nn.Module, value: ScalarModel):
        super().__init__()
        self.policy, self.value = policy, value


class ProximalPolicyOptimization(PolicyTask):
    """Trains the model of `sources.base`; the model that it begins with is the reference."""

    stage = "ppo"
    config: PPOConfig

    def __init__(self, config: PPOConfig, sources: PolicySources, world: World):
        super().__init__(config, sources, world)
        reward, base = self.scorer.model, sources.base
        shape = base.model if reward is None else reward.model.trunk.config
        generator = torch.Generator().manual_seed(config.seed)
        self.value = ScalarModel(shape, OPS[base.ops], generator=generator, device=world.device)
        self.value.eval()
        if reward is not None:
            restore({"model": reward.model.state_dict()}, self.value)
        self.model = ActorCritic(self.policy, self.value)
        optim = config.optim
        of_value = parameter_groups(self.value, optim.weight_decay)
        scale = 1.0 if config.value_lr is None else config.value_lr / optim.lr
        groups = [
            *parameter_groups(self.policy, optim.weight_decay),
            *(group | {"lr_scale": scale * group.get("lr_scale", 1.0)} for group in of_value),
        ]
        self.optimizer = AdamW(groups, lr=optim.lr, betas=optim.betas, eps=optim.eps)
        self.kl: KLController = FixedKL(config.kl_coef)
        if config.kl_target is not None:
            self.kl = AdaptiveKL(config.kl_coef, config.kl_target, config.kl_horizon)

    def begin_with(self, weights: Mapping[str, Tensor]) -> None:
        super().begin_with(weights)
        if self.scorer.model is None:
            self.value.load_trunk(weights)

    @property
    def clipped_apart(self) -> Sequence[nn.Module]:
        return self.policy, self.value

    def _values(self, token_ids: Tensor, mask: Tensor) -> Tensor:
        """Of each token of an answer, what is still to come: (N, T + 1) ids to (N, T)."""
        hidden = self.value.trunk.hidden_states(token_ids[:, :-1])
        values = self.value.head(hidden[mask]).squeeze(-1).float() - self.value.offset
        return values.new_zeros(mask.shape).masked_scatter(mask, values)

    @torch.no_grad()
    def learnt_from(self, experience: Tensors, facts: dict[str, float]) -> Tensors:
        config, mask, scores = self.config, experience["mask"], experience["scores"]
        size = config.batch_size
        with evaluating(self.value), autocast_context(self.device, config.dtype):
            parts = zip(experience["token_ids"].split(size), mask.split(size))
            values = torch.cat([self._values(ids, of_part) for ids, of_part in parts])
        k1 = kl_k1(experience["old_log_probs"], experience["ref_log_probs"])
        rewards = token_rewards(scores, k1, mask, self.kl.coefficient)
        advantages, returns = gae(rewards, values, mask, config.gamma, config.lam)
        facts |= {
            "kl_coef": self.kl.coefficient,
            "kl_penalty": (self.kl.coefficient * masked_sum(k1, mask, -1)).mean().item(),
            "reward_total": rewards.sum(-1).mean().item(),
            "explained_variance": explained_variance(values, returns, mask).item(),
            "advantage_mean": masked_mean(advantages, mask).item(),
            "advantage_std": masked_variance(advantages, mask).sqrt().item(),
        }
        return {
            "advantages": whitened(advantages, mask), "returns": returns, "old_values": values,
        }  # fmt: skip

    def policy_loss(self, batch: PolicyBatch) -> tuple[Tensor, Tensor]:
        config, mask, known = self.config, batch.mask, batch.values
        log_probs, entropies = self.log_probs_now(batch)
        losses, is_clipped = policy_losses(
            log_probs, batch.old_log_probs, known["advantages"], mask, clip=config.clip
        )
        values = self._values(batch.token_ids, mask)
        of_values, is_limited = value_losses(
            values, known["old_values"], known["returns"], mask, clip=config.value_clip
        )
        self.note(
            batch,
            log_probs,
            entropies,
            is_clipped,
            policy_loss=masked_mean(losses, mask),
            value_loss=masked_mean(of_values, mask),
            value_clip_fraction=masked_mean(is_limited.float(), mask),
        )
        return masked_sum(losses, mask) + masked_sum(of_values, mask), mask.sum()

    def learn_from_facts(self, facts: Mapping[str, float]) -> None:
        self.kl.coefficient = facts["kl_coef"]
        self.kl.update(facts["kl_k1"], self.config.rollout_size)

    def save(self) -> dict[str, Any]:
        value = self.value.state_dict()
        return super().save() | {"value_model": value, "kl_coef": self.kl.coefficient}

    def load(self, extras: dict[str, Any]) -> None:
        super().load(extras)
        restore({"model": extras["value_model"]}, self.value)
        self.kl.coefficient = extras["kl_coef"]
