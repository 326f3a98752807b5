"""Trains a reward model on rankings, and loads a trained one."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from cs_lm.alignment.conversations import Template, template_of
from cs_lm.alignment.examples import EpochOrder
from cs_lm.alignment.losses import ranking_losses
from cs_lm.alignment.records import Ranking
from cs_lm.alignment.reward_model import (
    RankedRows,
    RenderedRanking,
    ScalarModel,
    preference_report,
    ranked_rows,
    ranking_loss,
    render_rankings,
    score_rows,
)
from cs_lm.alignment.stage import StageConfig, hash_of, save_tokenizer_of
from cs_lm.config.fields import setting
from cs_lm.config.optim import OptimConfig
from cs_lm.config.run import RunConfig
from cs_lm.device import World
from cs_lm.errors import Problem, UserError
from cs_lm.models.stats import flops_per_token, num_scalar_parameters
from cs_lm.ops.fused import OPS
from cs_lm.optim.adamw import AdamW
from cs_lm.optim.param_groups import parameter_groups
from cs_lm.tokenizer import BPETokenizer
from cs_lm.training.checkpoint import restore
from cs_lm.training.run_dir import RunFolder, saved_config, stage_of
from cs_lm.training.step import under_autocast
from cs_lm.training.task import CheckStop, Task

_log = logging.getLogger("cs_lm")
_REFERENCE_ROWS = 256  # answers whose mean score becomes 0


@dataclass(frozen=True)
class RewardConfig(StageConfig):
    """A reward model."""

    data: tuple[str, ...] = setting(
        (), "rankings or preferences: JSON or JSONL files, or patterns; required"
    )
    valid_data: tuple[str, ...] = setting((), "separate ones for validation; same forms as --data")
    valid_fraction: float = setting(
        0.1, "part of --data that is kept for validation without --valid_data", "of prompts"
    )
    num_epochs: float = setting(
        1.0, "passes over the rankings; more than one learns them by heart, as a rule"
    )
    batch_size: int = setting(16, "prompts in one forward pass, with all their answers")
    optim: OptimConfig = field(
        default_factory=lambda: OptimConfig(
            lr=9e-6, lr_min=9e-7, warmup_ratio=0.03, warmfix_ratio=1.0, weight_decay=0.0
        )
    )

    def validate(self) -> list[Problem]:
        found = super().validate()
        if not self.data and not self.resume:
            found.append(Problem("--data", "is missing", fix="name files of rankings"))
        if not 0 < self.valid_fraction < 1:
            what = f"got {self.valid_fraction}"
            found.append(Problem("--valid_fraction", what, "more than 0 and less than 1"))
        return found


def rendered_or_refused(
    rankings: Sequence[Ranking], template: Template, max_tokens: int
) -> list[RenderedRanking]:
    """Those of which all answers fit; the others are counted in a warning.

    Raises: UserError if none fits.
    """
    kept, too_long = render_rankings(rankings, template, max_tokens)
    if too_long:
        found = (
            f"{len(too_long):,} of {len(rankings):,} rankings have an answer that is too long with "
            f"its prompt ({max_tokens} tokens), the first in {too_long[0]}"
        )
        if not kept:
            raise UserError(f"--data: {found}; raise --seq_length, or give shorter ones")
        _log.warning("data: %s; they are left out", found)
    return kept


class RewardModeling(Task):
    """Trains a `ScalarModel` that begins with the weights of the model of `base`."""

    def __init__(
        self,
        config: RewardConfig,
        base: RunConfig,
        tokenizer: BPETokenizer,
        rankings: tuple[Sequence[Ranking], Sequence[Ranking]],
        world: World,
    ):
        """rankings  those to train on, and those to validate on"""
        self.config, self.run_config, self.tokenizer = config, config.as_run(base), tokenizer
        self.template: Template = template_of(tokenizer, config.template)
        self._device = world.device
        generator = torch.Generator().manual_seed(config.seed)
        self.model = ScalarModel(
            base.model, OPS[base.ops], generator=generator, device=world.device
        )
        optim = config.optim
        groups = parameter_groups(self.model, optim.weight_decay)
        self.optimizer = AdamW(groups, lr=optim.lr, betas=optim.betas, eps=optim.eps)
        train, valid = (
            rendered_or_refused(one, self.template, config.max_tokens(base)) for one in rankings
        )
        self._train, self._valid = train, valid
        num_rows = sum(len(one.rows) for one in train)
        _log.info("data: %d rankings of %d answers; template %s", len(train), num_rows,
                  self.template.name)  # fmt: skip
        self._order = EpochOrder(len(train), config.batch_size, config.seed)
        self.num_steps = config.num_steps(len(train))
        tokens = sum(len(row) for one in train for row in one.rows) / len(train)
        self.tokens_per_step = round(tokens * config.batch_size * config.grad_accum)
        self.flops_per_token = flops_per_token(base.model, self.run_config.seq_length)
        self._data_hash = hash_of(
            [(o.prompt, o.answers, o.ranks) for side in rankings for o in side]
        )
        self.measure = {"data": hash_of(valid), "template": self.template.name}
        self._loss = under_autocast(ranking_loss, world.device, config.dtype)

    def batches_of_step(self, step: int) -> list[RankedRows]:
        first = step * self.config.grad_accum
        numbers = (self._order(first + i) for i in range(self.config.grad_accum))
        return [ranked_rows([self._train[n] for n in some], self._device) for some in numbers]

    def loss(self, model: nn.Module, batch: RankedRows) -> tuple[Tensor, Tensor]:
        return self._loss(model, batch)

    def _scores(self, rankings: Sequence[RenderedRanking]) -> list[Tensor]:
        rows = [row for one in rankings for row in one.rows]
        flat = score_rows(self.model, rows, self._device)
        return list(flat.split([len(one.rows) for one in rankings]))

    @torch.no_grad()
    def evaluate(self, check_stop: CheckStop) -> dict[str, Any]:
        scores = self._scores(self._valid)
        check_stop()
        losses, counted = [], 0
        for own, one in zip(scores, self._valid):
            ranks = torch.tensor([one.ranks])
            loss, pairs = ranking_losses(own.unsqueeze(0), ranks, ranks > 0)
            losses.append(loss.item())
            counted += int(pairs.item() > 0)
        found = {"loss_nats": sum(losses) / max(1, counted)}
        found |= preference_report(scores, self._valid)
        some = self._train[: max(1, 4 * self.config.batch_size)]
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
        rows = [row for one in self._train for row in one.rows][:_REFERENCE_ROWS]
        self.model.offset.zero_()  # the same offset whatever was saved before
        self.model.offset += score_rows(self.model, rows, self._device).mean().to(self._device)
        return {
            "tokenizer_fingerprint": self.tokenizer.fingerprint,
            "stage": {"name": "reward", "config": self.config.saved()},
            "template": self.template.name,
            "data_sha256": self._data_hash,
        }

    def load(self, extras: dict[str, Any]) -> None:
        self.config.check_resumed(extras, self.tokenizer, self._data_hash)

    def start(self, folder: RunFolder) -> None:
        save_tokenizer_of(self.template, self.tokenizer, folder)

    def facts(self) -> dict[str, Any]:
        return {
            "stage": "reward",
            "train_rankings": len(self._train),
            "valid_rankings": len(self._valid),
            "num_parameters": num_scalar_parameters(self.run_config.model),
            "template": self.template.name,
        }


class RewardModel(NamedTuple):
    """A trained reward model, ready to score."""

    model: ScalarModel
    tokenizer: BPETokenizer
    template: Template


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
