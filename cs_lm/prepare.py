"""From a corpus to a tokenizer and token stores: what is missing is made, what fits is reused."""

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from cs_lm.config import DataConfig, RunConfig
from cs_lm.manifest import MANIFEST
from cs_lm.token_store import MemmapManager, TokenRange, Tokens
from cs_lm.tokenizer import BPETokenizer, train_bpe
from cs_lm.tokenizer.parallel import ParallelEncoder
from cs_lm.tokenizer.text_source import Progress, TextSource, describe_file
from cs_lm.whole_file import write_whole

DATA = Path("data")
EMBEDDED_LABEL = "python-manual"
SETTINGS = "settings.json"

Say = Callable[[str], None]


@dataclass(frozen=True)
class PreparedData:
    tokenizer: BPETokenizer
    train: Tokens
    valid: Tokens


def label_of(config: RunConfig) -> str:
    """The name of the corpus in data/ and runs/."""
    if config.data.corpus_size:
        return config.data.corpus_size
    return Path(config.data.corpus_path).stem if config.data.corpus_path else EMBEDDED_LABEL


def store_folder(label: str) -> Path:
    return DATA / f"{label}_chunks"


def valid_store_folder(label: str) -> Path:
    return DATA / f"{label}_chunks_valid"  # no label's own store has this name


def embedded_text() -> str:
    """The language manual that comes with CPython, one topic after another.

    Raises: FileNotFoundError where this Python comes without it.
    """
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise FileNotFoundError(
            "embedded corpus: this Python comes without pydoc_data.topics; give a text of your own "
            "with --corpus_path"
        ) from None
    return "\n\n".join(topics[name] for name in sorted(topics))


def find_corpus(config: RunConfig) -> Path | None:
    """The file to train on, or None where only the label of an existing store is given.

    Raises: FileNotFoundError for a missing file, or a label without a store.
    """
    data = config.data
    if data.corpus_path is not None:
        _check_text_file("--corpus_path", data.corpus_path)
        return Path(data.corpus_path)
    if data.corpus_size is None or data.corpus_size == EMBEDDED_LABEL:
        return DATA / f"{EMBEDDED_LABEL}.txt"
    if not store_folder(label_of(config)).is_dir():
        raise FileNotFoundError(
            f"--corpus_size: got {data.corpus_size!r}, but {store_folder(data.corpus_size)} holds "
            "no token store; give --corpus_path to make it"
        )
    return None


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
    data = config.data
    corpus, source = _corpus_and_source(config)
    if data.valid_path is not None:
        _check_text_file("--valid_path", data.valid_path)
    if tokenizer is None:
        tokenizer = _tokenizer(config, corpus, source, say, progress)
    folder = store_folder(label_of(config))
    store = _store(config, corpus, source, folder, tokenizer, say, progress)
    train, valid = _split(config, store, tokenizer, say, progress)
    for name, tokens in (("training", train), ("validation", valid)):
        check_length(name, len(tokens), config)
    return PreparedData(tokenizer, train, valid)


def reusable_store(config: RunConfig) -> MemmapManager | None:
    """The store that a run would train on, if it need not be made first."""
    files, folder = _tokenizer_files(config), store_folder(label_of(config))
    corpus, source = find_corpus(config), None
    if corpus is not None:
        if not corpus.is_file():
            return None
        source = describe_file(corpus, config.data.encoding_errors)
    tokenizer = files.usable(_tokenizer_settings(config, source))
    if tokenizer is None or not (folder / MANIFEST).is_file():
        return None
    store = MemmapManager(folder)
    return store if _difference(store, tokenizer, source, config) is None else None


def check_length(name: str, num_tokens: int, config: RunConfig) -> None:
    if num_tokens <= config.seq_length:
        raise ValueError(
            f"{name} text: got {num_tokens} tokens, need at least {config.seq_length + 1} "
            f"for one window of --seq_length ({config.seq_length}); give a longer text or a "
            "shorter --seq_length"
        )


def _corpus_and_source(config: RunConfig) -> tuple[Path | None, dict[str, Any] | None]:
    corpus = find_corpus(config)
    if corpus is None:
        return None, None
    if config.data.corpus_path is None:
        _write_if_changed(corpus, embedded_text())
    return corpus, describe_file(corpus, config.data.encoding_errors)


