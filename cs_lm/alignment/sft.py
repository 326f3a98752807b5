"""Supervised fine-tuning: a language model learns to answer from conversations.

    loss = -sum(log p(answer's tokens)) / number of these tokens

over all micro-batches of an update. With text of the pre-training mixed in, `weight` times the mean
loss of a token of that text is added.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from cs_lm.alignment.answers import Answerer, ContextFullError
from cs_lm.alignment.examples import (
    ExampleBatch,
    ExampleBatches,
    describe,
    example_loss,
    example_of,
    padded_batch,
    render_all,
)
from cs_lm.alignment.lora import LowRankAdapter
from cs_lm.alignment.records import Demonstration
from cs_lm.alignment.reward_model import answer_scores
from cs_lm.alignment.reward_training import RewardModel, check_reward_model
from cs_lm.alignment.rollouts import draw_answers, longest_row
from cs_lm.alignment.stage import (
    StageTask,
    changed_weights,
    hash_of,
    hash_of_weights,
    language_model_of,
    validate_records,
)
from cs_lm.alignment.text_mix import TextBatch, TextMix, TextMixConfig, described, text_loss
from cs_lm.config.fields import setting
from cs_lm.config.optim import OptimConfig
from cs_lm.config.run import RunConfig, as_in_a_run
from cs_lm.data.pipeline import PreparedData
from cs_lm.device import World
from cs_lm.errors import Problem, UserError, no_effect_without
from cs_lm.inference.decoding_config import DecodingConfig
from cs_lm.inference.sampling import NotANumberError, uniform_draws
from cs_lm.models.base import evaluating
from cs_lm.ops.reference import IGNORE_INDEX
from cs_lm.tokenizer import BPETokenizer
from cs_lm.training.checkpoint import restore
from cs_lm.training.step import under_autocast
from cs_lm.training.task import CheckStop

_log = logging.getLogger("cs_lm")
_SAMPLE_TOKENS = 64
_NUM_SCORED = 64  # validation prompts that a reward model's score is the mean of


@dataclass(frozen=True)
class SFTConfig(TextMixConfig):
    """Supervised fine-tuning."""

    data: tuple[str, ...] = setting(
        (), "conversations, instructions or pairs: JSON or JSONL files, or patterns; required"
    )
    valid_data: tuple[str, ...] = setting((), "separate ones for validation; same forms as --data")
    valid_fraction: float = setting(
        0.05, "part of --data that is kept for validation without --valid_data", "of records"
    )
    learn_prompts: bool = setting(False, "also learn the user's messages, not the answers alone")
    packing: bool = setting(
        False, "several conversations in a row of --seq_length tokens; each sees itself alone"
    )
    reward: str | None = setting(
        None, "score answers in each validation by the reward model in this folder, and keep the "
        "checkpoint that it likes best, not the one with the least loss",
    )  # fmt: skip
    sample_interval: int = as_in_a_run("sample_interval", default=100)
    lora_rank: int | None = setting(
        None, "train low-rank changes of the weights only, of this rank; the run has them merged"
    )
    lora_alpha: float = setting(16.0, "the changes are multiplied by this over --lora_rank")
    optim: OptimConfig = field(
        default_factory=lambda: OptimConfig(
            lr=2e-5, lr_min=2e-6, warmup_ratio=0.03, warmfix_ratio=1.0, weight_decay=0.0
        )
    )

    def validate(self) -> list[Problem]:
        found = [*super().validate(), *validate_records(self, "conversations")]
        if self.lora_rank is None and self.lora_alpha != SFTConfig.lora_alpha:
            found.append(no_effect_without("--lora_alpha", "--lora_rank"))
        return found


class Sources(NamedTuple):
    """What a model is fine-tuned from.

    base  settings of the run with the model
    text     pre-training text to mix in, or None
    weights  reads the weights that the run began with
    reward   a reward model that chooses the best checkpoint
    """

    base: RunConfig
    tokenizer: BPETokenizer
    text: PreparedData | None = None
    weights: Callable[[], Mapping[str, Tensor]] | None = None
    reward: RewardModel | None = None


class SupervisedFineTuning(StageTask):
    """Trains the model of `sources.base` on demonstrations."""

    stage = "sft"

    def __init__(
        self,
        config: SFTConfig,
        sources: Sources,
        train: Sequence[Demonstration],
        valid: Sequence[Demonstration],
        world: World,
    ):
        base = sources.base
        self.policy = model = language_model_of(config, base, world.device)
        self._adapter = None
        if config.lora_rank is not None:
            self._adapter = LowRankAdapter(model, config.lora_rank, config.lora_alpha, config.seed)
        super().__init__(config, base, sources.tokenizer, self._adapter or model)
        self._first_weights, self._first_hash = sources.weights, None
        self._device = world.device
        most, length = config.max_tokens(base), self.run_config.seq_length
        rendered = render_all(train, self.template, most, config.learn_prompts)
        _log.info("data: %s; template %s", describe(rendered), self.template.name)
        examples = [example_of(one) for one in rendered]
        pack_to = length if config.packing else None
        self.batches = ExampleBatches(
            examples, config.batch_size, config.seed, world.device, pack_to
        )
        self.num_steps = config.num_steps(self.batches.num_rows)
        self.data_hash = hash_of([one.conversation for one in (*train, *valid)])
        self.valid = valid
        self._valid = [example_of(one) for one in render_all(valid, self.template, most)]
        rows = config.batch_size * config.grad_accum
        num_tokens = sum(len(one.inputs) for one in examples) / self.batches.num_rows
        self.tokens_per_step = round(rows * num_tokens)
        self.text = None
        if sources.text is not None:
            self.text = TextMix(sources.text, config, self.run_config, self.tokenizer, world)
            self.tokens_per_step += self.text.tokens_per_step
        self.measure = {
            "data": hash_of([one.conversation for one in valid]),
            "template": self.template.name,
            "tokenizer": self.tokenizer.fingerprint,
        }
        self._reward = sources.reward
        if self._reward is not None:
            check_reward_model(self._reward, self.tokenizer, self.template)
            self.measure["reward"] = hash_of_weights(self._reward.model.state_dict())
        self._loss = under_autocast(self._loss_of, world.device, config.dtype)

    def batches_of_step(self, step: int) -> list[ExampleBatch | TextBatch]:
        batches: list = [self.batches(number) for number in self.numbers_of_step(step)]
        if self.text is None:
            return batches
        num_targets = sum(int((b.targets != IGNORE_INDEX).sum()) for b in batches)
        return [*batches, self.text.batch(step, num_targets)]

    def _loss_of(self, model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
        of_batch = text_loss if isinstance(batch, TextBatch) else example_loss
        if self._adapter is not None:
            model = self._adapter.merge()
        return of_batch(model, batch)

    def loss(self, model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
        return self._loss(model, batch)

    @torch.no_grad()
    def evaluate(self, check_stop: CheckStop) -> dict[str, Any]:
        total, count = 0.0, 0
        self._merge()
        with evaluating(self.model):
            size = self.config.batch_size
            for start in range(0, len(self._valid), size):
                check_stop()
                batch = padded_batch(self._valid[start : start + size], self._device)
                part, counted = self._loss(self.model, batch)
                total, count = total + part.item(), count + counted.item()
        found = {"loss_nats": total / max(1, count), "num_scored_tokens": count}
        if self._reward is not None:
            check_stop()
            found["reward_score"] = self._mean_score()
        if self.text is not None:
            found["text_bits_per_byte"] = self.text.bits_per_byte(self.policy, check_stop)
        return found

    def _mean_score(self) -> float:
        """What the reward model says of answers to validation prompts; always the same draws."""
        judged = self._reward.model.trunk.config.context_length
        room = longest_row(self.run_config.seq_length, judged) - _SAMPLE_TOKENS
        prompts = [
            self.template.render_for_completion(one.conversation[:-1])
            for one in self.valid[:_NUM_SCORED]
        ]
        prompts = [ids for ids in prompts if len(ids) <= room]
        if not prompts:
            raise UserError(
                f"--reward: no validation prompt leaves room for {_SAMPLE_TOKENS} tokens of answer"
            )
        uniform = uniform_draws(self.config.seed, range(len(prompts)), _SAMPLE_TOKENS)
        drawn = draw_answers(self.policy, prompts, self.template.end_id, uniform)
        return answer_scores(self._reward.model, drawn.token_ids, drawn.last).mean().item()

    def selected_by(self, found: dict[str, Any]) -> float | None:
        return found["loss_nats"] if self._reward is None else -found["reward_score"]

    def describe_evaluation(self, found: dict[str, Any]) -> str:
        score = f" | reward {found['reward_score']:.4f}" if "reward_score" in found else ""
        return f"validation loss of answers {found['loss_nats']:.4f}{score}{described(found)}"

    def sample(self, check_stop: CheckStop) -> tuple[dict[str, Any] | None, str]:
        """An answer to the first prompt of the validation part."""
        self._merge()
        prompt = self.valid[0].conversation[:-1]
        choice = DecodingConfig(
            max_new_tokens=_SAMPLE_TOKENS, temperature=0.0, seed=self.config.seed
        )
        try:
            ((text, *_),) = Answerer(self.policy, self.tokenizer, self.template)(prompt, choice)
        except ContextFullError:
            return None, ""
        except NotANumberError as error:
            return None, str(error)
        check_stop()
        asked = prompt[-1].content
        return {"prompt": asked, "text": text}, f"{asked} -> {text.strip()}"

    @torch.no_grad()
    def _merge(self) -> None:
        """The policy gets the weights of now, where they come from an adapter."""
        if self._adapter is not None:
            self._adapter.merge()

    def begin_with(self, weights: Mapping[str, Tensor]) -> None:
        super().begin_with(weights)
        if self._adapter is not None:
            self._first_hash = hash_of_weights(weights)
            self._merge()

    def save(self) -> dict[str, Any]:
        if self._adapter is None:
            return super().save()
        return super().save() | {
            "lora": self._adapter.matrices(),
            "first_weights_sha256": self._first_hash,
        }

    def load(self, extras: dict[str, Any]) -> None:
        super().load(extras)
        if self._adapter is None:
            return
        weights = self._first_weights()
        self._first_hash = hash_of_weights(weights)
        if self._first_hash != extras["first_weights_sha256"]:
            raise changed_weights(self.config.source)
        restore({"model": dict(weights)}, self._adapter)
        self._adapter.load_matrices(extras["lora"])
        self._merge()

    def facts(self) -> dict[str, Any]:
        sizes = {"train_rows": self.batches.num_rows, "valid_records": len(self._valid)}
        return super().facts() | sizes

    def describe_batches(self, step: int) -> list[dict[str, Any]]:
        return [
            {"number": number, "examples": self.batches.rows(number)}
            for number in self.numbers_of_step(step)
        ]
