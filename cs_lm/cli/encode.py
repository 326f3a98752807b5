"""`python -m cs_lm encode`: encodes a text with a tokenizer into a token store."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cs_lm.cli._errors import readable_errors
from cs_lm.cli._progress import ProgressLine
from cs_lm.config.data import MAX_CHUNK_SIZE
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
from cs_lm.data.stores import EncodeOptions, encode_to_store
from cs_lm.errors import Problem, UserError
from cs_lm.storage.lock import writing_alone
from cs_lm.storage.manifest import MANIFEST
from cs_lm.tokenizer import BPETokenizer


@dataclass(frozen=True)
class EncodeConfig:
    corpus_path: tuple[str, ...] = corpora_setting("text to encode")
    vocab_path: str = setting("vocab.json", "the tokenizer's vocabulary")
    merges_path: str = setting("merges.txt", "the tokenizer's merges")
    special_tokens: tuple[str, ...] = special_tokens_setting()
    store: str = setting("", "folder of the token store; required, data/<label>_chunks for a run")
    num_workers: int | None = setting(None, "processes; default: all cores for a large text")
    chunk_size: int = setting(500_000, "length of a file of the store", "tokens")
    encoding_errors: str = encoding_errors_setting()
    text_field: str = text_field_setting()
    document_separator: str | None = document_separator_setting()
    overwrite: bool = setting(False, "replace an existing store")

    def validate(self) -> list[Problem]:
        found = []
        if not self.corpus_path:
            found.append(Problem("--corpus_path", "is missing", fix="name a UTF-8 text file, or -"))
        if not self.store:
            found.append(
                Problem("--store", "is missing", fix="name the folder that the store shall be")
            )
        elif Path(self.store).exists() and not (Path(self.store) / MANIFEST).is_file():
            found.append(
                Problem(
                    "--store",
                    f"{self.store!r} exists and is no token store",
                    fix="name another folder",
                )
            )
        elif Path(self.store).exists() and not self.overwrite:
            found.append(
                Problem(
                    "--store",
                    f"{self.store!r} exists",
                    fix="add --overwrite, or name another folder",
                )
            )
        if not 1 <= self.chunk_size <= MAX_CHUNK_SIZE:
            found.append(
                Problem("--chunk_size", f"got {self.chunk_size}", f"1 to {MAX_CHUNK_SIZE}")
            )
        if self.num_workers is not None and self.num_workers < 1:
            found.append(Problem("--num_workers", f"got {self.num_workers}", "1 or more"))
        return found


@readable_errors
def main(argv: Sequence[str] | None = None) -> int:
    config = parse_config(EncodeConfig, "python -m cs_lm encode", __doc__, argv)
    tokenizer = BPETokenizer.from_files(
        config.vocab_path, config.merges_path, config.special_tokens
    )
    text = text_of(config.corpus_path, config, config.special_tokens)
    progress, folder = ProgressLine(), Path(config.store)

    def on_wait() -> None:
        logging.getLogger("cs_lm").info("waiting: another process is writing %s", folder)

    try:
        with writing_alone(folder, on_wait) as lock:
            if (folder / MANIFEST).is_file() and not config.overwrite:
                raise UserError(
                    Problem(
                        "--store", f"{str(folder)!r} exists", fix="add --overwrite, or name another"
                    )
                )
            options = EncodeOptions(
                config.num_workers, progress, is_alone=lock.is_real, replace=config.overwrite
            )
            store = encode_to_store(text, tokenizer, folder, config.chunk_size, options)
    finally:
        progress.close()
    text_bytes = store.manifest["text_bytes"]
    print(
        f"{len(store):,} tokens from {text_bytes:,} bytes ({text_bytes / len(store):.2f} bytes a "
        f"token) in {config.store}"
    )
    return 0
