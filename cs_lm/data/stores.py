"""The token store of a corpus: found in data/, or encoded with the corpus's tokenizer."""

import json
import logging
from pathlib import Path
from typing import Any, NamedTuple

from cs_lm.config.data import DataConfig
from cs_lm.data.cache import STORE, cache_path, find_or_make, in_use, old_path, paths_of
from cs_lm.data.corpus import Corpus, label_of
from cs_lm.data.engines import CompiledEncoder
from cs_lm.data.token_store import MemmapManager, StoreOptions
from cs_lm.data.tokenizers import find_labelled_tokenizers
from cs_lm.errors import Problem, UserError
from cs_lm.storage.lock import FileLock
from cs_lm.storage.manifest import MANIFEST
from cs_lm.tokenizer import BPETokenizer
from cs_lm.tokenizer.parallel_encode import ParallelEncoder
from cs_lm.tokenizer.text_source import Progress, TextPart, TextSource

_log = logging.getLogger("cs_lm")


class UsedStore(NamedTuple):
    """A verified store. Nobody removes it while its lock is held."""

    store: MemmapManager
    lock: FileLock


def find_or_encode_store(
    corpus: Corpus, tokenizer: BPETokenizer, on_progress: Progress | None = None
) -> UsedStore:
    """The store of the corpus; encodes the corpus if there is none yet.

    Raises: UserError for a damaged store. It is not replaced, because a run may be reading it.
    """
    path = _path(corpus, tokenizer)

    def make(is_alone: bool) -> None:
        if path.exists():
            raise UserError(
                f"token store: {path} is damaged: it has no {MANIFEST}; delete the folder and "
                "start again"
            )
        _log.info("token store: encoding %s to %s", corpus.shown, path)
        options = EncodeOptions(
            on_progress=on_progress, is_alone=is_alone, expected=corpus.description
        )
        made = encode_to_store(corpus.open(), tokenizer, path, corpus.data.chunk_size, options)
        bytes_per_token = made.manifest["text_bytes"] / len(made)
        _log.info(
            "token store: wrote %s tokens, %.2f bytes each", f"{len(made):,}", bytes_per_token
        )

    store, lock = find_or_make(path, lambda: find_store(corpus, tokenizer), make)
    if store.folder != path:  # made by an earlier version, under another name
        lock = in_use(store.folder)
    return use_store(store, lock)


def find_store(corpus: Corpus, tokenizer: BPETokenizer) -> MemmapManager | None:
    """The store of the corpus; None if the corpus must be encoded first.

    Raises: UserError for a damaged one.
    """
    path = _path(corpus, tokenizer)
    if (path / MANIFEST).is_file():
        store = MemmapManager(path)
        if (why := _staleness_reason(store, tokenizer, corpus.data, corpus)) is not None:
            raise UserError(f"token store: {path} {why}; delete the folder")
        return store
    for old in (old_path(corpus.label, STORE), old_path(label_of(corpus.data), f"{STORE}_valid")):
        try:
            store = MemmapManager(old)
        except (ValueError, OSError):  # no usable store
            continue
        if _staleness_reason(store, tokenizer, corpus.data, corpus) is None:
            return store
    return None


def find_labelled_store(
    data: DataConfig, vocab_size: int, tokenizer: BPETokenizer | None
) -> tuple[MemmapManager, BPETokenizer]:
    """The store with the given label, and the tokenizer that it was made with.

    Raises: FileNotFoundError or UserError if no store fits, or more than one.
    """
    label = label_of(data)
    tokenizers = [tokenizer] if tokenizer else find_labelled_tokenizers(label, data, vocab_size)
    fit: dict[str, tuple[MemmapManager, BPETokenizer]] = {}
    reasons = []
    for path in paths_of(label, STORE):
        store = MemmapManager(path)
        for one in tokenizers:
            why = _staleness_reason(store, one, data, None)
            if why is None:
                fit.setdefault(json.dumps([store.source, store.chunk_size]), (store, one))
            else:
                reasons.append(f"{path} {why}")
    if len(fit) > 1:
        names = ", ".join(str(store.folder) for store, _ in fit.values())
        raise UserError(
            f"--corpus_size: {label!r} is the label of several token stores: {names}; use "
            "--corpus_path to choose the text"
        )
    if not fit:
        raise UserError(
            f"token store: {(reasons or ['it is gone'])[0]}; give --corpus_path to encode "
            f"the text again, or "
            "--vocab_path and --merges_path of the tokenizer it was made with"
        )
    return next(iter(fit.values()))


def _path(corpus: Corpus, tokenizer: BPETokenizer) -> Path:
    facts = [corpus.description, tokenizer.fingerprint, corpus.data.chunk_size]
    return cache_path(corpus.label, STORE, facts)


