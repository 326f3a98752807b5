"""What PPO and GRPO share: rollouts, their scores, the reference, and the order of updates.

An iteration draws `rollout_size` answers, scores them, and makes several updates with them; then
the next one begins. An iteration that was stopped on the way is in the checkpoint, so a resumed run
does the same updates with the same answers.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from cs_lm.alignment.examples import EpochOrder, report_left_out
from cs_lm.alignment.kl import kl_k1, kl_k3
from cs_lm.alignment.masked import masked_mean
from cs_lm.alignment.records import Prompt
from cs_lm.alignment.reward_model import answer_scores
from cs_lm.alignment.reward_training import RewardModel, check_reward_model
from cs_lm.alignment.rollouts import (
    Rollouts,
    answer_log_probs,
    decoded,
    distance,
    distinct_ngrams,
    draw_answers,
    last_places,
    longest_row,
)
from cs_lm.alignment.rules import Rule, score_by_rule
from cs_lm.alignment.stage import (
    StageTask,
    changed_weights,
    hash_of,
    hash_of_weights,
    language_model_of,
    split_by_prompt,
)
from cs_lm.alignment.text_mix import TextBatch, TextMix, TextMixConfig, described, text_loss
from cs_lm.config.fields import setting
from cs_lm.config.optim import OptimConfig
from cs_lm.config.run import RunConfig
from cs_lm.data.batches import step_seed
from cs_lm.data.pipeline import PreparedData
from cs_lm.device import World
from cs_lm.errors import Problem, UserError
from cs_lm.inference.sampling import uniform_draws
from cs_lm.tokenizer import BPETokenizer
from cs_lm.training.checkpoint import restore
from cs_lm.training.step import autocast_context, under_autocast
from cs_lm.training.task import CheckStop

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class PolicyConfig(TextMixConfig):
    """Settings of a stage that learns from answers that it draws itself."""

    prompts: tuple[str, ...] = setting((), "prompts: JSON or JSONL files, or patterns; required")
    valid_fraction: float = setting(
        0.1, "part of --prompts that is kept for validation", "of prompts"
    )
    reward: str | None = setting(None, "score answers by the reward model in this folder")
    rule: str | None = setting(
        None, "score answers by a rule: exact, contains, last_number, length, or module:function"
    )
    gold_rule: str | None = setting(
        None, "also log the score of this rule, which nothing is learnt from"
    )
    rollout_size: int = setting(64, "answers in an iteration; whole updates make it up")
    rollout_epochs: int = setting(2, "passes over the answers of an iteration")
    batch_size: int = setting(32, "answers in one forward pass")
    max_new_tokens: int = setting(64, "of an answer", "tokens")
    temperature: float = setting(1.0, "of the answers that are drawn, and of all log-probabilities")
    no_end_penalty: float = setting(
        1.0, "subtracted from the score of an answer without its end token", minimum=0
    )
    clip: float = setting(0.2, "how far the ratio of new and old probability counts")
    kl_stop: float | None = setting(
        None, "no more updates in an iteration once the model has diverged so far from what it was "
        "at its beginning", "nats per token",
    )  # fmt: skip
    valid_prompts: int = setting(64, "prompts that are answered in each validation")
    optim: OptimConfig = field(
        default_factory=lambda: OptimConfig(
            lr=1e-5, lr_min=1e-5, warmup_ratio=0.03, warmfix_ratio=1.0, weight_decay=0.0,
            betas=(0.9, 0.95), eps=1e-5,
        )
    )  # fmt: skip

    def validate(self) -> list[Problem]:
        found = super().validate()
        if not self.prompts and not self.resume:
            found.append(Problem("--prompts", "is missing", fix="name files of prompts"))
        if (self.reward is None) == (self.rule is None) and not self.resume:
            what = "are missing" if self.reward is None else "got both"
            found.append(Problem("--reward, --rule", what, fix="give one of the two"))
        if not 0 < self.valid_fraction < 1:
            given = f"got {self.valid_fraction}"
            found.append(Problem("--valid_fraction", given, "more than 0 and less than 1"))
        rows = self.batch_size * self.grad_accum
        if rows > 0 and self.rollout_size % rows:
            need = f"a multiple of --batch_size times --grad_accum ({rows})"
            found.append(Problem("--rollout_size", f"got {self.rollout_size}", need))
        if not 0 < self.clip < 1:
            found.append(Problem("--clip", f"got {self.clip}", "more than 0 and less than 1"))
        return found

    @property
    def answers_per_prompt(self) -> int:
        return 1

    @property
    def updates_per_iteration(self) -> int:
        return self.rollout_epochs * self.rollout_size // (self.batch_size * self.grad_accum)

    def num_steps(self, num_rows: int) -> int:
        """Updates of `num_epochs` passes over that many prompts."""
        iterations = round(self.num_epochs * num_rows * self.answers_per_prompt / self.rollout_size)
        steps = max(1, iterations) * self.updates_per_iteration
        return steps if self.max_steps is None else min(steps, self.max_steps)


class Scorer(NamedTuple):
    """What answers are scored by: a reward model or a rule.

    name   identifies it, for a checkpoint
    """

    name: str
    model: RewardModel | None
    rule: Rule | None


class PolicySources(NamedTuple):
    """What a policy is trained from.

    base       settings of the run with the model
    gold       a rule whose score is logged
    text       pre-training text to mix in, or None
    reference  reads the weights that the run began with
    """

    base: RunConfig
    tokenizer: BPETokenizer
    prompts: Sequence[Prompt]
    scorer: Scorer
    gold: Rule | None
    text: PreparedData | None
    reference: Callable[[], Mapping[str, Tensor]]


class AskedPrompt(NamedTuple):
    """A prompt, and what the policy is given to answer it."""

    prompt: Prompt
    token_ids: list[int]


class PolicyBatch(NamedTuple):
    """Some of an iteration's answers; `values` are further tensors of the method, a row each."""

    token_ids: Tensor
    mask: Tensor
    old_log_probs: Tensor
    ref_log_probs: Tensor
    values: Tensors


