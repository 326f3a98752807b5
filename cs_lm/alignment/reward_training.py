"""Trains a reward model on rankings, and loads a trained one."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from cs_lm.alignment.conversations import Template, template_of
from cs_lm.alignment.losses import ranking_losses
from cs_lm.alignment.ranking_task import RankingsConfig, RankingsTask
from cs_lm.alignment.records import Ranking
from cs_lm.alignment.reward_model import (
    RankedRows,
    RenderedRanking,
    ScalarModel,
    preference_report,
    ranked_rows,
    ranking_loss,
    score_rows,
)
from cs_lm.alignment.stage import hash_of
from cs_lm.config.fields import setting
from cs_lm.config.optim import OptimConfig
from cs_lm.config.run import RunConfig
from cs_lm.device import World
from cs_lm.errors import UserError
from cs_lm.ops.fused import OPS
from cs_lm.tokenizer import BPETokenizer
from cs_lm.training.checkpoint import restore
from cs_lm.training.run_dir import RunFolder, saved_config, stage_of
from cs_lm.training.step import under_autocast
from cs_lm.training.task import CheckStop

_REFERENCE_ROWS = 256  # answers whose mean score becomes 0


@dataclass(frozen=True)
class RewardConfig(RankingsConfig):
    """A reward model."""

    num_epochs: float = setting(
        1.0, "passes over the rankings; more than one learns them by heart, as a rule"
    )
    optim: OptimConfig = field(
        default_factory=lambda: OptimConfig(
            lr=9e-6, lr_min=9e-7, warmup_ratio=0.03, warmfix_ratio=1.0, weight_decay=0.0
        )
    )


class RewardModeling(RankingsTask):
    """Trains a `ScalarModel` that begins with the weights of the model of `base`."""

    stage = "reward"
    reads_ends = True

    def __init__(
        self,
        config: RewardConfig,
        base: RunConfig,
        tokenizer: BPETokenizer,
        rankings: tuple[Sequence[Ranking], Sequence[Ranking]],
        world: World,
    ):
        """rankings  those to train on, and those to validate on"""
        generator = torch.Generator().manual_seed(config.seed)
        model = ScalarModel(base.model, OPS[base.ops], generator=generator, device=world.device)
        super().__init__(config, base, tokenizer, rankings, model, world)
        self.measure = {"data": hash_of(self.valid), "template": self.template.name}
        self._loss = under_autocast(ranking_loss, world.device, config.dtype)

    def begin_with(self, weights: dict[str, Tensor]) -> None:
        self.model.load_trunk(weights)

    def batches_of_step(self, step: int) -> list[RankedRows]:
        return [
            ranked_rows([self.train[one] for one in self.order(number)], self.device)
            for number in self.numbers_of_step(step)
        ]

    def loss(self, model: nn.Module, batch: RankedRows) -> tuple[Tensor, Tensor]:
        return self._loss(model, batch)

    def _scores(self, rankings: Sequence[RenderedRanking]) -> list[Tensor]:
        """Of the rows of each."""
        rows = [row for one in rankings for row in one.rows]
        flat = score_rows(self.model, rows, self.device)
        return list(flat.split([len(one.rows) for one in rankings]))

    def evaluate(self, check_stop: CheckStop) -> dict[str, Any]:
        scores = self._scores(self.valid)
        check_stop()
        losses, counted = [], 0
        for own, one in zip(scores, self.valid):
            ranks = torch.tensor([one.ranks])
            loss, pairs = ranking_losses(own[list(one.places)].unsqueeze(0), ranks, ranks > 0)
            losses.append(loss.item())
            counted += int(pairs.item() > 0)
        found = {"loss_nats": sum(losses) / max(1, counted)}
        found |= preference_report(scores, self.valid)
        some = self.train[: max(1, 4 * self.config.batch_size)]
        found["train_accuracy"] = preference_report(self._scores(some), some)["accuracy"]
        return found

    def summary(self, found: dict[str, Any]) -> dict[str, Any]:
        return {"loss_nats": found["loss_nats"], "accuracy": found["accuracy"]}

    def describe_evaluation(self, found: dict[str, Any]) -> str:
        shown = [f"validation loss {found['loss_nats']:.4f}"]
        for key, label in (("accuracy", "right"), ("train_accuracy", "on training pairs")):
            if found[key] is not None:
                shown.append(f"{label} {found[key]:.3f}")
        return " | ".join(shown)

    def save(self) -> dict[str, Any]:
        rows = [row for one in self.train for row in one.rows][:_REFERENCE_ROWS]
        self.model.offset.zero_()  # the same offset whatever was saved before
        self.model.offset += score_rows(self.model, rows, self.device).mean().to(self.device)
        return super().save()


class RewardModel(NamedTuple):
    """A trained reward model, ready to score."""

    model: ScalarModel
    tokenizer: BPETokenizer
    template: Template


def check_reward_model(
    reward: RewardModel, tokenizer: BPETokenizer, template: Template | None = None
) -> None:
    """Raises: UserError if it reads other tokens, or another template, than a policy writes."""
    if template is not None and template.name != reward.template.name:
        raise UserError(
            f"--reward: it was trained with the template {reward.template.name}, and the model "
            f"answers with {template.name}; give --template {reward.template.name}, or train a "
            "reward model from that run"
        )
    if reward.tokenizer.fingerprint != tokenizer.fingerprint:
        raise UserError("--reward: its tokenizer is not that of --from; train it from that run")


def load_reward_model(folder: RunFolder, which: str, device: torch.device) -> RewardModel:
    """Raises: UserError for a run of another kind; FileNotFoundError if there is none."""
    tokenizer = folder.load_tokenizer()
    content = folder.read(which)
    if stage_of(content) != "reward":
        raise UserError(
            f"--reward: {str(folder.path)!r} is a run of cs-lm {stage_of(content)}, need one of "
            "cs-lm reward"
        )
    folder.check_tokenizer(content, tokenizer)
    config = saved_config(content)
    model = ScalarModel(config.model, generator=torch.Generator(), device=device)
    restore(content, model)
    template = template_of(tokenizer, content["extras"]["template"])
    return RewardModel(model.eval(), tokenizer, template)
