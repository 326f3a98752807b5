"""From text to tokens: corpus -> tokenizer -> store -> tokens to train and validate on.

Each part takes the result of the part before it. A tokenizer or store that is missing is made; one
that fits is used again. From `--corpus_path` to a batch there are nine stops:

    DataConfig        config/data.py      the paths, as the user gave them
    find_corpus       corpus.py           which text that is: files, lengths, hashes
    TextSource        text_source.py      reads it, block by block
    find_or_train_tokenizer               tokenizers.py
    find_or_encode_store                  stores.py, which writes with store_writer.py
    MemmapManager     token_store.py      token ids on disk, read by range
    TokenRange        token_store.py      the part to train on, the part to validate on
    BatchSource       batches.py          batch number -> windows
    Batch             batches.py          what the loss takes
"""

import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cs_lm.config.run import RunConfig
from cs_lm.data.cache import DATA, in_use
from cs_lm.data.corpus import Corpus, find_corpus, find_valid_corpus
from cs_lm.data.stores import (
    UsedStore,
    find_labelled_store,
    find_or_encode_store,
    find_store,
    use_store,
)
from cs_lm.data.token_store import MemmapManager, TokenRange, Tokens
from cs_lm.data.tokenizers import find_or_train_tokenizer, find_tokenizer
from cs_lm.errors import UserError
from cs_lm.storage.lock import FileLock
from cs_lm.tokenizer import BPETokenizer
from cs_lm.tokenizer.text_source import Progress

_log = logging.getLogger("cs_lm")


@dataclass(frozen=True)
class PreparedData:
    """The tokenizer, and the tokens to train and validate on.

    measured_on  identifies the validation tokens: text, range and tokenizer
    locks        keep other processes from removing the files in use
    """

    tokenizer: BPETokenizer
    train: Tokens
    valid: Tokens
    measured_on: dict[str, Any] = field(default_factory=dict)
    locks: tuple[FileLock, ...] = ()


def prepare(
    config: RunConfig,
    tokenizer: BPETokenizer | None = None,
    on_progress: Progress | None = None,
) -> PreparedData:
    """The tokenizer, and the tokens to train and validate on.

    tokenizer    of a run that is resumed or begun from weights, instead of the one in data/
    on_progress  called with the progress of training a tokenizer and encoding a text
    Raises: UserError or FileNotFoundError for texts, tokenizers and stores that cannot be used.
    """
    corpus, valid_corpus = find_corpus(config.data), find_valid_corpus(config.data)
    text_locks = _keep_texts(corpus, valid_corpus)
    if corpus is None:
        store, tokenizer = find_labelled_store(config.data, config.model.vocab_size, tokenizer)
        check_vocab_size(config, tokenizer)
        used = use_store(store, in_use(store.folder))
    else:
        size = config.model.vocab_size
        tokenizer = tokenizer or find_or_train_tokenizer(corpus, size, on_progress)
        check_vocab_size(config, tokenizer)
        used = find_or_encode_store(corpus, tokenizer, on_progress)
    valid_used = None
    if valid_corpus is not None:
        valid_used = find_or_encode_store(valid_corpus, tokenizer, on_progress)
    return _split(config, tokenizer, used, valid_used, text_locks)


def find_prepared_store(
    config: RunConfig, tokenizer: BPETokenizer | None = None
) -> MemmapManager | None:
    """The store that a run would train on, or None if it must be made first. Writes nothing."""
    corpus = find_corpus(config.data, remember=False)
    if corpus is None:
        return find_labelled_store(config.data, config.model.vocab_size, tokenizer)[0]
    tokenizer = tokenizer or find_tokenizer(corpus, config.model.vocab_size)
    return None if tokenizer is None else find_store(corpus, tokenizer)


def num_training_tokens(config: RunConfig, num_tokens: int) -> int:
    """How many of a store's tokens are trained on; the rest, at its end, is for validation."""
    if config.data.valid_path:
        return num_tokens
    return num_tokens - int(num_tokens * config.data.valid_fraction)


def check_length(name: str, num_tokens: int, config: RunConfig) -> None:
    """Raises: UserError for a text that is shorter than a training window."""
    if num_tokens <= config.seq_length:
        raise UserError(
            f"{name} text: got {num_tokens} tokens, need at least {config.seq_length + 1} "
            f"for one window of --seq_length ({config.seq_length}); give a longer text or a "
            "shorter --seq_length"
        )


def check_vocab_size(config: RunConfig, tokenizer: BPETokenizer) -> None:
    """Raises: UserError for a model with fewer embedding rows than the tokenizer has tokens."""
    have, rows = tokenizer.vocab_size, config.model.vocab_size
    if have > rows:
        of_files = "" if config.data.vocab_path is None else f" {config.data.vocab_path!r}"
        raise UserError(
            f"--vocab_size: got {rows}, need at least {have}: the tokenizer{of_files} has that "
            "many tokens"
        )
    if have < rows:
        _log.info(
            "tokenizer: has %s tokens; the model keeps %s rows (--vocab_size %d is enough)",
            f"{have:,}",
            f"{rows:,}",
            have,
        )


def _keep_texts(*corpora: Corpus | None) -> tuple[FileLock, ...]:
    """Locks that keep texts in data/ from being removed, for example those of a pipe."""
    paths = [Path(path) for corpus in corpora if corpus is not None for path in corpus.paths]
    return tuple(in_use(path) for path in paths if path.parent == DATA)


def _split(
    config: RunConfig,
    tokenizer: BPETokenizer,
    used: UsedStore,
    valid_used: UsedStore | None,
    text_locks: tuple[FileLock, ...],
) -> PreparedData:
    """Training and validation tokens: from two stores, or from the start and the end of one."""
    border = num_training_tokens(config, len(used.store))
    train = TokenRange(used.store, 0, border)
    if valid_used is None:
        valid_store, start, locks = used.store, border, (used.lock,)
    else:
        valid_store, start, locks = valid_used.store, 0, (used.lock, valid_used.lock)
    end = len(valid_store)
    valid = TokenRange(valid_store, start, end)
    check_length("training", len(train), config)
    check_length("validation", len(valid), config)
    measured_on = {
        "text": valid_store.source,
        "range": [start, end],
        "tokenizer": tokenizer.fingerprint,
    }
    return PreparedData(tokenizer, train, valid, measured_on, locks + text_locks)
