"""Pre-training text in the updates of a stage, so that the model does not forget it.

    gradient of an update = that of the stage's mean loss of a token
                            + weight * that of the mean surprise of a token of text

Source: Ouyang et al. 2022, section 3.5, where PPO with it is called PPO-ptx.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cs_lm.alignment.stage import StageConfig
from cs_lm.config.fields import setting
from cs_lm.config.run import RunConfig
from cs_lm.data.batches import Batch, BatchSource
from cs_lm.data.pipeline import PreparedData
from cs_lm.device import World
from cs_lm.errors import Problem, UserError, no_effect_without
from cs_lm.evaluation.perplexity import EvalOptions, evaluate, token_byte_lengths
from cs_lm.models.base import LanguageModel, next_token_loss
from cs_lm.tokenizer import BPETokenizer
from cs_lm.training.task import CheckStop


@dataclass(frozen=True)
class TextMixConfig(StageConfig):
    """Settings of a stage that can mix in text."""

    pretraining_mix: float = setting(
        0.0, "windows of text for each conversation of an update; 0: no text", minimum=0
    )
    pretraining_path: tuple[str, ...] = setting(
        (), "text to mix in and to validate on; default: what the model was trained on"
    )
    pretraining_weight: float = setting(
        1.0,
        "weight of the mean loss of a token of the text beside that of a token of the answers",
        flag="--ptx_coef",
        minimum=0,
    )

    eval_tokens: int = setting(20_000, "text in each evaluation of it", "tokens")

    def validate(self) -> list[Problem]:
        found = super().validate()
        for flag, name in (
            ("--pretraining_path", "pretraining_path"),
            ("--ptx_coef", "pretraining_weight"),
            ("--eval_tokens", "eval_tokens"),
        ):
            is_given = getattr(self, name) != getattr(TextMixConfig, name)
            if is_given and not self.pretraining_mix:
                found.append(no_effect_without(flag, "--pretraining_mix"))
        return found


class TextBatch(NamedTuple):
    """Windows of text; `scale` makes their summed loss comparable with that of the answers."""

    inputs: Tensor
    targets: Tensor
    scale: float


class TextMix:
    """The windows of text of each update, and how well a model knows text that is kept apart."""

    def __init__(
        self,
        text: PreparedData,
        config: TextMixConfig,
        run_config: RunConfig,
        tokenizer: BPETokenizer,
        world: World,
    ):
        length = run_config.seq_length
        rows = config.batch_size * config.grad_accum
        if config.pretraining_mix * rows < 0.5:
            what = f"got {config.pretraining_mix}, less than half a window of text an update"
            raise UserError(Problem("--pretraining_mix", what, f"at least {0.5 / rows:.3g}"))
        count = max(1, round(config.pretraining_mix * rows))
        self._windows = BatchSource(text.train, count, length, config.seed, "random", world)
        self._valid, self._weight = text.valid, config.pretraining_weight
        self._options = EvalOptions(length, config.batch_size, config.eval_tokens)
        self._byte_lengths = token_byte_lengths(tokenizer.vocab)
        self.tokens_per_step = count * length

    def batch(self, step: int, num_targets: int) -> TextBatch:
        """num_targets  what the summed loss of the update is divided by"""
        windows: Batch = self._windows(step)
        return TextBatch(*windows, self._weight * num_targets / windows.targets.numel())

    def bits_per_byte(self, model: LanguageModel, check_stop: CheckStop) -> float:
        found = evaluate(model, self._valid, self._byte_lengths, self._options, on_batch=check_stop)
        return found.bits_per_byte


def text_loss(model: LanguageModel, batch: TextBatch) -> tuple[Tensor, Tensor]:
    """The scaled surprise; it counts no tokens, because the update divides by the answers'."""
    total, count = next_token_loss(model, batch)
    return batch.scale * total, torch.zeros_like(count)


def described(found: dict[str, Any]) -> str:
    """The part of an evaluation's line that is about the text."""
    if "text_bits_per_byte" not in found:
        return ""
    return f" | text {found['text_bits_per_byte']:.4f} bits/byte"
