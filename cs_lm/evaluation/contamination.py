"""Which examples of a task occur in a training text: overlap of n-grams of words."""

import itertools
import re
from collections.abc import Iterable, Sequence

from cs_lm.evaluation.tasks import Example

NGRAM_WORDS = 13
_WORD = re.compile(r"\w+")


def words_of(text: str) -> list[str]:
    """Lower case, without punctuation."""
    return _WORD.findall(text.casefold())


def ngrams_of(words: Sequence[str], size: int) -> set[tuple[str, ...]]:
    return {tuple(words[i : i + size]) for i in range(len(words) - size + 1)}


def contaminated(
    examples: Sequence[Example], text: Iterable[str], size: int = NGRAM_WORDS
) -> list[bool]:
    """For each example, whether a sequence of `size` of its words stands in the text.

    The words are those of the question, then of the answer. An example with fewer words counts if
    all of them stand in the text in a row. The text comes in blocks, and is read once.
    Source: Brown et al. 2020, appendix C; there, 13 words are the usual size.
    """
    wanted: dict[int, dict[tuple[str, ...], list[int]]] = {}
    for number, example in enumerate(examples):
        words = words_of(f"{example.question} {example.answer}")
        length = min(size, len(words))
        for ngram in ngrams_of(words, length) if words else ():
            wanted.setdefault(length, {}).setdefault(ngram, []).append(number)
    found = [False] * len(examples)
    rest, words = "", []
    for block in itertools.chain(text, [None]):
        # the last word of a block may go on in the next one
        whole = rest + (block or "")
        cut = len(whole) if block is None else _last_border(whole)
        earlier = words[max(0, len(words) - size + 1) :]  # n-grams go on from block to block
        words, rest = earlier + words_of(whole[:cut]), whole[cut:]
        for length, ngrams in wanted.items():
            for i in range(len(words) - length + 1):
                for number in ngrams.get(tuple(words[i : i + length]), ()):
                    found[number] = True
    return found


def _last_border(text: str) -> int:
    """Where the last word begins, if the text may end inside it."""
    end = len(text)
    while end and _WORD.match(text[end - 1]):
        end -= 1
    return end
