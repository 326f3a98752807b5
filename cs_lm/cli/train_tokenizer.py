"""`python -m cs_lm train-tokenizer`: learns vocab.json and merges.txt from a text."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cs_lm.cli._errors import readable_errors
from cs_lm.cli._outputs import is_an_input, unwritable
from cs_lm.cli._progress import ProgressLine
from cs_lm.config.fields import setting
from cs_lm.config.flags import parse_config
from cs_lm.config.shared import (
    corpora_setting,
    document_separator_setting,
    encoding_errors_setting,
    special_tokens_setting,
    text_field_setting,
)
from cs_lm.data.corpus import text_of
from cs_lm.errors import Problem, UserError
from cs_lm.storage.lock import writing_alone
from cs_lm.tokenizer import BPETokenizer, train_bpe

_SHOWN_BYTES = 40


@dataclass(frozen=True)
class TrainTokenizerConfig:
    corpus_path: tuple[str, ...] = corpora_setting("text to learn from")
    vocab_size: int = setting(32000, "tokens, bytes and special tokens included")
    vocab_path: str = setting("vocab.json", "where the vocabulary goes")
    merges_path: str = setting("merges.txt", "where the merges go")
    special_tokens: tuple[str, ...] = special_tokens_setting()
    num_workers: int | None = setting(None, "processes; default: all cores for a large text")
    encoding_errors: str = encoding_errors_setting()
    text_field: str = text_field_setting()
    document_separator: str | None = document_separator_setting()
    overwrite: bool = setting(False, "replace existing files")

    def validate(self) -> list[Problem]:
        found = []
        if not self.corpus_path:
            found.append(Problem("--corpus_path", "is missing", fix="name a UTF-8 text file, or -"))
        if self.vocab_size < 1:  # the real minimum depends on the special tokens
            found.append(Problem("--vocab_size", f"got {self.vocab_size}", "1 or more"))
        if self.num_workers is not None and self.num_workers < 1:
            found.append(Problem("--num_workers", f"got {self.num_workers}", "1 or more"))
        if Path(self.vocab_path).absolute() == Path(self.merges_path).absolute():
            found.append(
                Problem("--merges_path", f"got {self.merges_path!r}, which is --vocab_path too")
            )
        for flag, path in (("--vocab_path", self.vocab_path), ("--merges_path", self.merges_path)):
            if problems := unwritable(flag, path) or is_an_input(flag, path, self.corpus_path):
                found += problems
            elif Path(path).exists() and not self.overwrite:
                found.append(
                    Problem(flag, f"{path!r} exists", fix="add --overwrite, or name another file")
                )
        return found


@readable_errors
def main(argv: Sequence[str] | None = None) -> int:
    config = parse_config(TrainTokenizerConfig, "python -m cs_lm train-tokenizer", __doc__, argv)
    text = text_of(config.corpus_path, config, config.special_tokens)
    progress = ProgressLine()
    try:
        vocab, merges = train_bpe(
            text, config.vocab_size, config.special_tokens, config.num_workers, progress=progress
        )
    finally:
        progress.close()
    tokenizer = BPETokenizer(vocab, merges, config.special_tokens)
    _save(tokenizer, config)
    longest = max(vocab.values(), key=len)[:_SHOWN_BYTES].decode("utf-8", "replace")
    print(f"{len(vocab):,} tokens, {len(merges):,} merges; longest token {longest!r}")
    print(f"wrote {config.vocab_path} and {config.merges_path}")
    return 0


def _save(tokenizer: BPETokenizer, config: TrainTokenizerConfig) -> None:
    """Saves both files under one lock, so that they never come from two processes."""
    with writing_alone(Path(config.vocab_path), on_wait=lambda: None):
        problems = config.validate()  # another process may have made them meanwhile
        if problems:
            raise UserError(*problems)
        tokenizer.save(config.vocab_path, config.merges_path)
