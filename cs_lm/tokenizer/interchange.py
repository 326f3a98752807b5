"""Vocabularies of other tools: `tokenizer.json` of the tokenizers library, tiktoken's rank file."""

import base64
import binascii
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cs_lm.tokenizer.bpe import Pair, as_single_bytes
from cs_lm.tokenizer.byte_names import name_of_token, token_of_name
from cs_lm.tokenizer.tokenizer import BPETokenizer
from cs_lm.whole_file import write_whole

# How the tokenizers library says "GPT-2's split pattern, bytes by their names".
_BYTE_LEVEL = {
    "type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True,
}  # fmt: skip


def write_tokenizer_json(tokenizer: BPETokenizer, path: str | Path) -> None:
    """Writes what `tokenizers.Tokenizer.from_file` reads: the same ids for every text."""
    special = set(tokenizer.special_tokens)
    names = {}
    for token_id, token in sorted(tokenizer.vocab.items()):
        text = token.decode("utf-8", "replace")
        names[text if text in special else name_of_token(token)] = token_id
    added = [
        {"id": names[text], "content": text, "single_word": False, "lstrip": False,
         "rstrip": False, "normalized": False, "special": True}
        for text in tokenizer.special_tokens
    ]  # fmt: skip
    merges = [[name_of_token(a), name_of_token(b)] for a, b in tokenizer.merges]
    content = {
        "version": "1.0", "truncation": None, "padding": None,
        "added_tokens": sorted(added, key=lambda token: token["id"]),
        "normalizer": None, "pre_tokenizer": _BYTE_LEVEL, "post_processor": None,
        "decoder": _BYTE_LEVEL,
        "model": {
            "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
            "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False,
            "ignore_merges": False, "vocab": names, "merges": merges,
        },
    }  # fmt: skip
    write_whole(path, json.dumps(content, ensure_ascii=False).encode("utf-8"))


def read_tokenizer_json(path: str | Path) -> BPETokenizer:
    """The tokenizer of a `tokenizer.json`, if it is byte-level BPE with GPT-2's split pattern.

    Raises: FileNotFoundError, or ValueError naming what we would do otherwise than that file says.
    """
    content = _read_json(path)
    _refuse_other_kinds(content, path)
    special = {token["content"]: token["id"] for token in content.get("added_tokens", [])}
    names = content["model"]["vocab"]
    vocab = {i: token_of_name(name) for name, i in names.items() if name not in special}
    vocab.update((i, text.encode("utf-8")) for text, i in special.items())
    merges = [
        tuple(map(token_of_name, pair.split(" ") if isinstance(pair, str) else pair))
        for pair in content["model"]["merges"]
    ]
    return BPETokenizer(vocab, merges, list(special))


def write_tiktoken(tokenizer: BPETokenizer, path: str | Path) -> None:
    """Writes the rank file that `tiktoken.load.load_tiktoken_bpe` reads, without special tokens.

    Raises: ValueError where ids do not rise with the merges: tiktoken takes the id for the rank.
    """
    ids = {token: token_id for token_id, token in tokenizer.vocab.items()}
    merged = [ids[a + b] for a, b in tokenizer.merges]
    if merged != sorted(merged):
        raise ValueError(
            "tiktoken: got a vocabulary whose ids do not follow its merges; tiktoken merges in the "
            "order of ids and would encode otherwise"
        )
    special = {text.encode("utf-8") for text in tokenizer.special_tokens}
    lines = [
        f"{base64.b64encode(token).decode('ascii')} {token_id}\n"
        for token_id, token in sorted(tokenizer.vocab.items())
        if token not in special
    ]
    write_whole(path, "".join(lines).encode("utf-8"))


def read_tiktoken(
    path: str | Path, special_tokens: Mapping[str, int] | Sequence[str] = ()
) -> BPETokenizer:
    """The tokenizer of a rank file, for use with GPT-2's split pattern.

    special_tokens  token -> id, or tokens that get the ids behind the others
    The merges are found again: each token was made of the two that lower ranks leave of it.
    Raises: FileNotFoundError, or ValueError naming a line that is no token and rank.
    """
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(_read(path).splitlines(), start=1):
        try:
            encoded, rank = line.split()
            ranks[base64.b64decode(encoded, validate=True)] = int(rank)
        except (ValueError, binascii.Error):
            raise ValueError(
                f"tiktoken: line {number} of {str(path)!r} is {line!r}; need a token in base64 "
                "and its rank"
            ) from None
    vocab = {rank: token for token, rank in ranks.items()}
    if isinstance(special_tokens, Mapping):
        vocab.update((i, text.encode("utf-8")) for text, i in special_tokens.items())
    pairs = (_pair_of(vocab[rank], rank, ranks) for rank in sorted(ranks.values()))
    return BPETokenizer(vocab, [pair for pair in pairs if pair], list(special_tokens))


def _pair_of(token: bytes, rank: int, ranks: Mapping[bytes, int]) -> Pair | None:
    """The two tokens that merges below the rank leave of a token; None if it is made otherwise."""
    parts = as_single_bytes(token)
    while len(parts) > 2:
        joined = [ranks.get(a + b, rank) for a, b in zip(parts, parts[1:])]
        best = min(joined)
        if best >= rank:
            return None
        i = joined.index(best)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return (parts[0], parts[1]) if len(parts) == 2 else None


def _refuse_other_kinds(content: dict[str, Any], path: str | Path) -> None:
    model, before = content.get("model") or {}, content.get("pre_tokenizer") or {}
    wrong = []
    if model.get("type") != "BPE":
        wrong.append(f"model {model.get('type')}, need BPE")
    if before.get("type") != "ByteLevel" or not before.get("use_regex", True):
        wrong.append(f"pre_tokenizer {before.get('type')}, need ByteLevel with GPT-2's pattern")
    if before.get("add_prefix_space"):
        wrong.append("add_prefix_space, need none")
    if content.get("normalizer") is not None:
        wrong.append(f"normalizer {content['normalizer'].get('type')}, need none")
    for name in ("ignore_merges", "byte_fallback", "continuing_subword_prefix"):
        if model.get(name):
            wrong.append(f"{name}, need none")
    if wrong:
        raise ValueError(f"tokenizer.json: {str(path)!r} has {'; '.join(wrong)}")


def _read(path: str | Path) -> str:
    if not Path(path).is_file():
        raise FileNotFoundError(f"tokenizer: got {str(path)!r}, which is not a file")
    return Path(path).read_text(encoding="utf-8")


def _read_json(path: str | Path) -> dict[str, Any]:
    try:
        content = json.loads(_read(path))
        if not isinstance(content, dict):
            raise ValueError("no object")
    except ValueError as error:
        raise ValueError(f"tokenizer.json: cannot read {str(path)!r} ({error})") from None
    return content
