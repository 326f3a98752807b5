"""`python -m cs_lm tokenizer-report`: how a tokenizer splits a text, and why."""

import os
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from cs_lm.cli._errors import readable_errors
from cs_lm.config.fields import setting
from cs_lm.config.flags import parse_config
from cs_lm.config.shared import encoding_errors_setting, special_tokens_setting
from cs_lm.errors import Problem
from cs_lm.tokenizer import BPETokenizer
from cs_lm.tokenizer.bpe import merge_steps
from cs_lm.tokenizer.pretokenizer import split_words
from cs_lm.tokenizer.text_source import TextSource

# Dark text on five light backgrounds in turn: neighbouring tokens always differ.
_BACKGROUNDS = (153, 157, 223, 217, 189)


@dataclass(frozen=True)
class ReportConfig:
    vocab_path: str = setting("vocab.json", "the tokenizer's vocabulary")
    merges_path: str = setting("merges.txt", "the tokenizer's merges")
    special_tokens: tuple[str, ...] = special_tokens_setting()
    text_path: str | None = setting(None, "UTF-8 text to cut, or - for standard input")
    word: str | None = setting(None, "text whose merges are shown step by step")
    num_tokens: int = setting(20, "length of each list of tokens")
    view_chars: int = setting(600, "length of the coloured view", "characters")
    color: str = setting(
        "auto",
        "auto: on a terminal; else tokens stand between bars",
        choices=("auto", "always", "never"),
    )
    encoding_errors: str = encoding_errors_setting()

    def validate(self) -> list[Problem]:
        found = []
        for name in ("num_tokens", "view_chars"):
            if getattr(self, name) < 1:
                found.append(Problem(f"--{name}", f"got {getattr(self, name)}", "1 or more"))
        if self.word == "":
            found.append(Problem("--word", "got an empty text", "at least one character"))
        return found


@readable_errors
def main(argv: Sequence[str] | None = None) -> int:
    config = parse_config(ReportConfig, "python -m cs_lm tokenizer-report", __doc__, argv)
    tokenizer = BPETokenizer.from_files(
        config.vocab_path, config.merges_path, config.special_tokens
    )
    print(
        f"vocabulary      {tokenizer.vocab_size:,} tokens, {len(tokenizer.merges):,} merges, "
        f"fingerprint {tokenizer.fingerprint[:16]}"
    )
    longest = sorted(tokenizer.vocab.values(), key=lambda token: (-len(token), token))
    print(f"longest tokens  {_listed(longest[: config.num_tokens])}")
    if config.text_path is not None:
        _report_text(tokenizer, config)
    if config.word is not None:
        _trace(tokenizer, config.word)
    return 0


def _report_text(tokenizer: BPETokenizer, config: ReportConfig) -> None:
    source = TextSource(config.text_path, config.encoding_errors)
    counts = np.zeros(tokenizer.vocab_size, np.int64)
    beginning = ""

    def with_beginning():
        nonlocal beginning
        for text in source.read():
            beginning += text[: max(0, config.view_chars - len(beginning))]
            yield text

    for ids in tokenizer.encode_blocks(with_beginning()):
        counts += np.bincount(ids, minlength=tokenizer.vocab_size)
    lengths = np.array([len(tokenizer.vocab.get(i, b"")) for i in range(len(counts))])
    num_tokens, num_bytes = int(counts.sum()), int((counts * lengths).sum())
    used = int((counts > 0).sum())
    print(f"text            {num_bytes:,} bytes, {num_tokens:,} tokens")
    print(f"bytes per token {num_bytes / num_tokens:.3f}")
    print(f"vocabulary use  {used:,} of {len(counts):,} tokens ({100 * used / len(counts):.1f} %)")
    most = Counter(dict(enumerate(counts.tolist()))).most_common(config.num_tokens)
    print(f"most frequent   {_listed([tokenizer.vocab[i] for i, count in most if count])}")
    print(f"\n{_cut_view(tokenizer, beginning, config.color)}")


def _cut_view(tokenizer: BPETokenizer, text: str, color: str) -> str:
    """The text with its tokens marked; bytes of a split character show as U+FFFD."""
    tokens = [tokenizer.decode([i]) for i in tokenizer.encode(text)]
    wanted = color == "always" or (color == "auto" and sys.stdout.isatty())
    if not wanted or (color == "auto" and os.environ.get("NO_COLOR")):
        return "|".join(tokens)
    painted = []
    for index, token in enumerate(tokens):
        background = f"\x1b[38;5;16;48;5;{_BACKGROUNDS[index % len(_BACKGROUNDS)]}m"
        # end the colour before a newline: otherwise it fills the rest of the line
        lines = token.replace("\n", "↵\n").split("\n")
        painted.append("\n".join(f"{background}{line}\x1b[0m" if line else "" for line in lines))
    return "".join(painted)


def _trace(tokenizer: BPETokenizer, text: str) -> None:
    ranks = {pair: rank for rank, pair in reversed(list(enumerate(tokenizer.merges)))}
    for word in split_words(text):
        print(f"\nmerges of {word!r}")
        for pair, tokens in merge_steps(word.encode("utf-8"), ranks):
            why = "bytes" if pair is None else f"merge {ranks[pair]:,}"
            print(f"  {why:>14}  {_listed(tokens)}")
        print(f"  {'ids':>14}  {' '.join(str(tokenizer.id_of[token]) for token in tokens)}")


def _listed(tokens: Sequence[bytes]) -> str:
    return " ".join(repr(token.decode("utf-8", "replace")) for token in tokens)
