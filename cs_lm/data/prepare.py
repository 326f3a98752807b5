"""From a corpus to a tokenizer and token stores: what is missing is made, what fits is reused."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cs_lm.config.data import DataConfig
from cs_lm.config.run import RunConfig
from cs_lm.data.cache import (
    DATA,
    SETTINGS,
    STORE,
    TOKENIZER,
    Say,
    cache_path,
    find_or_make,
    in_use,
    old_path,
    paths_of,
    set_aside,
)
from cs_lm.data.corpus import Corpus, find_corpus, find_valid_corpus, label_of
from cs_lm.data.token_store import MemmapManager, TokenRange, Tokens
from cs_lm.errors import UserError
from cs_lm.storage.atomic import own_name, put_folder, write_whole
from cs_lm.storage.lock import FileLock
from cs_lm.storage.manifest import MANIFEST
from cs_lm.tokenizer import BPETokenizer, train_bpe
from cs_lm.tokenizer.parallel_encode import ParallelEncoder
from cs_lm.tokenizer.text_source import Progress, TextSource


@dataclass(frozen=True)
class PreparedData:
    """measured_on  which tokens of which text are validated on, and with which tokenizer
    locks        keep what is used from being removed
    """

    tokenizer: BPETokenizer
    train: Tokens
    valid: Tokens
    measured_on: dict[str, Any] = field(default_factory=dict)
    locks: tuple[FileLock, ...] = ()


def prepare(
    config: RunConfig,
    say: Say,
    tokenizer: BPETokenizer | None = None,
    progress: Progress | None = None,
) -> PreparedData:
    """The tokenizer, and the texts to train and validate on.

    tokenizer  of the run that goes on, instead of the one in data/
    say        told what is made and why
    progress   told how far the making has got
    Raises: ValueError or FileNotFoundError for texts, tokenizers and stores that cannot be used.
    """
    maker = _Maker(config, say, progress)
    corpus, valid_corpus = find_corpus(config), find_valid_corpus(config)
    texts = [path for each in (corpus, valid_corpus) if each is not None for path in each.paths]
    kept = tuple(in_use(Path(path)) for path in texts if Path(path).parent == DATA)
    if corpus is None:
        store, tokenizer = _labelled(config, tokenizer)
        lock = in_use(store.folder)
        _check_vocabulary(config, tokenizer, say)
        maker.open_store(store)
    else:
        if tokenizer is None:
            tokenizer = maker.tokenizer(corpus)
            _check_vocabulary(config, tokenizer, say)
        store, lock = maker.store(corpus, tokenizer)
    border = num_training_tokens(config, len(store))
    valid_store, start, end, locks = store, border, len(store), (lock,)
    if valid_corpus is not None:
        valid_store, valid_lock = maker.store(valid_corpus, tokenizer)
        start, end, locks = 0, len(valid_store), (lock, valid_lock)
    train, valid = TokenRange(store, 0, border), TokenRange(valid_store, start, end)
    for name, tokens in (("training", train), ("validation", valid)):
        check_length(name, len(tokens), config)
    measured_on = {
        "text": valid_store.source,
        "range": [start, end],
        "tokenizer": tokenizer.fingerprint,
    }
    return PreparedData(tokenizer, train, valid, measured_on, locks + kept)


def reusable_store(
    config: RunConfig, tokenizer: BPETokenizer | None = None
) -> MemmapManager | None:
    """The store that a run would train on, if it need not be made first; nothing is written."""
    corpus = find_corpus(config, remember=False)
    if corpus is None:
        return _labelled(config, tokenizer)[0]
    tokenizer = tokenizer or _find_tokenizer(config, corpus)
    return None if tokenizer is None else _find_store(config, corpus, tokenizer)


def check_length(name: str, num_tokens: int, config: RunConfig) -> None:
    if num_tokens <= config.seq_length:
        raise ValueError(
            f"{name} text: got {num_tokens} tokens, need at least {config.seq_length + 1} "
            f"for one window of --seq_length ({config.seq_length}); give a longer text or a "
            "shorter --seq_length"
        )


def num_training_tokens(config: RunConfig, num_tokens: int) -> int:
    """How many of a store's tokens are trained on; the rest, at its end, is for validation."""
    if config.data.valid_path:
        return num_tokens
    return num_tokens - int(num_tokens * config.data.valid_fraction)