def use_store(store: MemmapManager, lock: FileLock) -> UsedStore:
    """The store, verified unless that was done since its files were written."""
    store.verify_once()
    _log.info("token store: %s, %s tokens", store.folder, f"{len(store):,}")
    return UsedStore(store, lock)


def _staleness_reason(
    store: MemmapManager, tokenizer: BPETokenizer, data: DataConfig, corpus: Corpus | None
) -> str | None:
    """Why a store cannot be used, or None. Without a corpus, default settings are not compared."""
    if store.fingerprint != tokenizer.fingerprint:
        return "was made with another tokenizer"
    if corpus is not None and store.source != corpus.description:
        return "was made from another text"
    is_lenient = data.encoding_errors not in ("strict", store.source.get("encoding_errors"))
    if corpus is None and is_lenient:
        return "was made with --encoding_errors strict"
    is_asked = corpus is not None or data.chunk_size != DataConfig.chunk_size
    if is_asked and store.chunk_size != data.chunk_size:
        return f"has chunks of {store.chunk_size} tokens"
    return None


class EncodeOptions(NamedTuple):
    """Options of `encode_to_store`.

    num_workers  processes; None: all cores for a large text
    is_alone     no other process can write to the folder: continue an interrupted encoding
    expected     the description of the text before it is read
    replace      replace an older store
    engine       "ours", or one of `ENGINES`
    """

    num_workers: int | None = None
    on_progress: Progress | None = None
    is_alone: bool = True
    expected: dict[str, Any] | None = None
    replace: bool = False
    engine: str = "ours"


def part_folder(folder: str | Path, index: int, count: int) -> Path:
    """The folder of part `index`, from 0, of `count` parts of the store that will be `folder`."""
    folder = Path(folder)
    return folder.with_name(f"{folder.name}.part-{index + 1:05d}-of-{count:05d}")


def join_parts(
    text: TextSource,
    tokenizer: BPETokenizer,
    folder: Path,
    count: int,
    replace: bool,
    chunk_size: int | None = None,
) -> MemmapManager:
    """The store of the text, from the stores of its parts; these stay.

    chunk_size  that the parts must have; None: any, the same for all
    Raises: UserError for a part that is missing, damaged, or of another text or tokenizer.
    """
    parts = []
    for index in range(count):
        path, shard = part_folder(folder, index, count), f"--shard {index + 1}/{count}"
        own = TextPart(text, index, count, tokenizer.first_border)
        if not (path / MANIFEST).is_file():
            if own.is_empty():
                continue
            what = f"{str(path)!r} is missing"
            raise UserError(Problem("--join", what, fix=f"encode it with {shard}"))
        part = MemmapManager(path)
        if chunk_size is None:
            chunk_size = part.chunk_size
        if part.source != json.loads(json.dumps(own.describe())):
            what = f"{str(path)!r} is of another text or other --special_tokens"
            fix = f"encode it again with {shard} --overwrite"
            raise UserError(Problem("--join", what, fix=fix))
        if part.fingerprint != tokenizer.fingerprint or part.chunk_size != chunk_size:
            what = f"{str(path)!r} was made with another tokenizer or --chunk_size"
            fix = "give --join the flags of --shard, or encode that part again with --overwrite"
            raise UserError(Problem("--join", what, fix=fix))
        part.verify_once()
        parts.append(part)
    return MemmapManager.join(parts, folder, text.describe(), replace)


def encode_to_store(
    text: TextSource,
    tokenizer: BPETokenizer,
    folder: Path,
    chunk_size: int,
    options: EncodeOptions,
) -> MemmapManager:
    """A store of the text, encoded by several processes.

    Raises: UserError when the text changed while it was being read.
    """
    report = options.on_progress or (lambda *_: None)

    def describe() -> dict[str, Any]:
        found = text.description()
        if options.expected is not None and found != options.expected:
            raise UserError(
                f"corpus: {', '.join(map(str, text.paths[:3]))} changed while it was being read; "
                "start again when no program writes to it"
            )
        return found

    def on_tokens(num_tokens: int) -> None:
        remark = f"{text.position}{num_tokens:,} tokens"
        report("encoding, bytes read", text.bytes_read, text.total_bytes, remark)

    if options.engine == "ours":
        encoder = ParallelEncoder(tokenizer, text.num_workers(options.num_workers))
    else:
        encoder = CompiledEncoder(tokenizer, options.engine)
    key = text.key() if options.is_alone else None
    how = StoreOptions(describe, on_tokens, key, options.replace)
    return MemmapManager.save_as_memmap(text.read(), encoder, folder, chunk_size, how)
