"""The tokenizer of a corpus: found in data/ or in the user's own files, or trained."""

import json
import logging
from pathlib import Path
from typing import Any

from cs_lm.config.data import DataConfig
from cs_lm.data.cache import (
    SETTINGS,
    TOKENIZER,
    cache_path,
    find_or_make,
    old_path,
    paths_of,
    set_aside,
)
from cs_lm.data.corpus import Corpus
from cs_lm.errors import UserError
from cs_lm.storage.atomic import atomic_write, replace_directory, temporary_name
from cs_lm.tokenizer import BPETokenizer, train_bpe
from cs_lm.tokenizer.text_source import Progress

_log = logging.getLogger("cs_lm")


def find_or_train_tokenizer(
    corpus: Corpus, vocab_size: int, on_progress: Progress | None = None
) -> BPETokenizer:
    """The tokenizer that the settings name; trains it on the corpus if there is none yet.

    Raises: UserError for unusable files of the user's own, which are never replaced.
    """
    settings = _settings(corpus.data, vocab_size, corpus.description)
    path = _path(corpus, settings)

    def make(_is_alone: bool) -> None:
        _refuse_one_of_two(corpus.data)
        _log.info("tokenizer: training %s tokens on %s", f"{vocab_size:,}", corpus.shown)
        specials = corpus.data.special_tokens
        vocab, merges = train_bpe(corpus.open(), vocab_size, specials, progress=on_progress)
        _keep(BPETokenizer(vocab, merges, specials), path, corpus.data, settings)

    return find_or_make(path, lambda: find_tokenizer(corpus, vocab_size), make)[0]


def find_tokenizer(corpus: Corpus, vocab_size: int) -> BPETokenizer | None:
    """The tokenizer that the settings name; None if it must be trained first.

    Raises: UserError for unusable files of the user's own.
    """
    data = corpus.data
    if data.vocab_path is not None:
        if not all(Path(path).exists() for path in (data.vocab_path, data.merges_path)):
            return None  # they are written one after the other, under a lock
        return _own_tokenizer(data)
    settings = _settings(data, vocab_size, corpus.description)
    folders = _path(corpus, settings), old_path(corpus.label, TOKENIZER)
    return next(filter(None, (_read(folder, settings) for folder in folders)), None)


def find_labelled_tokenizers(label: str, data: DataConfig, vocab_size: int) -> list[BPETokenizer]:
    """The tokenizers that a store of that label may have been made with.

    Raises: FileNotFoundError if there is none.
    """
    if data.vocab_path is not None:
        return [_own_tokenizer(data)]
    settings = _settings(data, vocab_size, None)
    found = [_read(folder, settings) for folder in paths_of(label, TOKENIZER)]
    if not any(found):
        raise FileNotFoundError(
            f"tokenizer: data/ has no undamaged tokenizer with label {label!r}, --vocab_size "
            f"{vocab_size} and these --special_tokens; give --corpus_path to train it, or "
            "--vocab_path and --merges_path of the store's tokenizer"
        )
    return [tokenizer for tokenizer in found if tokenizer is not None]


def _own_tokenizer(data: DataConfig) -> BPETokenizer:
    return BPETokenizer.from_files(data.vocab_path, data.merges_path, data.special_tokens)


def _settings(data: DataConfig, vocab_size: int, source: dict[str, Any] | None) -> dict[str, Any]:
    """Everything that a tokenizer depends on.

    source  the description of its text; None: any text
    """
    return {
        "vocab_size": vocab_size,
        "special_tokens": list(data.special_tokens),
        "source": source,
    }


def _path(corpus: Corpus, settings: dict[str, Any]) -> Path:
    """The folder of the tokenizer; for the user's own files, only a name to lock."""
    vocab_path = corpus.data.vocab_path
    if vocab_path is None:
        return cache_path(corpus.label, TOKENIZER, settings)
    return cache_path("files", TOKENIZER, str(Path(vocab_path).absolute()))


def _refuse_one_of_two(data: DataConfig) -> None:
    files = {"--vocab_path": data.vocab_path, "--merges_path": data.merges_path}
    missing = [flag for flag, path in files.items() if path and not Path(path).exists()]
    if len(missing) == 1:
        raise UserError(
            f"{missing[0]}: got {files[missing[0]]!r}, which does not exist, but the other "
            "file does; restore it, or name two new files"
        )


def _keep(tokenizer: BPETokenizer, path: Path, data: DataConfig, settings: dict[str, Any]) -> None:
    if data.vocab_path is not None:
        tokenizer.save(data.vocab_path, data.merges_path)
        _log.info("tokenizer: wrote %s and %s", data.vocab_path, data.merges_path)
        return
    if path.exists():
        _log.warning("tokenizer: %s is damaged; making it again", path)
        set_aside(path)
    _write(tokenizer, path, settings)
    _log.info("tokenizer: wrote %s", path)


def _read(folder: Path, settings: dict[str, Any]) -> BPETokenizer | None:
    """The tokenizer with these settings from the folder; None if it is missing or damaged."""
    try:
        stored = json.loads((folder / SETTINGS).read_text(encoding="utf-8"))
        fingerprint = stored.pop("fingerprint")
        if settings["source"] is None:
            stored["source"] = None
        if stored != settings:
            return None
        paths = folder / "vocab.json", folder / "merges.txt"
        tokenizer = BPETokenizer.from_files(*paths, settings["special_tokens"])
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None
    return tokenizer if tokenizer.fingerprint == fingerprint else None


def _write(tokenizer: BPETokenizer, folder: Path, settings: dict[str, Any]) -> None:
    writing = temporary_name(folder)
    tokenizer.save(writing / "vocab.json", writing / "merges.txt")
    content = {**settings, "fingerprint": tokenizer.fingerprint}
    atomic_write(writing / SETTINGS, json.dumps(content, indent=1).encode("utf-8"))
    if _read(writing, settings) is None:
        raise OSError(
            f"tokenizer: {str(writing)!r} differs from what was written when it is read back"
        )
    replace_directory(writing, folder, replace=False)
