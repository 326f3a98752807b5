"""The pre-tokenizer: cuts text at special tokens, into GPT-2's words, and into safe blocks.

Byte-pair merges never cross these borders, so that words can be counted and encoded one by one.
"""

from collections.abc import Iterable, Iterator, Sequence
from itertools import chain

import regex

from cs_lm.errors import UserError

# The split pattern published with GPT-2: English contractions, then runs of letters, of digits or
# of other signs, each with at most one leading space. Before a word, white space ends one character
# early: a space there belongs to the word.
SPLIT_PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
_WORDS = regex.compile(SPLIT_PATTERN)

# Between these two characters the pattern always cuts, whatever text is around them: the character
# class changes, and neither a leading space nor a contraction can cross the border.
# Half of a surrogate pair may be half of a letter: there is no sure border beside it.
# (?r) searches backwards, so that the search finds the last such border.
_HALF = r"\uD800-\uDFFF"
_SURE_BORDER = (
    rf"(?<=\p{{L}})[^\p{{L}}{_HALF}]|(?<=\p{{N}})[^\p{{N}}{_HALF}]"
    rf"|(?<=[^\s\p{{L}}\p{{N}}'{_HALF}])[\s\p{{L}}\p{{N}}]|(?<=')[\s\p{{N}}]"
)
_FIRST_SURE_BORDER = regex.compile(_SURE_BORDER)
_LAST_SURE_BORDER = regex.compile(rf"(?r){_SURE_BORDER}")

# Text of one class has no such border. These find that out fifty times faster than the search.
_RUNS = [regex.compile(kind + "*+") for kind in (r"\p{L}", r"\p{N}", r"[^\s\p{L}\p{N}]")]


def split_words(text: str) -> list[str]:
    """The words of a text without special tokens; joined, they are the text again."""
    return _WORDS.findall(text)


def without_surrogates(text: str) -> str:
    """The text with surrogate pairs as their character, lone ones as U+FFFD, like tiktoken."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


class SpecialTokenSplitter:
    """Cuts text at special tokens; where several fit at one place, the longest wins.

    Raises: UserError for an empty special token.
    """

    def __init__(self, special_tokens: Sequence[str] = ()):
        if any(not token for token in special_tokens):
            raise UserError("special_tokens: got an empty string; need at least one character")
        self._tokens = sorted(set(special_tokens), key=len, reverse=True)
        self._pattern = None
        if self._tokens:
            self._pattern = regex.compile("(" + "|".join(map(regex.escape, self._tokens)) + ")")

    def split(self, text: str) -> list[str]:
        """The parts of the text: ordinary text at even indices, special tokens at odd ones."""
        return self._pattern.split(text) if self._pattern else [text]

    def watched(self, parts: Iterable[str]) -> Iterator[str]:
        """The same parts. Raises: UserError for a special token in them, also across two parts."""
        longest = len(self._tokens[0]) if self._tokens else 1
        before = ""
        for part in parts:
            seen = before + part
            if self._pattern and (match := self._pattern.search(seen)):
                raise UserError(
                    f"encode: the text holds the special token {match[0]!r}, which is not allowed "
                    "here; pass it in allowed_special to encode it as one, or leave it out of "
                    "disallowed_special to encode its letters"
                )
            before = seen[max(0, len(seen) - longest + 1) :]
            yield part

    def safe_cut(self, text: str, seen: int = 0) -> int:
        """A position before which the encoding is final, whatever text follows.

        `encode(text[:cut]) + encode(text[cut:] + more) == encode(text + more)` for every `more`.

        seen  number of characters at the beginning that an earlier search found without a cut
        """
        undecided = self._start_of_possible_special(text)
        tail_start = 0
        if self._pattern:
            for match in self._pattern.finditer(text, seen):
                if match.start() >= undecided:
                    break
                tail_start = match.end()
        start = max(tail_start, seen)
        if any(run.fullmatch(text, max(tail_start, seen - 1), undecided) for run in _RUNS):
            return tail_start
        border = _LAST_SURE_BORDER.search(text, start, max(undecided, start))
        return border.start() if border else tail_start

    def first_border(self, parts: Iterable[str]) -> int:
        """The first position at which a text may be cut, whatever stands before and after it.

        No special token crosses it, even one that began before the text. Without such a position,
        the length of the text.
        """
        longest = len(self._tokens[0]) if self._tokens else 1
        text, start = "", longest
        for part in chain(parts, [None]):
            text += part or ""
            end = len(text) if part is None else max(start, len(text) - longest)
            for border in _FIRST_SURE_BORDER.finditer(text, min(start, len(text)), end):
                if not self._is_crossed(text, border.start(), longest):
                    return border.start()
            start = max(start, end)
        return len(text)

    def _is_crossed(self, text: str, at: int, longest: int) -> bool:
        """Whether a special token stands on both sides of the position, however tokens are cut."""
        around, before = text[max(0, at - longest + 1) : at + longest - 1], min(at, longest - 1)
        found = regex.finditer("|".join(map(regex.escape, self._tokens)), around, overlapped=True)
        return bool(self._tokens) and any(m.start() < before < m.end() for m in found)

    def _start_of_possible_special(self, text: str) -> int:
        """The offset where an unfinished special token may begin; len(text) if there is none."""
        if not self._tokens:
            return len(text)
        for start in range(max(0, len(text) - len(self._tokens[0]) + 1), len(text)):
            ending = text[start:]
            if any(len(t) > len(ending) and t.startswith(ending) for t in self._tokens):
                return start
        return len(text)

    def safe_blocks(self, parts: Iterable[str], block_chars: int) -> Iterator[str]:
        """The same text in blocks that can be encoded one by one, cut only where it is safe.

        Cost: about `block_chars` characters in memory. A longer stretch without a safe border
        (one giant word) is held completely. It is joined only when it has doubled, and each
        character is searched once.
        """
        held: list[str] = []
        held_chars, threshold, seen = 0, block_chars, 0
        undecided_chars = len(self._tokens[0]) if self._tokens else 1
        for part in parts:
            for piece in (part,) if len(part) <= block_chars else _pieces(part, block_chars):
                held.append(piece)
                held_chars += len(piece)
                if held_chars < threshold:
                    continue
                text = "".join(held)
                held.clear()
                cut = self.safe_cut(text, seen)
                block, held = text[:cut], [text[cut:]]
                held_chars = len(held[0])
                seen = max(0, held_chars - undecided_chars)
                threshold = max(block_chars, 2 * held_chars)
                del text
                if block:
                    yield block
        if held_chars:
            yield "".join(held)


def _pieces(text: str, size: int) -> Iterable[str]:
    return (text[start : start + size] for start in range(0, len(text), size))
