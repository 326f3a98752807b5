"""The text that a run trains and validates on: files, standard input, the manual, or a label."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cs_lm.config.data import DataConfig
from cs_lm.config.shared import STANDARD_INPUT
from cs_lm.data.cache import PIPE_LABEL, STORE, keep_text, paths_of, sha256_remembered
from cs_lm.errors import MissingError, Problem, UserError
from cs_lm.tokenizer.corpus_files import SUFFIXES, find_files, without_packing
from cs_lm.tokenizer.text_source import TextSource, separator_for

EMBEDDED_LABEL = "python-manual"


@dataclass(frozen=True)
class Corpus:
    """A text that exists, and the facts that identify it.

    paths        empty for Python's manual
    shown        its name in messages
    description  lengths and hashes of its content, and how it is read
    """

    label: str
    shown: str
    paths: tuple[str, ...]
    data: DataConfig
    description: dict[str, Any]

    def open(self) -> TextSource:
        paths = self.paths or (str(keep_text(EMBEDDED_LABEL, _embedded_bytes())),)
        return text_of(paths, self.data, self.data.special_tokens)


def label_of(data: DataConfig) -> str:
    """The name of the corpus in data/ and runs/."""
    return data.corpus_size or (_name_of(data.corpus_path) if data.corpus_path else EMBEDDED_LABEL)


def _name_of(paths: Sequence[str]) -> str:
    """The name of the first path without its suffix; for a pattern, the name of its folder."""
    if paths[0] == STANDARD_INPUT:
        return PIPE_LABEL
    path = Path(paths[0])
    if not path.exists() and any(sign in path.name for sign in "*?["):
        path = next(p for p in path.parents if not any(sign in str(p) for sign in "*?["))
    name = without_packing(path.absolute().name)
    stem = Path(name).stem
    return (stem if Path(name).suffix in SUFFIXES or path.is_file() else name) or "corpus"


def embedded_text() -> str:
    """The language manual that comes with CPython, one topic after another.

    Raises: MissingError if this Python comes without it.
    """
    try:
        from pydoc_data.topics import topics
    except ImportError:
        what = "this Python comes without pydoc_data.topics"
        fix = "give a text of your own with --corpus_path"
        raise MissingError(Problem("embedded corpus", what, fix=fix)) from None
    return "\n\n".join(topics[name] for name in sorted(topics))


def _embedded_bytes() -> bytes:
    return embedded_text().encode("utf-8")


def is_embedded(data: DataConfig) -> bool:
    return not data.corpus_path and data.corpus_size in (None, EMBEDDED_LABEL)


def check_corpora(data: DataConfig) -> list[Problem]:
    """The problems of the texts that a run names, found without reading them."""
    checks = {
        "--corpus_size": lambda: _check_label(data),
        "--corpus_path": lambda: find_files(data.corpus_path, "--corpus_path"),
        "--valid_path": lambda: find_files(data.valid_path, "--valid_path"),
    }
    found = []
    for flag, check in checks.items():
        try:
            check()
        except UserError as error:
            found += error.args
        except OSError as error:
            found.append(Problem(flag, str(error)))
    return found


def _check_label(data: DataConfig) -> None:
    label = data.corpus_size
    if is_embedded(data):
        embedded_text()
    elif not data.corpus_path and not paths_of(label, STORE):
        what = f"got {label!r}, but data/ holds no token store of that label"
        raise MissingError(Problem("--corpus_size", what, fix="give --corpus_path to make it"))


def find_corpus(data: DataConfig, remember: bool = True) -> Corpus | None:
    """The text to train on, or None if only the label of an existing store is given.

    remember  store the hashes of large files in data/; False: write nothing there
    Raises: MissingError for a missing file, or a label without a store.
    """
    _check_label(data)
    if is_embedded(data):
        text = _embedded_bytes()
        description = {
            "bytes": len(text),
            "sha256": hashlib.sha256(text).hexdigest(),
            "encoding_errors": data.encoding_errors,
        }
        return Corpus(EMBEDDED_LABEL, "the Python language manual", (), data, description)
    if not data.corpus_path:
        return None
    return _corpus(label_of(data), data.corpus_path, data, "--corpus_path", remember)


def find_valid_corpus(data: DataConfig, remember: bool = True) -> Corpus | None:
    """The text to validate on, or None if it is a part of the training text."""
    paths = data.valid_path
    if not paths:
        return None
    return _corpus(_name_of(paths), paths, data, "--valid_path", remember)


def _corpus(
    label: str, paths: tuple[str, ...], data: DataConfig, flag: str, remember: bool
) -> Corpus:
    text = text_of(paths, data, data.special_tokens, flag)
    description = text.describe(sha256_remembered if remember else None)
    shown = paths[0] if len(paths) == 1 else f"{paths[0]} and {len(paths) - 1} more"
    return Corpus(label, shown, paths, data, description)


def text_of(
    paths: Sequence[str],
    settings: Any,
    special_tokens: Sequence[str],
    flag: str = "--corpus_path",
) -> TextSource:
    """The text of the paths.

    settings  an object with `encoding_errors`, `document_separator` and `text_field`
    flag      what names the paths, for messages
    Raises: UserError for a path without a file, or for one file that is empty
    """
    separator = separator_for(settings.document_separator, special_tokens)
    return TextSource(
        paths,
        settings.encoding_errors,
        separator=separator,
        text_field=settings.text_field,
        flag=flag,
    )
