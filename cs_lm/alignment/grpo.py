"""Group relative policy optimisation: an answer counts by how much it beats its group.

Several answers to one prompt are a group; the advantage of each is its score less the group's mean,
perhaps divided by the group's deviation. There is no value model, and the divergence from the
reference is a part of the loss. Source: Shao et al. 2024, DeepSeekMath.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from cs_lm.alignment.advantages import group_advantages
from cs_lm.alignment.losses import REDUCTIONS, grpo_losses, reduced
from cs_lm.alignment.policy_task import PolicyBatch, PolicyConfig, PolicyTask, Tensors
from cs_lm.config.fields import setting
from cs_lm.errors import Problem


@dataclass(frozen=True)
class GRPOConfig(PolicyConfig):
    """GRPO, DAPO's and Dr. GRPO's reductions."""

    group_size: int = setting(8, "answers to each prompt of an iteration", minimum=2)
    beta: float = setting(
        0.04, "weight of the divergence from the reference in the loss", minimum=0
    )
    reduction: str = setting(
        "token",
        "token: the mean of all tokens; sequence: of the answers' means; constant: an answer's sum "
        "divided by --max_new_tokens",
        choices=REDUCTIONS,
    )
    scale_by_std: bool = setting(False, "divide advantages by the deviation of their group")
    clip_above: float | None = setting(None, "another --clip for rising probabilities")
    rollout_epochs: int = setting(1, "passes over the answers of an iteration")

    def validate(self) -> list[Problem]:
        found = super().validate()
        if self.group_size > 0 and self.rollout_size % self.group_size:
            need = f"a multiple of --group_size ({self.group_size})"
            found.append(Problem("--rollout_size", f"got {self.rollout_size}", need))
        return found

    @property
    def answers_per_prompt(self) -> int:
        return self.group_size


class GroupRelativePolicyOptimization(PolicyTask):
    """Trains the model of `sources.base`; the model that it begins with is the reference."""

    stage = "grpo"
    config: GRPOConfig

    def learnt_from(self, experience: Tensors, facts: dict[str, float]) -> Tensors:
        config, scores = self.config, experience["scores"]
        advantages = group_advantages(
            scores, config.group_size, normalize_by_std=config.scale_by_std
        )
        groups = scores.view(-1, config.group_size)
        is_equal = (groups == groups[:, :1]).all(-1)
        facts["equal_groups"] = is_equal.float().mean().item()
        facts["group_std"] = groups.std(-1).mean().item()
        return {"advantages": advantages}

    def count_of(self, lengths: Sequence[int]) -> int:
        return sum(lengths) if self.config.reduction == "token" else len(lengths)

    def policy_loss(self, batch: PolicyBatch) -> tuple[Tensor, Tensor]:
        config, mask = self.config, batch.mask
        log_probs, entropies = self.log_probs_now(batch)
        losses, is_clipped = grpo_losses(
            log_probs, batch.old_log_probs, batch.values["advantages"].unsqueeze(-1), mask,
            batch.ref_log_probs, config.beta, config.clip, config.clip_above,
        )  # fmt: skip
        self.note(batch, log_probs, entropies, is_clipped)
        return reduced(losses, mask, config.reduction, config.max_new_tokens)
