"""GPT-2's own pair of files: `vocab.json` and `merges.txt`."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cs_lm.errors import MissingError, Problem, UserError
from cs_lm.storage.atomic import atomic_write
from cs_lm.tokenizer.bpe import Pair
from cs_lm.tokenizer.byte_encoder import name_of_token, token_of_name


def read_gpt2_files(
    vocab_path: str | Path, merges_path: str | Path
) -> tuple[dict[int, bytes], list[Pair]]:
    """The vocabulary (id -> bytes) and the merges.

    Raises: MissingError, or UserError with the file that cannot be read.
    """
    for path, flag in ((vocab_path, "--vocab_path"), (merges_path, "--merges_path")):
        if not Path(path).is_file():
            what = f"got {str(path)!r}, which is not a file"
            fix = "name an existing one, or train a tokenizer first"
            raise MissingError(Problem(flag, what, fix=fix))
    try:
        text = Path(vocab_path).read_text(encoding="utf-8")
        names = json.loads(text, object_pairs_hook=_without_repetition)
        if not all(type(token_id) is int for token_id in names.values()):
            raise TypeError("an id is not an integer")
        vocab = {token_id: token_of_name(name) for name, token_id in names.items()}
        if len(vocab) != len(names):
            raise TypeError("two tokens have the same id")
    except (ValueError, AttributeError, TypeError, RecursionError) as error:
        what = f"{str(vocab_path)!r} is not a vocab.json ({error})"
        fix = "need a JSON object of token names and ids"
        raise UserError(Problem("--vocab_path", what, fix=fix)) from None
    try:
        lines = Path(merges_path).read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError as error:
        what = f"{str(merges_path)!r} is not UTF-8 ({error})"
        raise UserError(Problem("--merges_path", what)) from None
    merges = []
    for number, line in enumerate(lines, start=1):
        if not line or (number == 1 and line.startswith("#version")):
            continue
        pair = line.rstrip("\r").split(" ")
        if len(pair) != 2:
            what = f"line {number} of {str(merges_path)!r} is {line!r}"
            fix = "need two tokens with one space between"
            raise UserError(Problem("--merges_path", what, fix=fix))
        try:
            merges.append((token_of_name(pair[0]), token_of_name(pair[1])))
        except UserError as error:
            what = f"line {number} of {str(merges_path)!r} cannot be read ({error})"
            raise UserError(Problem("--merges_path", what)) from None
    return vocab, merges


def write_gpt2_files(
    vocab: Mapping[int, bytes],
    merges: Sequence[Pair],
    vocab_path: str | Path,
    merges_path: str | Path,
) -> None:
    """Writes both files. The vocabulary has special tokens under the names of their bytes."""
    names = {name_of_token(token): i for i, token in sorted(vocab.items())}
    lines = [f"{name_of_token(a)} {name_of_token(b)}" for a, b in merges]
    for path, text in (
        (vocab_path, json.dumps(names, ensure_ascii=False)),
        (merges_path, "\n".join(["#version: 0.2", *lines, ""])),
    ):
        atomic_write(path, text.encode("utf-8"))


def _without_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise UserError("a token name occurs twice")
    return found