def num_training_tokens(config: RunConfig, num_tokens: int) -> int:
    """How many of a store's tokens are trained on; the rest, at its end, is for validation."""
    if config.data.valid_path is not None:
        return num_tokens
    return num_tokens - int(num_tokens * config.data.valid_fraction)


def _split(config, store: MemmapManager, tokenizer, say: Say, progress) -> tuple[Tokens, Tokens]:
    data = config.data
    if data.valid_path is not None:
        source = describe_file(Path(data.valid_path), data.encoding_errors)
        folder = valid_store_folder(label_of(config))
        return store, _store(
            config, Path(data.valid_path), source, folder, tokenizer, say, progress
        )
    border = num_training_tokens(config, len(store))
    return TokenRange(store, 0, border), TokenRange(store, border, len(store))


class _TokenizerFiles(NamedTuple):
    vocab_path: Path
    merges_path: Path
    settings_path: Path | None  # None: the user's own files, whatever they were trained with

    def usable(self, settings: dict[str, Any]) -> BPETokenizer | None:
        """The tokenizer with these settings, as it was written; None where it is missing.

        Raises: ValueError or FileNotFoundError for the user's own files, which are never replaced.
        """
        if self.settings_path is None:
            exists = self.vocab_path.exists() or self.merges_path.exists()
            return self._read(settings) if exists else None
        stored = _read_json(self.settings_path)
        if not isinstance(stored, dict):
            return None
        fingerprint = stored.pop("fingerprint", None)
        if settings["source"] is not None and stored != settings:
            return None
        try:
            tokenizer = self._read(settings)
        except (ValueError, OSError):
            return None
        return tokenizer if tokenizer.fingerprint == fingerprint else None

    def write(self, tokenizer: BPETokenizer, settings: dict[str, Any]) -> None:
        if self.settings_path is not None:  # from here on, the files may be other ones
            self.settings_path.unlink(missing_ok=True)
        tokenizer.save(self.vocab_path, self.merges_path)
        if self.settings_path is not None:
            _write_json(self.settings_path, {**settings, "fingerprint": tokenizer.fingerprint})

    def _read(self, settings: dict[str, Any]) -> BPETokenizer:
        specials = settings["special_tokens"]
        return BPETokenizer.from_files(self.vocab_path, self.merges_path, specials)


def _tokenizer_files(config: RunConfig) -> _TokenizerFiles:
    if config.data.vocab_path is not None:
        return _TokenizerFiles(Path(config.data.vocab_path), Path(config.data.merges_path), None)
    folder = DATA / f"{label_of(config)}_tokenizer"
    return _TokenizerFiles(folder / "vocab.json", folder / "merges.txt", folder / SETTINGS)


def _tokenizer_settings(config: RunConfig, source: dict[str, Any] | None) -> dict[str, Any]:
    specials = list(config.data.special_tokens)
    return {"vocab_size": config.model.vocab_size, "special_tokens": specials, "source": source}


def _tokenizer(
    config: RunConfig, corpus: Path | None, source, say: Say, progress: Progress | None
) -> BPETokenizer:
    files, settings = _tokenizer_files(config), _tokenizer_settings(config, source)
    tokenizer = files.usable(settings)
    if tokenizer is None:
        if corpus is None:
            raise FileNotFoundError(
                f"tokenizer: {str(files.vocab_path)!r} is missing or damaged; give --corpus_path "
                "to train it, or --vocab_path and --merges_path of the store's tokenizer"
            )
        if files.settings_path is not None and files.vocab_path.exists():
            say(f"tokenizer: {files.vocab_path.parent} belongs to other settings, or is damaged")
        tokenizer = _train_tokenizer(config, corpus, files, settings, say, progress)
    if tokenizer.vocab_size > config.model.vocab_size:
        raise ValueError(
            f"--vocab_size: got {config.model.vocab_size}, need at least {tokenizer.vocab_size}: "
            f"the tokenizer {str(files.vocab_path)!r} has that many tokens"
        )
    if tokenizer.vocab_size < config.model.vocab_size:
        say(
            f"tokenizer: has {tokenizer.vocab_size:,} tokens; the model keeps "
            f"{config.model.vocab_size:,} rows (--vocab_size {tokenizer.vocab_size} is enough)"
        )
    return tokenizer


