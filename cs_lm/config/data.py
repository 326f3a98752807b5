"""The settings of the text and of how it becomes tokens."""

from dataclasses import dataclass

from cs_lm.config.fields import not_positive, setting
from cs_lm.config.shared import (
    CORPUS_HELP,
    STANDARD_INPUT,
    as_paths,
    document_separator_setting,
    encoding_errors_setting,
    special_tokens_setting,
    text_field_setting,
)

MAX_CHUNK_SIZE = 1 << 30  # tokens; one chunk is held in memory while it is written


@dataclass(frozen=True)
class DataConfig:
    """Where the text comes from and how it becomes tokens."""

    corpus_path: tuple[str, ...] = setting(
        (), f"text to train on: {CORPUS_HELP}; without it, the Python language manual"
    )
    valid_path: tuple[str, ...] = setting(
        (), "text to validate on, instead of a part; as --corpus_path"
    )
    valid_fraction: float = setting(
        0.1, "part of the corpus, at its end, kept for validation", "of tokens"
    )
    corpus_size: str | None = setting(
        None,
        "label of the corpus: its store is data/<label>_chunks-<fingerprint>/; default: the first "
        "file's name; alone, it names a store that is there",
    )
    chunk_size: int = setting(500_000, "length of a file of the token store", "tokens")
    vocab_path: str | None = setting(
        None, "tokenizer's vocab.json; trained and written there if missing"
    )
    merges_path: str | None = setting(None, "tokenizer's merges.txt, beside --vocab_path")
    special_tokens: tuple[str, ...] = special_tokens_setting()
    encoding_errors: str = encoding_errors_setting()
    text_field: str = text_field_setting()
    document_separator: str | None = document_separator_setting()
    sampling: str = setting(
        "random", "windows: any start, or each window once an epoch", choices=("random", "epoch")
    )

    def __post_init__(self):
        for name in ("corpus_path", "valid_path"):  # a single path, or None, is taken too
            object.__setattr__(self, name, as_paths(getattr(self, name)))

    def problems(self) -> list[str]:
        found = not_positive(self)
        if STANDARD_INPUT in self.corpus_path and STANDARD_INPUT in self.valid_path:
            found.append("--corpus_path, --valid_path: got - for both; standard input is one text")
        if not 0 < self.valid_fraction < 1:
            found.append(
                f"--valid_fraction: got {self.valid_fraction}, need a number between 0 and 1"
            )
        if self.valid_path and self.valid_fraction != DataConfig.valid_fraction:
            found.append("--valid_fraction: has no effect beside --valid_path; give one of the two")
        if (self.vocab_path is None) != (self.merges_path is None):
            given, other = ("--vocab_path", "--merges_path")
            if self.vocab_path is None:
                given, other = other, given
            found.append(f"{given}: got it without {other}; give both or none")
        if self.chunk_size > MAX_CHUNK_SIZE:
            found.append(f"--chunk_size: got {self.chunk_size}, need at most {MAX_CHUNK_SIZE}")
        if any(not token for token in self.special_tokens):
            found.append("--special_tokens: got an empty one; need at least one character each")
        if self.corpus_size is not None and not self.corpus_size.strip("."):
            found.append(f"--corpus_size: got {self.corpus_size!r}, need a name for the store")
        elif self.corpus_size is not None and set(self.corpus_size) & set('/\\:*?"<>|\0'):
            found.append(
                f"--corpus_size: got {self.corpus_size!r}, need a label without path characters"
            )
        return found
