"""Direct preference optimisation: a policy learns from rankings without a reward model.

    loss of a prompt = the mean over its pairs of -log sigmoid(beta (ratio_better - ratio_worse))

with ratio = log p(answer) - log p_reference(answer), sums over the answer's tokens. All pairs of a
prompt weigh as one. Source: Rafailov et al. 2023, Direct preference optimization, equation 7.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from cs_lm.alignment.losses import (
    dpo_rewards,
    ipo_losses,
    preference_losses,
    ranking_losses,
)
from cs_lm.alignment.ranking_task import RankingsConfig, RankingsTask
from cs_lm.alignment.records import Ranking
from cs_lm.alignment.reward_model import RankedRows, RenderedRanking, ranked_rows
from cs_lm.alignment.stage import hash_of, language_model_of
from cs_lm.config.fields import setting
from cs_lm.config.optim import OptimConfig
from cs_lm.config.run import RunConfig
from cs_lm.device import World
from cs_lm.errors import Problem
from cs_lm.models.base import LanguageModel, token_log_probs
from cs_lm.ops.reference import IGNORE_INDEX
from cs_lm.tokenizer import BPETokenizer
from cs_lm.training.step import autocast_context, under_autocast
from cs_lm.training.task import CheckStop


@dataclass(frozen=True)
class DPOConfig(RankingsConfig):
    """Direct preference optimisation."""

    beta: float = setting(0.1, "how strongly the policy is held to the reference")
    loss: str = setting(
        "sigmoid",
        "sigmoid: of summed log-probabilities; ipo: squared, of their means",
        choices=("sigmoid", "ipo"),
    )
    label_smoothing: float = setting(
        0.0, "share of the labels that are expected to be wrong", minimum=0
    )
    nll_weight: float = setting(
        0.0, "weight of the best answer's mean surprise of a token", minimum=0
    )
    num_epochs: float = setting(1.0, "passes over the rankings; sets the number of updates")
    optim: OptimConfig = field(
        default_factory=lambda: OptimConfig(
            lr=1e-6, lr_min=1e-7, warmup_ratio=0.1, warmfix_ratio=1.0, weight_decay=0.0
        )
    )

    def validate(self) -> list[Problem]:
        found = super().validate()
        if not 0 <= self.label_smoothing < 0.5:
            what = f"got {self.label_smoothing}"
            found.append(Problem("--label_smoothing", what, "0 to below 0.5"))
        if self.loss == "ipo" and self.label_smoothing:
            found.append(Problem("--label_smoothing", "has no effect with --loss ipo"))
        return found


class ComparedRows(NamedTuple):
    """Ranked answers, which tokens belong to them, and the reference's log-probabilities.

    rows       the answers of P prompts
    is_answer  (N, T), True at the tokens of an answer
    reference  (N), log-probability of each answer [nats]
    """

    rows: RankedRows
    is_answer: Tensor
    reference: Tensor


def answer_log_probs(model: LanguageModel, ids: Tensor, is_answer: Tensor) -> Tensor:
    """The log-probability of each answer, a sum over its tokens: (N, T), (N, T) to (N) [nats]."""
    targets = torch.where(is_answer[:, 1:], ids[:, 1:], IGNORE_INDEX)
    return token_log_probs(model, model.hidden_states(ids[:, :-1]), targets)[0].sum(-1)


def compared_rows(
    rankings: Sequence[RenderedRanking],
    reference: Sequence[Tensor],
    device: torch.device | str = "cpu",
) -> ComparedRows:
    """The rankings as one batch; reference  of each, the log-probabilities of its answers (K)"""
    rows = ranked_rows(rankings, device)
    firsts = [one.num_prompt for one in rankings for _ in one.rows]
    places = torch.arange(rows.token_ids.shape[1], device=device)
    first = torch.tensor(firsts, device=device).unsqueeze(-1)
    is_answer = (places >= first) & (places <= rows.last.unsqueeze(-1))
    return ComparedRows(rows, is_answer, torch.cat(list(reference)).to(device))


class Compared(NamedTuple):
    """Of each prompt: loss (P), pairs (P); of each answer, (P, K): rewards, log-probabilities."""

    losses: Tensor
    num_pairs: Tensor
    rewards: Tensor
    log_probs: Tensor


def compare(model: LanguageModel, batch: ComparedRows, config: DPOConfig) -> Compared:
    """The losses of a batch, and what they are made of."""
    rows, is_answer, reference = batch
    log_probs = answer_log_probs(model, rows.token_ids, is_answer)
    lengths = is_answer.sum(-1)
    if config.loss == "ipo":
        pair_losses = functools.partial(ipo_losses, beta=config.beta)
        rewards = dpo_rewards(log_probs / lengths, reference / lengths, config.beta)
    else:
        pair_losses = functools.partial(preference_losses, label_smoothing=config.label_smoothing)
        rewards = dpo_rewards(log_probs, reference, config.beta)
    rewards, of_answers = rewards[rows.places], log_probs[rows.places]  # (P, K)
    losses, num_pairs = ranking_losses(rewards, rows.ranks, rows.mask, pair_losses)
    if config.nll_weight:
        of_all = torch.where(rows.mask, rows.ranks, rows.ranks.max() + 1)
        is_best = of_all == of_all.amin(-1, keepdim=True)
        surprise = -of_answers / lengths[rows.places]
        best = torch.where(is_best, surprise, 0.0).sum(-1) / is_best.sum(-1)
        losses = losses + config.nll_weight * torch.where(num_pairs > 0, best, 0.0)
    return Compared(losses, num_pairs, rewards, of_answers)


class PreferenceOptimization(RankingsTask):
    """Trains the model of `base`; the model that it begins with is the reference.

    Dropout is off, so that policy and reference agree at the start. The reference's
    log-probabilities are computed once, and stored with each checkpoint.
    """

    stage = "dpo"

    def __init__(
        self,
        config: DPOConfig,
        base: RunConfig,
        tokenizer: BPETokenizer,
        rankings: tuple[Sequence[Ranking], Sequence[Ranking]],
        world: World,
    ):
        """rankings  those to train on, and those to validate on"""
        model = language_model_of(config, base, world.device).eval()
        super().__init__(config, base, tokenizer, rankings, model, world)
        self.rankings = [*self.train, *self.valid]
        self.reference: list[Tensor] | None = None  # of each ranking
        self.measure = {
            "data": hash_of([one.rows for one in self.valid]),
            "loss": [config.loss, config.beta, config.label_smoothing, config.nll_weight],
        }
        self._compare = under_autocast(self._compared, world.device, config.dtype)

    def begin_with(self, weights: dict[str, Tensor]) -> None:
        super().begin_with(weights)
        self.keep_reference()

    def keep_reference(self) -> None:
        """Stores the log-probabilities under the weights that the model has now."""
        self.reference = [self.live(number) for number in range(len(self.rankings))]

    @torch.no_grad()
    def live(self, number: int) -> Tensor:
        """Log-probabilities of the answers of one ranking under the present weights: (K), CPU."""
        one = self.rankings[number]
        batch = compared_rows([one], [torch.zeros(len(one.rows))], self.device)
        with autocast_context(self.device, self.config.dtype):  # as in an update
            return answer_log_probs(self.model, batch.rows.token_ids, batch.is_answer).cpu()

    def batch(self, numbers: Sequence[int]) -> ComparedRows:
        """The rankings of these numbers."""
        rankings = [self.rankings[number] for number in numbers]
        return compared_rows(rankings, [self.reference[n] for n in numbers], self.device)

    def batches_of_step(self, step: int) -> list[ComparedRows]:
        return [self.batch(self.order(number)) for number in self.numbers_of_step(step)]

    def _compared(self, model: nn.Module, batch: ComparedRows) -> Compared:
        return compare(model, batch, self.config)

    def loss(self, model: nn.Module, batch: ComparedRows) -> tuple[Tensor, Tensor]:
        found = self._compare(model, batch)
        return found.losses.sum(), (found.num_pairs > 0).sum()

    @torch.no_grad()
    def evaluate(self, check_stop: CheckStop) -> dict[str, Any]:
        total, prompts, right, pairs = 0.0, 0, 0, 0
        margins, better, worse = 0.0, 0.0, 0.0
        for number in range(len(self.train), len(self.rankings)):
            check_stop()
            batch = self.batch([number])
            found = self._compare(self.model, batch)
            ranks = batch.rows.ranks[0]
            is_pair = ranks.unsqueeze(-1) < ranks
            margin = (found.rewards[0].unsqueeze(-1) - found.rewards[0])[is_pair]
            log_probs = found.log_probs[0].unsqueeze(-1).expand(is_pair.shape)
            total += found.losses.item()
            prompts += int(len(margin) > 0)
            pairs += len(margin)
            right += int((margin > 0).sum())
            margins += margin.sum().item()
            better += log_probs[is_pair].sum().item()
            worse += log_probs[is_pair.mT].sum().item()
        return {
            "loss_nats": total / max(1, prompts),
            "num_pairs": pairs,
            "accuracy": right / max(1, pairs),
            "margin": margins / max(1, pairs),
            "log_prob_better": better / max(1, pairs),
            "log_prob_worse": worse / max(1, pairs),
        }

    def describe_evaluation(self, found: dict[str, Any]) -> str:
        return (
            f"validation loss {found['loss_nats']:.4f} | right {found['accuracy']:.3f} | margin "
            f"{found['margin']:.3f} | log p better {found['log_prob_better']:.2f}, worse "
            f"{found['log_prob_worse']:.2f}"
        )

    def save(self) -> dict[str, Any]:
        return super().save() | {"reference_log_probs": torch.cat(self.reference)}

    def load(self, extras: dict[str, Any]) -> None:
        super().load(extras)
        sizes = [len(one.rows) for one in self.rankings]
        self.reference = list(extras["reference_log_probs"].split(sizes))