def _check_vocabulary(config: RunConfig, tokenizer: BPETokenizer, say: Say) -> None:
    """Raises: ValueError for a model with fewer rows than the tokenizer has tokens."""
    have, rows = tokenizer.vocab_size, config.model.vocab_size
    if have > rows:
        of_files = "" if config.data.vocab_path is None else f" {config.data.vocab_path!r}"
        raise ValueError(
            f"--vocab_size: got {rows}, need at least {have}: the tokenizer{of_files} has that "
            "many tokens"
        )
    if have < rows:
        say(
            f"tokenizer: has {have:,} tokens; the model keeps {rows:,} rows (--vocab_size {have} "
            "is enough)"
        )


class _Maker:
    """Makes what is missing, telling what it does."""

    def __init__(self, config: RunConfig, say: Say, progress: Progress | None):
        self._config, self._say, self._progress = config, say, progress

    def tokenizer(self, corpus: Corpus) -> BPETokenizer:
        config = self._config
        path = _tokenizer_path(config, corpus)

        def make(_is_alone: bool) -> None:
            _refuse_one_of_two(config.data)
            self._say(f"tokenizer: training {config.model.vocab_size:,} tokens on {corpus.shown}")
            specials = config.data.special_tokens
            vocab, merges = train_bpe(
                corpus.open(), config.model.vocab_size, specials, progress=self._progress
            )
            trained = BPETokenizer(vocab, merges, specials)
            if config.data.vocab_path is not None:
                trained.save(config.data.vocab_path, config.data.merges_path)
                self._say(
                    f"tokenizer: wrote {config.data.vocab_path} and {config.data.merges_path}"
                )
                return
            if path.exists():
                self._say(f"tokenizer: {path} is damaged, and made again")
                set_aside(path)
            _write_tokenizer(trained, path, _tokenizer_settings(config, corpus))
            self._say(f"tokenizer: wrote {path}")

        return find_or_make(path, lambda: _find_tokenizer(config, corpus), make, self._say)[0]

    def store(self, corpus: Corpus, tokenizer: BPETokenizer) -> tuple[MemmapManager, FileLock]:
        config, path = self._config, _store_path(self._config, corpus, tokenizer)

        def make(is_alone: bool) -> None:
            if path.exists():  # it is not ours to replace: a run may be reading it
                raise UserError(
                    f"token store: {path} is damaged: it has no {MANIFEST}; delete the folder and "
                    "start again"
                )
            self._say(f"token store: encoding {corpus.shown} to {path}")
            made = encode_to_store(
                corpus.open(),
                tokenizer,
                path,
                config.data.chunk_size,
                progress=self._progress,
                is_alone=is_alone,
                expected=corpus.description,
            )
            bytes_per_token = made.manifest["text_bytes"] / len(made)
            self._say(f"token store: wrote {len(made):,} tokens, {bytes_per_token:.2f} bytes each")

        store, lock = find_or_make(
            path, lambda: _find_store(config, corpus, tokenizer), make, self._say
        )
        if store.folder != path:  # of an earlier version, under another name
            lock = in_use(store.folder)
        self.open_store(store)
        return store, lock

    def open_store(self, store: MemmapManager) -> None:
        store.verify_once()
        self._say(f"token store: {store.folder}, {len(store):,} tokens")


