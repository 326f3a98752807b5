"""In-context evaluation: a model answers the questions of a task after demonstrations."""

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from cs_lm.errors import UserError
from cs_lm.evaluation.intervals import bootstrap_interval, wilson_interval
from cs_lm.evaluation.likelihood import Likelihood, likelihoods, token_pair
from cs_lm.evaluation.prompts import PromptFormat, build_prompt, demonstrations_for
from cs_lm.evaluation.tasks import Example, last_number, normalised
from cs_lm.inference.decoding_config import DecodingConfig
from cs_lm.inference.text import generate_text
from cs_lm.models.base import LanguageModel

SCORINGS = ("sum", "per_token", "answer_only")
GENERATED = ("exact_match", "last_number")
MAX_NEW_TOKENS = 64


@dataclass(frozen=True)
class InContextOptions:
    """How a task is posed and scored.

    kind            one of `tasks.KINDS`
    scoring         one of SCORINGS: how a choice's log-probability counts
    seed            of the demonstrations
    max_new_tokens  of a generated answer, which ends where the next example would begin
    """

    kind: str
    prompt_format: PromptFormat
    scoring: str = "sum"
    seed: int = 0
    max_new_tokens: int = MAX_NEW_TOKENS

    @property
    def is_generated(self) -> bool:
        """Whether the model writes the answers; else it scores given ones."""
        return self.kind in GENERATED


class Question(NamedTuple):
    """An example as the model gets it.

    num_shots  the demonstrations that fitted
    is_cut     with an answer it does not fit the context, even without them: the model does not see
               its beginning
    """

    example: Example
    prompt: str
    num_shots: int
    is_cut: bool


class Answered(NamedTuple):
    """One question, answered.

    given   the answer of the model
    scores  of each choice, or of the right answer alone [nats]; empty for generated answers
    """

    question: Question
    given: str
    is_correct: bool
    scores: list[float]

    @property
    def example(self) -> Example:
        return self.question.example


def pose(
    tokenizer: Any,
    context_length: int,
    examples: Sequence[Example],
    pool: Sequence[Example],
    num_shots: int,
    options: InContextOptions,
) -> list[Question]:
    """The examples after `num_shots` demonstrations of the pool each, or as many as fit.

    Raises: UserError for an answer that is longer than the context, or for no pool.
    """
    if num_shots and not pool:
        raise UserError("--num_shots: needs --demonstrations_path, files with solved examples")
    shown, questions = options.prompt_format, []
    for index, example in enumerate(examples):
        room = _room(tokenizer, context_length, example, options)

        def fits(prompt: str, room: int = room) -> bool:
            return len(tokenizer.encode(prompt)) + room <= context_length

        chosen = demonstrations_for(example, index, pool, num_shots, options.seed)
        prompt, used = build_prompt(example, chosen, shown, fits)
        questions.append(Question(example, prompt, used, not used and not fits(prompt)))
    return questions


def _room(tokenizer: Any, context_length: int, example: Example, options: InContextOptions) -> int:
    """Tokens of the longest answer. Raises: UserError if the context cannot hold a given one."""
    if options.is_generated:
        return options.max_new_tokens
    shown = options.prompt_format
    answers = _answers(shown.prepared(example), options.kind)
    room = max(len(tokenizer.encode(shown.answer(answer))) for answer in answers)
    if room > context_length:
        raise UserError(
            f"{example.where}: an answer has {room} tokens, need at most {context_length}, the "
            "model's context; leave the question out"
        )
    return room


def answer_all(
    model: LanguageModel,
    tokenizer: Any,
    questions: Sequence[Question],
    options: InContextOptions,
    on_progress: Callable[[int], None] = lambda done: None,
) -> list[Answered]:
    """The model's answers.

    Multiple choice: the choice with the highest score. With log-probabilities of its tokens given
    the prompt, that is their sum; per token, their mean; answer_only, the sum minus the sum given
    the format's `answer_context` alone, so that an answer that is likely anywhere gains nothing.
    Completion: correct if each token of the answer is the most likely one. Exact match and last
    number: of the greedy text, up to a stop text.
    """
    answer = _generated if options.is_generated else _scored
    given = answer(model, tokenizer, questions, options, on_progress)
    return [Answered(one, *of_model) for one, of_model in zip(questions, given, strict=True)]


