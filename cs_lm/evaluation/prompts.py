"""Prompts for a task: an instruction, demonstrations, the question."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from cs_lm.errors import UserError
from cs_lm.evaluation.tasks import LETTERS, Example


@dataclass(frozen=True)
class PromptFormat:
    """How examples become text.

    template     a solved example; {question} and {answer} stand for its parts
    separator    between the instruction, the demonstrations and the question
    instruction  the first text of a prompt; may be empty
    letters      list the choices behind the question, and answer with their letter
    """

    template: str = "Question: {question}\nAnswer: {answer}"
    separator: str = "\n\n"
    instruction: str = ""
    letters: bool = False

    def __post_init__(self):
        for part in ("{question}", "{answer}"):
            if self.template.count(part) != 1:
                raise UserError(f"--template: got {self.template!r}, need {part} in it, once")
        if self.template.index("{question}") > self.template.index("{answer}"):
            raise UserError(f"--template: got {self.template!r}, need the question first")

    def prepared(self, example: Example) -> Example:
        """The example as it is shown: with `letters`, its choices are letters."""
        if not self.letters or not example.choices:
            return example
        names = tuple(LETTERS[: len(example.choices)])
        if len(names) < len(example.choices):
            raise UserError(
                f"--letters: {example.where} has {len(example.choices)} choices, need at most "
                f"{len(LETTERS)}; leave the flag out"
            )
        listed = "\n".join(f"{name}. {text}" for name, text in zip(names, example.choices))
        return replace(
            example,
            question=f"{example.question}\n{listed}",
            choices=names,
            answer=names[example.choices.index(example.answer)],
        )

    def solved(self, example: Example) -> str:
        """An example with its answer, as a demonstration."""
        before, after = self._around(self.prepared(example))
        return f"{before}{self.prepared(example).answer}{after}"

    def context(self, example: Example) -> str:
        """The text up to the answer, without the space before it."""
        return self._around(self.prepared(example))[0].rstrip(" ")

    def answer(self, text: str) -> str:
        """An answer as it follows `context`: with the space before it, if the template has one."""
        return " " * self.template.partition("{answer}")[0].endswith(" ") + text

    @property
    def answer_context(self) -> str:
        """The last line of a context, which names no question: "Answer:"."""
        before = self.template.partition("{answer}")[0].partition("{question}")[2]
        return before.rpartition("\n")[2].strip(" ") or self.separator.strip(" ") or "\n"

    def _around(self, example: Example) -> tuple[str, str]:
        before, _, after = self.template.partition("{answer}")
        return before.replace("{question}", example.question), after


def demonstrations_for(
    example: Example, index: int, pool: Sequence[Example], num_shots: int, seed: int
) -> list[Example]:
    """`num_shots` examples of the pool, in a random order that follows from (seed, index).

    They are of the example's subject if the pool has examples of it, and never the example itself
    or another one with the same words.
    With fewer than `num_shots`, all of them are taken.
    """

    def is_the_same(one: Example) -> bool:
        return one == example or (bool(one.where) and one.where == example.where)

    others = [one for one in pool if not is_the_same(one)]
    others = [other for other in others if other.subject == example.subject] or others
    return random.Random(f"{seed}:{index}").sample(others, min(num_shots, len(others)))


def build_prompt(
    example: Example,
    demonstrations: Sequence[Example],
    prompt_format: PromptFormat,
    fits: Callable[[str], bool],
) -> tuple[str, int]:
    """The prompt with as many of the demonstrations as fit, and how many these are.

    The first ones are left out first. A question that does not fit alone is given as it is.
    """
    question = prompt_format.context(example)
    head = [prompt_format.instruction] if prompt_format.instruction else []
    solved = [prompt_format.solved(other) for other in demonstrations]
    for first in range(len(solved) + 1):
        prompt = prompt_format.separator.join([*head, *solved[first:], question])
        if first == len(solved) or fits(prompt):
            return prompt, len(solved) - first
    raise AssertionError("the loop returns")
