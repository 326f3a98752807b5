"""A task on which the whole way from a text model to an aligned one can be measured.

    upper cat -> CAT     double cat -> catcat     first cat -> c     reverse cat -> tac

Demonstrations answer rightly in one of three styles at random; people, whom `label` stands for,
like one style best. So what nobody knows of real people is known here: what is really better
(`gold`), how often labelers err, and how far a reward model is from both.
"""

import hashlib
import json
import math
import random
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

from cs_lm.storage.atomic import atomic_write

TASKS: dict[str, Callable[[str], str]] = {
    "upper": str.upper,
    "double": lambda word: word + word,
    "first": lambda word: word[0],
    "reverse": lambda word: word[::-1],
}
STYLES = ("{}", "it is {}.", "sure! {}")  # from the least liked to the most liked one
_LIKED = len(STYLES) - 1
NOISE = 0.5  # scale of the labelers' Gumbel noise
NUM_TEST_WORDS = 300


class Words(NamedTuple):
    """Words to train on, and those of the test, which are in no training prompt."""

    train: list[str]
    test: list[str]


def words_of(text: str, seed: int) -> Words:
    """Each different word of 3 to 6 letters of the text, in a random order."""
    words = sorted(set(re.findall(r"[a-z]{3,6}", text.lower())))
    random.Random(seed).shuffle(words)
    return Words(words[NUM_TEST_WORDS:], words[:NUM_TEST_WORDS])


def answer_to(prompt: str) -> str:
    """The right answer, without a style."""
    task, word = prompt.split()
    return TASKS[task](word)


def prompts_for(words: Iterable[str], seed: int) -> list[dict[str, str]]:
    """One prompt for each word, with the right answer."""
    rng, names = random.Random(seed), list(TASKS)
    found = []
    for word in words:
        task = rng.choice(names)
        prompt = f"{task} {word}"
        found.append({"prompt": prompt, "answer": answer_to(prompt)})
    return found


def demonstrations_for(words: list[str], count: int, seed: int) -> list[dict[str, str]]:
    """Right answers to prompts about random words, in random styles."""
    rng = random.Random(seed)
    prompts = prompts_for(rng.choices(words, k=count), seed)
    return [
        {"prompt": one["prompt"], "response": rng.choice(STYLES).format(one["answer"])}
        for one in prompts
    ]


def write_records(path: Path, records: Iterable[dict[str, Any]]) -> None:
    lines = "".join(json.dumps(record) + "\n" for record in records)
    atomic_write(path, lines.encode("utf-8"))


# ---- rules, for --rule cs_lm.alignment.words:gold ----


def style_of(answer: str, wanted: str) -> int | None:
    """The number of the style in which the answer is right, or None."""
    return next((n for n, style in enumerate(STYLES) if answer == style.format(wanted)), None)


def shown_style(answer: str) -> int:
    """The number of the style that the answer has, right or wrong."""
    if answer.startswith("sure! "):
        return 2
    return 1 if answer.startswith("it is ") and answer.endswith(".") else 0


def right(answer: str, fields: dict[str, Any]) -> float:
    return float(style_of(answer, fields["answer"]) is not None)


def liked(answer: str, fields: dict[str, Any]) -> float:
    """Whether the answer has the style that is liked best."""
    return float(shown_style(answer) == _LIKED)


def gold(answer: str, fields: dict[str, Any]) -> float:
    """2 if right, 0.5 for each step of style, -0.01 a character, -1 without an end."""
    score = 2 * right(answer, fields) + 0.5 * shown_style(answer) - 0.01 * len(answer)
    return score if fields["ended"] else score - 1


def label(answer: str, fields: dict[str, Any]) -> float:
    """What a labeler thinks of an answer: `gold` and Gumbel noise, which answer and prompt fix."""
    digest = hashlib.sha256(f"{fields['prompt']}\n{answer}".encode()).digest()
    share = (int.from_bytes(digest[:8], "big") + 0.5) / 2**64
    return gold(answer, fields) - NOISE * math.log(-math.log(share))
