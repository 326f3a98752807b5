"""Settings that several commands share, each with one help text and one default."""

from collections.abc import Sequence
from typing import Any

from cs_lm.config.fields import setting
from cs_lm.errors import Problem

DEFAULT_SPECIAL_TOKENS = ("<|endoftext|>",)


def device_setting() -> Any:
    return setting(
        "auto", "auto takes CUDA if present, else the CPU", choices=("auto", "cuda", "cpu", "mps")
    )


def checkpoint_setting(default: str = "best") -> Any:
    return setting(default, "which model of the run: best, last, or the step of a checkpoint")


def validate_run(out_dir: str | Sequence[str]) -> list[Problem]:
    """A problem if no run is named."""
    if out_dir:
        return []
    return [Problem("--out_dir", "is missing", fix="name the folder of a run")]


def validate_checkpoint(checkpoint: str) -> list[Problem]:
    if checkpoint in ("best", "last") or (checkpoint.isdecimal() and len(checkpoint) <= 15):
        return []
    need = "best, last, or the step of a checkpoint"
    return [Problem("--checkpoint", f"got {checkpoint!r}", need)]


def encoding_errors_setting() -> Any:
    return setting(
        "strict", "bytes that are not UTF-8: stop, or read as U+FFFD", choices=("strict", "replace")
    )


STANDARD_INPUT = "-"
CORPUS_HELP = (
    "files, folders or patterns (.txt .md .jsonl .json .parquet, also .gz .bz2 .xz .zst), or - for "
    "standard input; files of a folder or pattern are read sorted by name"
)


def as_paths(given: "str | Sequence[str] | None") -> tuple[str, ...]:
    return () if given is None else (given,) if isinstance(given, str) else tuple(given)


def text_field_setting() -> Any:
    return setting("text", "the field or column with the text, in JSON and Parquet")


def document_separator_setting() -> Any:
    return setting(
        None,
        "text between two files or records; default: the first special token, or an empty line "
        "where there is none",
    )


def corpora_setting(what: str) -> Any:
    return setting((), f"{what}: {CORPUS_HELP}; required")


def special_tokens_setting() -> Any:
    return setting(
        DEFAULT_SPECIAL_TOKENS, "tokens that split documents and are never split themselves"
    )