def encode_to_store(
    text: TextSource,
    tokenizer: BPETokenizer,
    folder: Path,
    chunk_size: int,
    num_workers: int | None = None,
    progress: Progress | None = None,
    is_alone: bool = True,
    expected: dict[str, Any] | None = None,
    replace: bool = False,
) -> MemmapManager:
    """A store encoded by several processes (None: all cores where the text is large).

    is_alone  nobody else can be writing to the folder: an encoding that was cut off is gone on with
    expected  what the text was before it was read
    replace   an older store gives way
    Raises: ValueError when the text changed while it was read.
    """
    encoder = ParallelEncoder(tokenizer, text.num_workers(num_workers))
    report = progress or (lambda *_: None)

    def description() -> dict[str, Any]:
        found = text.description()
        if expected is not None and found != expected:
            raise ValueError(
                f"corpus: {', '.join(map(str, text.paths[:3]))} changed while it was read; start "
                "again when nothing writes to it any more"
            )
        return found

    return MemmapManager.save_as_memmap(
        text.read(),
        encoder,
        folder,
        chunk_size,
        description,
        lambda num_tokens: report(
            "encoding, bytes read",
            text.bytes_read,
            text.total_bytes,
            f"{text.position}{num_tokens:,} tokens",
        ),
        text.key() if is_alone else None,
        replace,
    )


# ---- stores ----


def _store_path(config: RunConfig, corpus: Corpus, tokenizer: BPETokenizer) -> Path:
    facts = [corpus.description, tokenizer.fingerprint, config.data.chunk_size]
    return cache_path(corpus.label, STORE, facts)


def _find_store(config: RunConfig, corpus: Corpus, tokenizer: BPETokenizer) -> MemmapManager | None:
    """Raises: ValueError for one that is damaged, and is never replaced: it may be in use."""
    path = _store_path(config, corpus, tokenizer)
    if (path / MANIFEST).is_file():
        store = MemmapManager(path)
        if (why := _difference(store, tokenizer, corpus, config)) is not None:
            raise ValueError(f"token store: {path} {why}; delete the folder")
        return store
    for old in (old_path(corpus.label, STORE), old_path(label_of(config), f"{STORE}_valid")):
        try:
            store = MemmapManager(old)
        except (ValueError, OSError):  # nothing that could be used
            continue
        if _difference(store, tokenizer, corpus, config) is None:
            return store
    return None


def _labelled(
    config: RunConfig, tokenizer: BPETokenizer | None
) -> tuple[MemmapManager, BPETokenizer]:
    """The store that only a label names, and the tokenizer that it was made with.

    Raises: FileNotFoundError or ValueError where there is none that fits, or more than one.
    """
    label = label_of(config)
    tokenizers = [tokenizer] if tokenizer is not None else _labelled_tokenizers(config, label)
    fit: dict[str, tuple[MemmapManager, BPETokenizer]] = {}
    reasons = []
    for path in paths_of(label, STORE):
        store = MemmapManager(path)
        for one in tokenizers:
            why = _difference(store, one, None, config)
            if why is None:
                fit.setdefault(json.dumps([store.source, store.chunk_size]), (store, one))
            else:
                reasons.append(f"{path} {why}")
    if len(fit) > 1:
        names = ", ".join(str(store.folder) for store, _ in fit.values())
        raise ValueError(
            f"--corpus_size: {label!r} names several token stores: {names}; give --corpus_path to "
            "say which text is meant"
        )
    if not fit:
        raise ValueError(
            f"token store: {reasons[0]}; give --corpus_path to encode the text again, or "
            "--vocab_path and --merges_path of the tokenizer it was made with"
        )
    return next(iter(fit.values()))


def _difference(
    store: MemmapManager, tokenizer: BPETokenizer, corpus: Corpus | None, config: RunConfig
) -> str | None:
    """Why a store cannot be used, or None; without a corpus, default settings ask for nothing."""
    if store.fingerprint != tokenizer.fingerprint:
        return "was made with another tokenizer"
    if corpus is not None and store.source != corpus.description:
        return "was made from another text"
    data = config.data
    if corpus is None and data.encoding_errors not in (
        "strict",
        store.source.get("encoding_errors"),
    ):
        return "was made with --encoding_errors strict"
    is_asked = corpus is not None or data.chunk_size != DataConfig.chunk_size
    if is_asked and store.chunk_size != data.chunk_size:
        return f"has chunks of {store.chunk_size} tokens"
    return None


