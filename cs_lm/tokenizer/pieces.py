"""A quick first cut of text into pieces that repeat, so that most of the work is done once.

GPT-2's pattern always cuts in front of a space or newline that stands alone between two words.
So text may be cut there by `str.split`, at several times the speed of any pattern, and what the
pattern makes of a piece may be remembered. Only runs of three and more white-space characters,
where cutting inside would change the result, are taken out first.
"""

import re
from collections.abc import Iterator

from cs_lm.tokenizer.pretokenizer import split_words

# Unicode's White_Space, which `\s` means to the split pattern.
WHITE_SPACE = (
    "\t\n\x0b\x0c\r \x85\xa0\u1680\u2000\u2001\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009"
    "\u200a\u2028\u2029\u202f\u205f\u3000"
)
_LONG_RUN = re.compile(f"([{WHITE_SPACE}][{WHITE_SPACE}][{WHITE_SPACE}]+)")


def words_of_piece(piece: str) -> list[str]:
    """The words of a piece of `cut_pieces`, with the space in front that the cut took away."""
    return split_words(piece if piece.startswith("\n") else f" {piece}")


def cut_pieces(text: str) -> Iterator[tuple[list[str], list[str]]]:
    """(words, pieces) by turns; the words of a text are these words and the words of these pieces.

    In a run of white space in front of a word, the pattern makes all but the last character one
    word; the last one, if a space, belongs to the word behind it. A run at the end of the text is
    one word. Hence a cut before each space and newline is right in runs of one and two.
    """
    parts = _LONG_RUN.split(text)  # text, run, text, run, ..., text
    parts[-1], ending = _without_ending(parts[-1])
    before: list[str] = []  # words in front of the next text
    lead = ""  # the last character of the run in front of it
    for index, part in enumerate(parts):
        if index % 2:
            is_end = index == len(parts) - 2 and not parts[-1]
            before, lead = ([part], "") if is_end else ([part[:-1]], part[-1])
            if lead and lead not in " \n":
                before, lead = [*before, lead], ""
        elif part or before:
            first, *pieces = (lead + part).replace("\n", " \n").split(" ")
            if first:
                before = before + split_words(first)
            yield before, pieces
    if ending:
        yield [ending], []


def _without_ending(text: str) -> tuple[str, str]:
    """The text and the two characters of white space at its end, which are one word."""
    if text[-1:] in " \n" and text[-2:-1] and text[-2] in WHITE_SPACE:
        return text[:-2], text[-2:]
    return text, ""