class PolicyTask(StageTask):
    """Trains a policy on its own answers. A subclass turns scores into advantages and a loss."""

    config: PolicyConfig

    def __init__(self, config: PolicyConfig, sources: PolicySources, world: World):
        base = sources.base
        # without dropout, so that the policy that learns is the one that draws
        self.policy = language_model_of(config, base, world.device).eval()
        self.device = world.device
        super().__init__(config, base, sources.tokenizer, self.policy)
        self.reference = language_model_of(config, base, world.device).eval()
        for parameter in self.reference.parameters():
            parameter.requires_grad_(False)
        self._reference_hash = ""
        self._sources, self.scorer = sources, sources.scorer
        if self.scorer.model is not None:
            check_reward_model(self.scorer.model, self.tokenizer, self.template)
        asked = self._that_fit(sources.prompts)
        self.train, self.valid = split_by_prompt(
            asked, config.valid_fraction, lambda one: one.prompt.conversation, "--prompts"
        )
        per_iteration = config.rollout_size // config.answers_per_prompt
        self._order = EpochOrder(len(self.train), per_iteration, config.seed)
        self.num_steps = config.num_steps(len(self.train))
        rows = config.batch_size * config.grad_accum
        mean = sum(len(one.token_ids) for one in asked) / len(asked)
        self.tokens_per_step = round(rows * (mean + config.max_new_tokens / 2))
        self.data_hash = hash_of(
            [(one.prompt.conversation, sorted(one.prompt.fields.items())) for one in asked]
        )
        self.measure = {
            "prompts": hash_of([one.prompt[:2] for one in self.valid[: config.valid_prompts]]),
            "score": [self.scorer.name, config.no_end_penalty, config.max_new_tokens],
        }
        self.text = None
        if sources.text is not None:
            self.text = TextMix(sources.text, config, self.run_config, self.tokenizer, world)
            self.tokens_per_step += self.text.tokens_per_step
        self._iteration, self._first_step, self._end_step = -1, 0, 0
        self._experience: Tensors = {}
        self._facts: dict[str, float] = {}  # of the iteration's answers
        # of its updates so far, by their number in the iteration: of each batch
        self._stats: dict[int, list[dict[str, Tensor | float]]] = {}
        self._place = 0  # the number of the present update
        self._updating_since, self._updating_s = 0.0, 0.0
        self._loss = under_autocast(self._loss_of, world.device, config.dtype)

    def _that_fit(self, prompts: Sequence[Prompt]) -> list[AskedPrompt]:
        """Those that leave room for an answer; the others are counted in a warning."""
        model = self.scorer.model
        judged = None if model is None else model.model.trunk.config.context_length
        longest = longest_row(self.run_config.seq_length, judged)
        most = longest - self.config.max_new_tokens
        if most < 1:
            raise UserError(
                f"--max_new_tokens: got {self.config.max_new_tokens}, need at most "
                f"{longest - 1}, which the context holds"
            )
        kept, too_long = [], []
        for one in prompts:
            asked = AskedPrompt(one, self.template.render_for_completion(one.conversation))
            (kept if len(asked.token_ids) <= most else too_long).append(asked)
        if too_long:
            report_left_out(
                f"{len(too_long):,} of {len(prompts):,} prompts leave no room for an answer of "
                f"{self.config.max_new_tokens} tokens, the first in {too_long[0].prompt.where}",
                bool(kept),
                "--prompts",
            )
        return kept

    # ---- models ----

    def begin_with(self, weights: Mapping[str, Tensor]) -> None:
        super().begin_with(weights)
        self._set_reference(weights)

    def _set_reference(self, weights: Mapping[str, Tensor]) -> None:
        restore({"model": dict(weights)}, self.reference)
        self._reference_hash = hash_of_weights(self.reference.state_dict())

    @property
    def saved_model(self) -> nn.Module:
        return self.policy

    # ---- iterations ----

    def batches_of_step(self, step: int) -> list[PolicyBatch | TextBatch]:
        if step >= self._end_step:
            self._begin_iteration(step)
        self._updating_since, self._place = time.monotonic(), step - self._first_step
        self._stats[self._place] = []
        size, accum = self.config.batch_size, self.config.grad_accum
        updates = self.config.rollout_size // (size * accum)
        epoch, place = divmod(self._place, updates)
        seed = (self.config.seed, self._iteration, epoch)
        order = np.random.default_rng(seed).permutation(self.config.rollout_size)
        own = order[place * size * accum : (place + 1) * size * accum].tolist()
        batches = [self._batch(own[start : start + size]) for start in range(0, len(own), size)]
        if self.text is None:
            return batches
        return [*batches, self.text.batch(step, self.count_of([self._lengths[n] for n in own]))]

    def _batch(self, rows: Sequence[int]) -> PolicyBatch:
        places = torch.tensor(list(rows)).to(self.device)
        known = {name: tensor[places] for name, tensor in self._experience.items()}
        width = max(self._ends[number] for number in rows)  # the columns that these rows use
        known = {
            name: x[:, : width + (name == "token_ids")] if x.dim() > 1 else x
            for name, x in known.items()
        }
        first = (known.pop(name) for name in PolicyBatch._fields[:-1])
        return PolicyBatch(*first, known)

    def _begin_iteration(self, step: int) -> None:
        """All that may fail comes first: a failure leaves the iteration before as it was."""
        config, iteration = self.config, self._iteration + 1
        numbers = self._order(iteration)
        asked = [self.train[n] for n in numbers for _ in range(config.answers_per_prompt)]
        experience, facts = self._experienced(asked, step_seed(config.seed, iteration))
        if iteration:
            self.learn_from_facts(self._facts)
        learnt = self.learnt_from(experience, facts)
        self._iteration, self._facts = iteration, facts
        self._first_step, self._end_step = step, step + config.updates_per_iteration
        self._stats, self._updating_s = {}, 0.0
        self._set_experience(experience | learnt)

    def _set_experience(self, experience: Tensors) -> None:
        """Keeps where the answers end on the host, too: no update waits for the device."""
        self._experience = experience
        self._lengths = experience["mask"].sum(-1).tolist()
        self._ends = last_places(experience["mask"]).tolist()

    def _experienced(
        self, asked: Sequence[AskedPrompt], seed: int
    ) -> tuple[Tensors, dict[str, float]]:
        """Answers to the prompts with their scores, and numbers about them for the log."""
        prompts = [one.prompt for one in asked]
        config, clock = self.config, [time.monotonic()]
        rollouts = draw_answers(
            self.policy,
            [one.token_ids for one in asked],
            self.template.end_id,
            uniform_draws(seed, range(len(prompts)), config.max_new_tokens),
            config.temperature,
        )
        clock.append(time.monotonic())
        with autocast_context(self.device, config.dtype):
            found = distance(
                self.policy, self.reference, rollouts, config.temperature, config.batch_size
            )
        answers = rollouts.answers(self.template.end_id)
        texts = [decoded(self.tokenizer, ids) for ids in answers]
        scores = self._scores(prompts, texts, rollouts)
        has_ended, lengths = rollouts.ended.double(), rollouts.lengths.double()
        total = scores - config.no_end_penalty * (1 - has_ended.to(scores.dtype))
        # under autocast the cached products round in another way than those of an update
        is_exact = config.dtype == "float32"
        old = rollouts.log_probs if is_exact else found.log_probs
        k1 = kl_k1(old, found.ref_log_probs)
        clock.append(time.monotonic())
        facts = {
            "score": scores.mean().item(),
            "score_std": scores.std().item() if len(scores) > 1 else 0.0,
            "kl_k1": k1.sum(-1).mean().item(),
            "kl_exact": found.kl.sum(-1).mean().item(),
            "kl_exact_per_token": masked_mean(found.kl, rollouts.mask).item(),
            "entropy": masked_mean(found.entropies, rollouts.mask).item(),
            "length": lengths.mean().item(),
            "ended": has_ended.mean().item(),
            "distinct_4": distinct_ngrams(answers),
            "sampling_s": clock[1] - clock[0],
            "scoring_s": clock[2] - clock[1],
        }
        if self._sources.gold is not None:
            gold = _by_rule(self._sources.gold, prompts, texts, rollouts)
            facts["gold"] = sum(gold) / len(gold)
        experience = {
            "token_ids": rollouts.token_ids, "mask": rollouts.mask, "old_log_probs": old,
            "ref_log_probs": found.ref_log_probs, "scores": total,
        }  # fmt: skip
        return experience, facts

    def _scores(
        self, prompts: Sequence[Prompt], texts: Sequence[str], rollouts: Rollouts
    ) -> Tensor:
        """The score of each answer, (N)."""
        if self.scorer.rule is not None:
            scores = _by_rule(self.scorer.rule, prompts, texts, rollouts)
            return torch.tensor(scores, dtype=torch.float32, device=self.device)
        return answer_scores(
            self.scorer.model.model, rollouts.token_ids, rollouts.last, self.config.batch_size
        )

    def after_step(self, step: int) -> list[tuple[str, dict[str, Any]]]:
        self._updating_s += time.monotonic() - self._updating_since
        limit, of_update = self.config.kl_stop, self._stats[self._place]
        if limit is not None:
            moved = sum(float(one["approx_kl"]) for one in of_update) / len(of_update)
            self._end_step = step if moved > limit else self._end_step
        if step < self._end_step:
            return []
        stats = [one for of_update in self._stats.values() for one in of_update]
        means = {name: sum(float(one[name]) for one in stats) / len(stats) for name in stats[0]}
        means["ratio_gap"] = max(float(one["ratio_gap"]) for one in self._stats[0])
        means["ratio_min"] = min(float(one["ratio_min"]) for one in stats)
        means["ratio_max"] = max(float(one["ratio_max"]) for one in stats)
        record = {
            "iteration": self._iteration,
            "updates": step - self._first_step,
            **self._facts,
            **means,
            "updating_s": self._updating_s,
        }
        return [("rollout", record)]

    # ---- losses ----

    def _loss_of(self, model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
        if not isinstance(batch, TextBatch):
            return self.policy_loss(batch)
        if "text_gradient_ratio" not in self._facts:
            self._facts["text_gradient_ratio"] = self._text_gradient_ratio(batch)
        return text_loss(self.policy, batch)

    def _text_gradient_ratio(self, batch: TextBatch) -> float:
        """The norm of the text's gradient over that of the answers, which is in `grad` by now."""
        parameters = [p for p in self.policy.parameters() if p.grad is not None]
        of_text = torch.autograd.grad(text_loss(self.policy, batch)[0], parameters)
        norms = (torch.stack([x.norm() for x in grads]).norm() for grads in
                 (of_text, [p.grad for p in parameters]))  # fmt: skip
        text, answers = norms
        return (text / answers.clamp(min=1e-30)).item()

    def loss(self, model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
        return self._loss(model, batch)

    def log_probs_now(self, batch: PolicyBatch) -> tuple[Tensor, Tensor]:
        """Log-probabilities of the batch under the present policy, and entropies: (B, T) each."""
        ids, mask = batch.token_ids, batch.mask
        hidden = self.policy.hidden_states(ids[:, :-1])
        return answer_log_probs(self.policy, hidden, ids, mask, self.config.temperature)

    def note(
        self,
        batch: PolicyBatch,
        log_probs: Tensor,
        entropies: Tensor,
        is_clipped: Tensor,
        **more: Tensor,
    ) -> None:
        """Keeps numbers of a forward pass, for the record of the iteration."""
        stats = {
            "clip_fraction": masked_mean(is_clipped.float(), batch.mask),
            "update_entropy": masked_mean(entropies, batch.mask),
            **ratio_stats(log_probs, batch),
            **more,
        }
        found = {name: value.detach() for name, value in stats.items()}
        self._stats[self._place].append(found)

    # ---- hooks ----

    def learnt_from(self, experience: Tensors, facts: dict[str, float]) -> Tensors:
        """What the method needs beside the answers, a row each; facts  numbers to log"""
        raise NotImplementedError

    def policy_loss(self, batch: PolicyBatch) -> tuple[Tensor, Tensor]:
        """Sum of the losses and their count; calls `note`."""
        raise NotImplementedError

    def learn_from_facts(self, facts: Mapping[str, float]) -> None:
        """Between two iterations; a second call with the same facts changes nothing more.

        facts  numbers of the iteration before
        """

    def count_of(self, lengths: Sequence[int]) -> int:
        """What the summed loss of answers of these lengths is divided by."""
        return sum(lengths)

    # ---- evaluation ----

    def evaluate(self, check_stop: CheckStop) -> dict[str, Any]:
        """Answers to prompts that are never trained on; always the same draws."""
        asked = self.valid[: self.config.valid_prompts]
        check_stop()
        experience, facts = self._experienced(asked, step_seed(self.config.seed, 1 << 40))
        facts.pop("sampling_s"), facts.pop("scoring_s")
        found = {"loss_nats": -experience["scores"].mean().item(), **facts}
        if self.text is not None:
            found["text_bits_per_byte"] = self.text.bits_per_byte(self.policy, check_stop)
        return found

    def describe_evaluation(self, found: dict[str, Any]) -> str:
        gold = f" | gold {found['gold']:.3f}" if "gold" in found else ""
        return (
            f"validation score {found['score']:.4f}{gold} | KL {found['kl_exact']:.2f} nats | "
            f"length {found['length']:.1f} | ended {found['ended']:.2f}{described(found)}"
        )

    def facts(self) -> dict[str, Any]:
        sizes = {"train_prompts": len(self.train), "valid_prompts": len(self.valid)}
        return super().facts() | sizes | {"scored_by": self.scorer.name}

    def describe_batches(self, step: int) -> list[dict[str, Any]]:
        return [
            {"number": number, "iteration": self._iteration}
            for number in range(len(self.batches_of_step(step)))
        ]

    # ---- checkpoints ----

    def save(self) -> dict[str, Any]:
        stats = {
            place: [{name: float(value) for name, value in one.items()} for one in of_update]
            for place, of_update in self._stats.items()
        }
        return super().save() | {
            "reference_sha256": self._reference_hash,
            "scorer": self.scorer.name,
            "rollouts": {
                "number": self._iteration,
                "first_step": self._first_step,
                "end_step": self._end_step,
                "facts": dict(self._facts),
                "stats": stats,
                "updating_s": self._updating_s,
                "experience": dict(self._experience),
            },
        }

    def load(self, extras: dict[str, Any]) -> None:
        super().load(extras)
        if extras["scorer"] != self.scorer.name:
            raise UserError(
                "--resume: the reward model is not the one that the run began with; restore "
                f"{self.config.reward!r}, or start a new run in another --out_dir"
            )
        self._set_reference(self._sources.reference())
        if self._reference_hash != extras["reference_sha256"]:
            raise changed_weights(self.config.source)
        saved = extras["rollouts"]
        self._iteration, self._first_step = saved["number"], saved["first_step"]
        self._end_step, self._facts = saved["end_step"], saved["facts"]
        self._stats, self._updating_s = dict(saved["stats"]), saved["updating_s"]
        if saved["experience"]:
            self._set_experience(
                {name: tensor.to(self.device) for name, tensor in saved["experience"].items()}
            )


def _by_rule(
    rule: Rule, prompts: Sequence[Prompt], texts: Sequence[str], rollouts: Rollouts
) -> list[float]:
    every = zip(texts, prompts, rollouts.ended.tolist(), strict=True)
    return [score_by_rule(rule, text, prompt, ended) for text, prompt, ended in every]


@torch.no_grad()
def ratio_stats(log_probs: Tensor, batch: PolicyBatch) -> Tensors:
    """How far the policy has moved since it drew the answers.

    ratio_gap  the largest |p / p_old - 1|: before the first update it is rounding alone
    approx_kl  of the old policy from the new one, by `kl_k3` [nats per token]
    """
    ratio = torch.exp(log_probs - batch.old_log_probs)[batch.mask]
    moved = kl_k3(batch.old_log_probs, log_probs)
    return {
        "ratio_gap": (ratio - 1).abs().max(),
        "ratio_mean": ratio.mean(),
        "ratio_min": ratio.min(),
        "ratio_max": ratio.max(),
        "approx_kl": masked_mean(moved, batch.mask),
    }
