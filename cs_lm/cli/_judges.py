"""Who scores answers: a rule, a reward model, or a person on the terminal."""

import random
import sys
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from cs_lm.alignment.answers import Answer, row_of
from cs_lm.alignment.conversations import Conversation
from cs_lm.alignment.records import Prompt
from cs_lm.alignment.reward_model import score_rows
from cs_lm.alignment.reward_training import load_reward_model
from cs_lm.alignment.rules import rule_of, score_by_rule
from cs_lm.errors import UserError
from cs_lm.training.run_dir import RunFolder

PERSON = "a person"


class Judge(NamedTuple):
    """Who scores answers.

    score  (prompt, answers) -> a score for each
    reads  most tokens of a prompt and its answer that it can read; None: any number
    name   the rule's, the reward model's folder, or `PERSON`
    """

    score: Callable[[Prompt, Sequence[Answer]], list[float]]
    reads: int | None = None
    is_person: bool = False
    name: str = ""


class JudgeStopped(UserError):
    """A person has had enough."""


def judge_of(rule: str | None, reward: str | None, device: torch.device) -> Judge:
    """A rule by its name, a reward model by its folder, or a person.

    Raises: UserError if neither is named and nobody can be asked.
    """
    if rule is not None:
        call = rule_of(rule)
        return Judge(
            lambda prompt, answers: [
                score_by_rule(call, one.text, prompt, one.ended) for one in answers
            ],
            name=rule,
        )
    if reward is not None:
        model = load_reward_model(RunFolder(reward, "--reward"), "best", device)

        def by_model(prompt: Prompt, answers: Sequence[Answer]) -> list[float]:
            rows = [row_of(model.template, prompt.conversation, one) for one in answers]
            return score_rows(model.model, rows, device).tolist()

        return Judge(by_model, model.model.trunk.config.context_length, name=reward)
    if not sys.stdin.isatty():
        raise UserError("--rule: is missing: give it or --reward, or judge yourself on a terminal")
    return Judge(_asked, is_person=True, name=PERSON)


def scores_of(judge: Judge, prompt: Prompt, answers: Sequence[Answer], seed: str) -> list[float]:
    """A score for each answer. Equal answers are judged once; the seed draws their order."""
    different = sorted(set(answers))
    if len(different) == 1 and judge.is_person:
        return [0.0] * len(answers)  # nothing to ask
    random.Random(seed).shuffle(different)
    scores = dict(zip(different, judge.score(prompt, different)))
    return [scores[one] for one in answers]


def shown(conversation: Conversation) -> str:
    """The conversation as a person reads it."""
    texts = [f"{one.content}\n{one.context}" if one.context else one.content
             for one in conversation]  # fmt: skip
    if len(texts) == 1:
        return texts[0]
    return "\n".join(f"{one.role}: {text}" for one, text in zip(conversation, texts))


def _asked(prompt: Prompt, answers: Sequence[Answer]) -> list[float]:
    """Scores from a person: the numbers of the answers, best first; = ties two of them."""
    print(f"\n{shown(prompt.conversation)}")
    for number, answer in enumerate(answers, start=1):
        print(f"  {number}  {answer.text}")
    while True:
        try:
            line = input("best first, such as 2 1=3 (q ends): ")
        except EOFError:
            line = "q"
        if line.strip().lower() in ("q", "quit", "exit"):
            raise JudgeStopped("ended by you; what was judged until now is kept")
        groups = [group.split("=") for group in line.split()]
        numbers = [number for group in groups for number in group]
        if sorted(numbers) == sorted(map(str, range(1, len(answers) + 1))):
            scores = {n: -float(rank) for rank, group in enumerate(groups) for n in group}
            return [scores[str(number)] for number in range(1, len(answers) + 1)]
        print(
            f"need each of 1 to {len(answers)} once, with spaces between, or = between equal ones",
            file=sys.stderr,
        )