def _answers(example: Example, kind: str) -> tuple[str, ...]:
    """The answers to score."""
    return example.choices if kind == "multiple_choice" else (example.answer,)


def _scored(model, tokenizer, questions, options, on_progress):
    shown = options.prompt_format
    answers_of = [_answers(shown.prepared(one.example), options.kind) for one in questions]
    pairs = [
        token_pair(tokenizer.encode, one.prompt, shown.answer(answer))
        for answers, one in zip(answers_of, questions, strict=True)
        for answer in answers
    ]
    found = likelihoods(model, pairs, lambda done: on_progress(done * len(questions) // len(pairs)))
    scores = [_score(one, options.scoring) for one in found]
    if options.scoring == "answer_only":
        alone = [
            token_pair(tokenizer.encode, shown.answer_context, shown.answer(answer))
            for answers in answers_of
            for answer in answers
        ]
        unique = sorted({(tuple(a), tuple(b)) for a, b in alone})
        known = dict(zip(unique, likelihoods(model, unique)))
        scores = [score - known[tuple(a), tuple(b)].logprob for score, (a, b) in zip(scores, alone)]
    first = 0
    for (example, *_), answers in zip(questions, answers_of, strict=True):
        own = slice(first, first + len(answers))
        first += len(answers)
        if options.kind == "completion":
            is_greedy = found[own][0].is_greedy
            yield example.answer if is_greedy else "", is_greedy, scores[own]
        else:
            best = max(range(len(answers)), key=scores[own].__getitem__)
            given = example.choices[best]
            yield given, given == example.answer, scores[own]


def _score(found: Likelihood, scoring: str) -> float:
    return found.logprob / found.num_tokens if scoring == "per_token" else found.logprob


def _generated(model, tokenizer, questions, options, on_progress):
    separator = options.prompt_format.separator
    config = DecodingConfig(
        max_new_tokens=options.max_new_tokens,
        temperature=0.0,
        stop=(separator,) if separator else (),
    )
    batch_size = 8
    for first in range(0, len(questions), batch_size):
        batch = questions[first : first + batch_size]
        texts = generate_text(model, tokenizer, [one.prompt for one in batch], config)
        for (example, *_), text in zip(batch, texts, strict=True):
            if options.kind == "last_number":
                wanted = last_number(example.answer)
                is_correct = wanted is not None and last_number(text) == wanted
            else:
                is_correct = normalised(text) == normalised(example.answer)
            yield text.strip(), is_correct, []
        on_progress(first + len(batch))


class Accuracy(NamedTuple):
    """A share of right answers, with the bounds of its 95% interval (Wilson)."""

    num_correct: int
    num_examples: int

    @property
    def share(self) -> float:
        return self.num_correct / max(1, self.num_examples)

    @property
    def interval(self) -> tuple[float, float]:
        return wilson_interval(self.num_correct, self.num_examples)


def accuracy(answered: Sequence[Answered]) -> Accuracy:
    return Accuracy(sum(one.is_correct for one in answered), len(answered))


def accuracy_by_subject(answered: Sequence[Answered]) -> dict[str, Accuracy]:
    groups: dict[str, list[Answered]] = defaultdict(list)
    for one in answered:
        groups[one.example.subject].append(one)
    return {subject: accuracy(group) for subject, group in sorted(groups.items())}


def mean_logprob(answered: Sequence[Answered]) -> tuple[float, float, float]:
    """Mean log-probability of the right answers [nats], with bounds (bootstrap).

    For tasks whose answers have scores.
    """
    values = []
    for one in answered:
        is_chosen = len(one.scores) > 1
        values.append(one.scores[one.example.choices.index(one.example.answer) if is_chosen else 0])
    return sum(values) / len(values), *bootstrap_interval(values)
