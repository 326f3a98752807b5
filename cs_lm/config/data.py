"""The settings of the text corpus and of its tokenization."""

from dataclasses import dataclass

from cs_lm.config.fields import is_unicode, not_positive, not_unicode, setting
from cs_lm.config.shared import (
    CORPUS_HELP,
    STANDARD_INPUT,
    as_paths,
    document_separator_setting,
    encoding_errors_setting,
    special_tokens_setting,
    text_field_setting,
)
from cs_lm.errors import Problem

MAX_CHUNK_SIZE = 1 << 30  # tokens; one chunk is held in memory while it is written


@dataclass(frozen=True)
class DataConfig:
    """Where the text comes from and how it becomes tokens."""

    corpus_path: tuple[str, ...] = setting(
        (), f"text to train on: {CORPUS_HELP}; without it, the Python language manual"
    )
    valid_path: tuple[str, ...] = setting(
        (), "separate validation text; same forms as --corpus_path"
    )
    valid_fraction: float = setting(
        0.1, "part of the corpus, at its end, kept for validation", "of tokens"
    )
    corpus_size: str | None = setting(
        None,
        "label of the corpus: its store is data/<label>_chunks-<fingerprint>/; default: the first "
        "file's name; without --corpus_path: use the existing store with this label",
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
        "random",
        "random: windows start anywhere; epoch: each window once per epoch",
        choices=("random", "epoch"),
    )

    def __post_init__(self):
        for name in ("corpus_path", "valid_path"):  # also accept a single path or None
            object.__setattr__(self, name, as_paths(getattr(self, name)))

    def validate(self) -> list[Problem]:
        found = not_positive(self)
        if STANDARD_INPUT in self.corpus_path and STANDARD_INPUT in self.valid_path:
            what = "got - for both; standard input is one text"
            found.append(Problem("--corpus_path, --valid_path", what))
        if not 0 < self.valid_fraction < 1:
            need = "a number between 0 and 1"
            found.append(Problem("--valid_fraction", f"got {self.valid_fraction}", need))
        if self.valid_path and self.valid_fraction != DataConfig.valid_fraction:
            what, fix = "has no effect beside --valid_path", "give one of the two"
            found.append(Problem("--valid_fraction", what, fix=fix))
        if (self.vocab_path is None) != (self.merges_path is None):
            given, other = ("--vocab_path", "--merges_path")
            if self.vocab_path is None:
                given, other = other, given
            found.append(Problem(given, f"got it without {other}", fix="give both or none"))
        if self.chunk_size > MAX_CHUNK_SIZE:
            need = f"at most {MAX_CHUNK_SIZE}"
            found.append(Problem("--chunk_size", f"got {self.chunk_size}", need))
        if any(not token for token in self.special_tokens):
            need = "at least one character each"
            found.append(Problem("--special_tokens", "got an empty one", need))
        found += [
            not_unicode("--special_tokens", token)
            for token in self.special_tokens
            if not is_unicode(token)
        ]
        return found + self._validate_label()

    def _validate_label(self) -> list[Problem]:
        label = self.corpus_size
        if label is None:
            return []
        if not label.strip("."):
            return [Problem("--corpus_size", f"got {label!r}", "a name for the store")]
        if set(label) & set('/\\:*?"<>|\0'):
            return [Problem("--corpus_size", f"got {label!r}", "a label without path characters")]
        return []