def _train_tokenizer(
    config: RunConfig,
    corpus: Path,
    files: _TokenizerFiles,
    settings: dict[str, Any],
    say: Say,
    progress: Progress | None,
) -> BPETokenizer:
    say(f"tokenizer: training {config.model.vocab_size:,} tokens on {corpus}")
    specials = config.data.special_tokens
    vocab, merges = train_bpe(
        corpus, config.model.vocab_size, specials,
        encoding_errors=config.data.encoding_errors, progress=progress,
    )  # fmt: skip
    tokenizer = BPETokenizer(vocab, merges, specials)
    files.write(tokenizer, settings)
    say(f"tokenizer: wrote {files.vocab_path} and {files.merges_path}")
    return tokenizer


def _store(
    config, corpus: Path | None, source, folder: Path, tokenizer, say: Say, progress
) -> MemmapManager:
    store = MemmapManager(folder) if (folder / MANIFEST).is_file() else None
    why = "is missing"
    if store is not None:
        why = _difference(store, tokenizer, source, config)
        if why is None:
            store.verify()
            say(f"token store: {folder}, {len(store):,} tokens")
            return store
        if corpus is None:
            raise ValueError(
                f"token store: {folder} {why}; give --corpus_path to encode the text again, or "
                "--vocab_path and --merges_path of the tokenizer it was made with"
            )
    say(f"token store: {folder} {why}, encoding {corpus}")
    text = TextSource(corpus, config.data.encoding_errors)
    store = encode_to_store(text, tokenizer, folder, config.data.chunk_size, progress=progress)
    bytes_per_token = store.manifest["text_bytes"] / len(store)
    say(f"token store: wrote {len(store):,} tokens, {bytes_per_token:.2f} bytes each, to {folder}")
    return store


def encode_to_store(
    text: TextSource,
    tokenizer: BPETokenizer,
    folder: Path,
    chunk_size: int,
    num_workers: int | None = None,
    progress: Progress | None = None,
) -> MemmapManager:
    """A store encoded by several processes (None: all cores where the text is large)."""
    encoder = ParallelEncoder(tokenizer, text.num_workers(num_workers))
    report = progress or (lambda *_: None)
    return MemmapManager.save_as_memmap(
        text.read(), encoder, folder, chunk_size, text.description,
        lambda num_tokens: report(
            "encoding, bytes read", text.bytes_read, text.total_bytes, f"{num_tokens:,} tokens"
        ),
        text.key(),
    )  # fmt: skip


def _difference(store: MemmapManager, tokenizer, source, config: RunConfig) -> str | None:
    """Why a store cannot be used, or None; without a corpus, default settings ask for nothing."""
    if store.fingerprint != tokenizer.fingerprint:
        return "was made with another tokenizer"
    if source is not None and store.source != source:
        return "was made from another text"
    data = config.data
    if source is None and data.encoding_errors not in (
        "strict",
        store.source.get("encoding_errors"),
    ):
        return "was made with --encoding_errors strict"
    is_asked = source is not None or data.chunk_size != DataConfig.chunk_size
    if is_asked and store.chunk_size != data.chunk_size:
        return f"has chunks of {store.chunk_size} tokens"
    return None


def _check_text_file(flag: str, path: str) -> None:
    if not Path(path).is_file():
        raise FileNotFoundError(f"{flag}: got {path!r}, which is not a file; check the path")
    if os.path.getsize(path) == 0:
        raise ValueError(f"{flag}: {path!r} is empty; need a UTF-8 text file")


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None


def _write_json(path: Path, content: Any) -> None:
    write_whole(path, json.dumps(content, indent=1).encode("utf-8"))


def _write_if_changed(path: Path, text: str) -> None:
    content = text.encode("utf-8")
    if path.is_file() and path.read_bytes() == content:
        return
    write_whole(path, content)