# ---- tokenizers ----


def _tokenizer_settings(config: RunConfig, corpus: Corpus | None) -> dict[str, Any]:
    return {
        "vocab_size": config.model.vocab_size,
        "special_tokens": list(config.data.special_tokens),
        "source": None if corpus is None else corpus.description,
    }


def _tokenizer_path(config: RunConfig, corpus: Corpus) -> Path:
    """Of the user's own files: only a name to lock."""
    data = config.data
    if data.vocab_path is None:
        return cache_path(corpus.label, TOKENIZER, _tokenizer_settings(config, corpus))
    return cache_path("files", TOKENIZER, str(Path(data.vocab_path).absolute()))


def _find_tokenizer(config: RunConfig, corpus: Corpus) -> BPETokenizer | None:
    """Raises: ValueError or FileNotFoundError for the user's own files, which are not replaced."""
    data = config.data
    if data.vocab_path is not None:
        if not all(Path(path).exists() for path in (data.vocab_path, data.merges_path)):
            return None  # both are written under a lock, one after the other
        return BPETokenizer.from_files(data.vocab_path, data.merges_path, data.special_tokens)
    settings = _tokenizer_settings(config, corpus)
    for folder in (_tokenizer_path(config, corpus), old_path(corpus.label, TOKENIZER)):
        found = _read_tokenizer(folder, settings)
        if found is not None:
            return found
    return None


def _refuse_one_of_two(data: DataConfig) -> None:
    files = {"--vocab_path": data.vocab_path, "--merges_path": data.merges_path}
    missing = [flag for flag, path in files.items() if path and not Path(path).exists()]
    if len(missing) == 1:
        raise UserError(
            f"{missing[0]}: got {files[missing[0]]!r}, which is not a file, but the other of "
            "the two is there; restore it, or name two new files"
        )


def _labelled_tokenizers(config: RunConfig, label: str) -> list[BPETokenizer]:
    """Those that the settings allow. Raises: FileNotFoundError where there is none."""
    data = config.data
    if data.vocab_path is not None:
        return [BPETokenizer.from_files(data.vocab_path, data.merges_path, data.special_tokens)]
    settings = _tokenizer_settings(config, None)
    folders = paths_of(label, TOKENIZER)
    found = [_read_tokenizer(folder, settings) for folder in folders]
    if not any(found):
        raise FileNotFoundError(
            f"tokenizer: data/ has none of label {label!r} with --vocab_size "
            f"{config.model.vocab_size} and these --special_tokens that is whole; give "
            "--corpus_path to train it, or --vocab_path and --merges_path of the store's tokenizer"
        )
    return [tokenizer for tokenizer in found if tokenizer is not None]


def _read_tokenizer(folder: Path, settings: dict[str, Any]) -> BPETokenizer | None:
    """The tokenizer with these settings, as it was written; None where it is missing or damaged."""
    try:
        stored = json.loads((folder / SETTINGS).read_text(encoding="utf-8"))
        fingerprint = stored.pop("fingerprint")
        if settings["source"] is None:
            stored["source"] = None
        if stored != settings:
            return None
        specials = settings["special_tokens"]
        paths = folder / "vocab.json", folder / "merges.txt"
        tokenizer = BPETokenizer.from_files(*paths, specials)
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None
    return tokenizer if tokenizer.fingerprint == fingerprint else None


def _write_tokenizer(tokenizer: BPETokenizer, folder: Path, settings: dict[str, Any]) -> None:
    writing = own_name(folder)
    tokenizer.save(writing / "vocab.json", writing / "merges.txt")
    content = {**settings, "fingerprint": tokenizer.fingerprint}
    write_whole(writing / SETTINGS, json.dumps(content, indent=1).encode("utf-8"))
    if _read_tokenizer(writing, settings) is None:
        raise OSError(f"tokenizer: {str(writing)!r} does not read back as it was written")
    put_folder(writing, folder, replace=False)
