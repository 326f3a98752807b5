"""`python -m cs_lm encode`: encodes a text with a tokenizer into a token store.

For a text that is too long for one machine: `--shard 3/64` encodes the third of 64 equal parts, on
any machine that sees the files, into a folder beside --store; `--join 64` then makes of the 64
folders the store that one process would have made, to the last byte.
"""

import logging
import re
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
from cs_lm.data.engines import ENGINES
from cs_lm.data.stores import EncodeOptions, encode_to_store, join_parts, part_folder
from cs_lm.errors import Problem, UserError
from cs_lm.storage.lock import writing_alone
from cs_lm.storage.manifest import MANIFEST
from cs_lm.tokenizer import BPETokenizer
from cs_lm.tokenizer.text_source import TextPart


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
    engine: str = setting(
        "ours",
        "what encodes; the others are compiled, quicker, and checked against ours",
        choices=("ours", *ENGINES),
    )
    shard: str | None = setting(None, "encode only part K of N of the text: K/N, from 1/N to N/N")
    join: int | None = setting(None, "make the store of the parts that --shard has made, so many")

    def validate(self) -> list[Problem]:
        found = []
        if self.shard is not None and _shard_of(self.shard) is None:
            need = "K/N with K from 1 to N, for example 3/64"
            found.append(Problem("--shard", f"got {self.shard!r}", need))
        if self.join is not None and self.join < 1:
            found.append(Problem("--join", f"got {self.join}", "1 or more"))
        for flag, given in (
            ("--shard", self.shard is not None),
            ("--engine", self.engine != "ours"),
            ("--num_workers", self.num_workers is not None),
        ):
            if self.join is not None and given:
                found.append(Problem(flag, "has no effect with --join", fix="leave it out"))
        if self.engine != "ours" and self.num_workers is not None:
            what = f"has no effect with --engine {self.engine}"
            found.append(Problem("--num_workers", what, fix="leave it out"))
        if not self.corpus_path:
            found.append(Problem("--corpus_path", "is missing", fix="name a UTF-8 text file, or -"))
        if not self.store:
            found.append(
                Problem("--store", "is missing", fix="name the folder that the store shall be")
            )
        elif self.folder.exists() and not (self.folder / MANIFEST).is_file():
            what = f"{str(self.folder)!r} exists and is no token store"
            found.append(Problem("--store", what, fix="name another folder"))
        elif self.folder.exists() and not self.overwrite:
            what = f"{str(self.folder)!r} exists"
            found.append(Problem("--store", what, fix="add --overwrite, or name another folder"))
        if not 1 <= self.chunk_size <= MAX_CHUNK_SIZE:
            found.append(
                Problem("--chunk_size", f"got {self.chunk_size}", f"1 to {MAX_CHUNK_SIZE}")
            )
        if self.num_workers is not None and self.num_workers < 1:
            found.append(Problem("--num_workers", f"got {self.num_workers}", "1 or more"))
        return found

    @property
    def folder(self) -> Path:
        """Where this call writes."""
        part = None if self.shard is None else _shard_of(self.shard)
        return Path(self.store) if part is None else part_folder(self.store, *part)


def _shard_of(text: str) -> tuple[int, int] | None:
    """Index from 0, and number of parts; None for another text."""
    found = re.fullmatch(r"(\d{1,6})/(\d{1,6})", text)
    if not found or not 1 <= int(found[1]) <= int(found[2]):
        return None
    return int(found[1]) - 1, int(found[2])


@readable_errors
def main(argv: Sequence[str] | None = None) -> int:
    config = parse_config(EncodeConfig, "python -m cs_lm encode", __doc__, argv)
    tokenizer = BPETokenizer.from_files(
        config.vocab_path, config.merges_path, config.special_tokens
    )
    text = text_of(config.corpus_path, config, config.special_tokens)
    if config.shard is not None:
        text = TextPart(text, *_shard_of(config.shard), tokenizer.first_border)
        if text.is_empty():
            print(f"part {config.shard} has no text: its files belong to other parts")
            return 0
    progress, folder = ProgressLine(), config.folder

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
            if config.join is not None:
                is_given = config.chunk_size != EncodeConfig.chunk_size
                size = config.chunk_size if is_given else None
                store = join_parts(text, tokenizer, folder, config.join, config.overwrite, size)
            else:
                options = EncodeOptions(
                    config.num_workers,
                    progress,
                    is_alone=lock.is_real,
                    replace=config.overwrite,
                    engine=config.engine,
                )
                store = encode_to_store(text, tokenizer, folder, config.chunk_size, options)
    finally:
        progress.close()
    text_bytes = store.manifest["text_bytes"]
    print(
        f"{len(store):,} tokens from {text_bytes:,} bytes ({text_bytes / len(store):.2f} bytes a "
        f"token) in {folder}"
    )
    return 0
