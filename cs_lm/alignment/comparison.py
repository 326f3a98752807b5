"""Compares models by their answers to the same prompts."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from cs_lm.alignment.answers import Answer, ContextFullError
from cs_lm.alignment.conversations import template_of
from cs_lm.alignment.records import Prompt
from cs_lm.alignment.rollouts import (
    Rollouts,
    decoded,
    distance,
    distinct_ngrams,
    draw_answers,
    longest_row,
)
from cs_lm.data.batches import step_seed
from cs_lm.evaluation.intervals import wilson_interval
from cs_lm.inference.sampling import uniform_draws
from cs_lm.models.base import LanguageModel
from cs_lm.training.run_dir import TrainedModel

_ROWS = 64  # answers that are drawn together


class DrawingOptions(NamedTuple):
    """How answers are drawn.

    judge_reads  most tokens that a reward model can read; None: none scores the answers
    """

    max_new_tokens: int = 64
    temperature: float = 1.0
    seed: int = 0
    judge_reads: int | None = None


class DrawnAnswers(NamedTuple):
    """The answers of one model, in the order of the prompts.

    kl  mean exact divergence of an answer from another model [nats]; None: not asked for
    """

    answers: list[Answer]
    kl: float | None

    @property
    def texts(self) -> list[str]:
        return [one.text for one in self.answers]


def check_room(prompt: Prompt, num_tokens: int, max_new_tokens: int, longest: int) -> None:
    """num_tokens  of the prompt; longest  a prompt and its answer together may be

    Raises: ContextFullError for a prompt that leaves too little room for an answer.
    """
    if num_tokens + max_new_tokens > longest:
        raise ContextFullError(
            f"{prompt.where}: got {num_tokens} tokens with the template, and {max_new_tokens} of "
            f"--max_new_tokens; need at most {longest} together, as the contexts of the models "
            "allow; lower --max_new_tokens, or leave the prompt out"
        )


def answer_prompts(
    trained: TrainedModel,
    prompts: Sequence[Prompt],
    options: DrawingOptions,
    reference: LanguageModel | None = None,
    on_progress: Callable[[int], None] = lambda done: None,
) -> DrawnAnswers:
    """One answer to each prompt. The draws follow from the seed and the number of the prompt.

    reference    a model with the same tokenizer; the divergence from it is computed
    on_progress  called with the number of prompts that are answered
    Raises: ContextFullError for a prompt that leaves no room for an answer.
    """
    template = template_of(trained.tokenizer, trained.template or "auto")
    longest = longest_row(trained.config.model.context_length, options.judge_reads)
    rows = [template.render_for_completion(one.conversation) for one in prompts]
    for row, prompt in zip(rows, prompts):
        check_room(prompt, len(row), options.max_new_tokens, longest)
    answers: list[Answer] = []
    total = 0.0
    for number, start in enumerate(range(0, len(rows), _ROWS)):
        part = rows[start : start + _ROWS]
        seed = step_seed(options.seed, number)
        uniform = uniform_draws(seed, range(len(part)), options.max_new_tokens)
        drawn = draw_answers(trained.model, part, template.end_id, uniform, options.temperature)
        if reference is not None:
            found = distance(trained.model, reference, drawn, options.temperature)
            total += found.kl.sum().item()
        answers += answers_of(drawn, trained.tokenizer, template.end_id)
        on_progress(len(answers))
    return DrawnAnswers(answers, None if reference is None else total / len(rows))


def answers_of(drawn: Rollouts, tokenizer: Any, end_id: int) -> list[Answer]:
    """The answers of rollouts, with their texts."""
    return [
        Answer(decoded(tokenizer, ids), ended, tuple(ids))
        for ids, ended in zip(drawn.answers(end_id), drawn.ended.tolist())
    ]


class WinRate(NamedTuple):
    """How often one model's answer is better than another's; a tie counts half.

    interval  95 % (Wilson)
    """

    share: float
    interval: tuple[float, float]


def win_rate(scores: Sequence[float], others: Sequence[float]) -> WinRate:
    """Of the first model, from the scores of both to the same prompts."""
    wins = sum(score > other for score, other in zip(scores, others, strict=True))
    ties = sum(score == other for score, other in zip(scores, others))
    points = wins + ties / 2
    return WinRate(points / len(scores), wilson_interval(points, len(scores)))


class Standing(NamedTuple):
    """One model in a comparison. wins: against the first model; None: it is the first."""

    name: str
    score: float
    wins: WinRate | None
    length: float
    ended: float
    distinct_4: float | None
    kl: float | None


def standings(
    names: Sequence[str], answers: Sequence[DrawnAnswers], scores: Sequence[Sequence[float]]
) -> list[Standing]:
    """scores  of each model, those of its first answers"""
    found = []
    for name, own, its_scores in zip(names, answers, scores, strict=True):
        count = len(its_scores)
        judged = own.answers[:count]
        found.append(
            Standing(
                name,
                sum(its_scores) / count,
                win_rate(its_scores, scores[0]) if found else None,
                sum(len(one.token_ids) for one in judged) / count,
                sum(one.ended for one in judged) / count,
                distinct_ngrams([one.token_ids for one in judged]),
                own.kl,
            )
        )
    return found
