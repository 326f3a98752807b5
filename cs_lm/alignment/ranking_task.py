"""What the stages that learn from rankings share: settings, data, the order of the batches."""

import itertools
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from cs_lm.alignment.conversations import Template
from cs_lm.alignment.examples import EpochOrder, report_left_out
from cs_lm.alignment.records import Ranking
from cs_lm.alignment.reward_model import RenderedRanking, render_rankings
from cs_lm.alignment.stage import StageConfig, StageTask, hash_of, validate_records
from cs_lm.config.fields import setting
from cs_lm.config.run import RunConfig
from cs_lm.device import World
from cs_lm.errors import Problem, UserError
from cs_lm.tokenizer import BPETokenizer

_log = logging.getLogger("cs_lm")


@dataclass(frozen=True)
class RankingsConfig(StageConfig):
    """Settings of a stage that learns from rankings."""

    data: tuple[str, ...] = setting(
        (), "rankings or preferences: JSON or JSONL files, or patterns; required"
    )
    valid_data: tuple[str, ...] = setting((), "separate ones for validation; same forms as --data")
    valid_fraction: float = setting(
        0.1, "part of --data that is kept for validation without --valid_data", "of prompts"
    )
    batch_size: int = setting(16, "prompts in one forward pass, with all their answers")

    def validate(self) -> list[Problem]:
        return [*super().validate(), *validate_records(self, "rankings")]


class RankingsTask(StageTask):
    """Learns from the rankings `train`; those in `valid` are for validation.

    reads_ends  whether the model reads the last token of a row, and does not only predict it
    """

    reads_ends = False

    def __init__(
        self,
        config: RankingsConfig,
        base: RunConfig,
        tokenizer: BPETokenizer,
        rankings: tuple[Sequence[Ranking], Sequence[Ranking]],
        model: nn.Module,
        world: World,
    ):
        """rankings  those to train on, and those to validate on"""
        super().__init__(config, base, tokenizer, model)
        self.device = world.device
        most = config.max_tokens(base) - self.reads_ends
        flags = ("--data", "--valid_data" if config.valid_data else "--data")
        self.train, self.valid = (
            _rendered(one, self.template, most, flag) for one, flag in zip(rankings, flags)
        )
        num_answers = sum(len(one.places) for one in self.train)
        num_tokens = sum(len(row) for one in self.train for row in one.rows)
        num_pairs, num_ties = map(sum, zip(*(_pairs_and_ties(one.ranks) for one in self.train)))
        _log.info(
            "data: %d rankings of %d answers, %d pairs and %d ties; template %s",
            len(self.train),
            num_answers,
            num_pairs,
            num_ties,
            self.template.name,
        )
        if not num_pairs:
            raise UserError(
                "--data: no answer is better than another one to the same prompt; there is nothing "
                "to learn"
            )
        self.order = EpochOrder(len(self.train), config.batch_size, config.seed)
        self.num_steps = config.num_steps(len(self.train))
        mean = num_tokens / len(self.train)
        self.tokens_per_step = round(mean * config.batch_size * config.grad_accum)
        every = [one for side in rankings for one in side]
        self.data_hash = hash_of([(one.prompt, one.answers, one.ranks) for one in every])

    def facts(self) -> dict[str, Any]:
        sizes = {"train_rankings": len(self.train), "valid_rankings": len(self.valid)}
        return super().facts() | sizes


def _pairs_and_ties(ranks: Sequence[int]) -> tuple[int, int]:
    pairs = list(itertools.combinations(ranks, 2))
    num_ties = sum(one == other for one, other in pairs)
    return len(pairs) - num_ties, num_ties


def _rendered(
    rankings: Sequence[Ranking], template: Template, max_tokens: int, flag: str
) -> list[RenderedRanking]:
    """Those of which all answers fit; the others are counted in a warning.

    Raises: UserError if none fits.
    """
    kept, too_long = render_rankings(rankings, template, max_tokens)
    if too_long:
        report_left_out(
            f"{len(too_long):,} of {len(rankings):,} rankings have an answer that is too long with "
            f"its prompt ({max_tokens} tokens), the first in {too_long[0]}",
            some_are_left=bool(kept),
            flag=flag,
        )
    return kept
