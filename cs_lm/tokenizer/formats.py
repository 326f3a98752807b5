"""Vocabularies of other tools: `tokenizer.json` of the tokenizers library, tiktoken's rank file."""

import base64
import binascii
import json
from collections.abc import Mapping, Sequence
from operator import itemgetter
from pathlib import Path
from typing import Any

from cs_lm.errors import MissingError, Problem, UserError
from cs_lm.storage.atomic import atomic_write
from cs_lm.storage.json_file import read_json
from cs_lm.tokenizer.bpe import Pair, as_single_bytes
from cs_lm.tokenizer.byte_encoder import name_of_token, token_of_name
from cs_lm.tokenizer.tokenizer import BPETokenizer

# In the tokenizers library: GPT-2's split pattern, and bytes written as their names.
_BYTE_LEVEL = {
    "type": "ByteLevel",
    "add_prefix_space": False,
    "trim_offsets": True,
    "use_regex": True,
}


def write_tokenizer_json(
    tokenizer: BPETokenizer, path: str | Path, pad_token: tuple[str, int] | None = None
) -> None:
    """Writes a file for `tokenizers.Tokenizer.from_file`, which then gives the same ids as we do.

    pad_token  one more token and its id; no text contains it

    A special token can look like the name of another token (`é` is the name of the byte 0xE9).
    The library would confuse the two. Such a token gets a private name in the file: the normalizer
    writes it into the text, and the decoder replaces it by the token's text. Merges with the bytes
    of a special token are left out if its name in the file is not the name of its bytes. No text
    needs these merges, because the special token is cut out first.
    """
    name_of_id = {i: name_of_token(token) for i, token in sorted(tokenizer.vocab.items())}
    id_of = tokenizer.id_of
    special = {text: id_of[text.encode("utf-8")] for text in tokenizer.special_tokens}
    contents = written_names(tokenizer)
    for text, token_id in special.items():
        name_of_id[token_id] = contents[text]
    if pad_token is not None:
        name_of_id[pad_token[1]] = pad_token[0]
        special, contents = (
            {**special, pad_token[0]: pad_token[1]},
            {**contents, pad_token[0]: pad_token[0]},
        )
    added = [
        {
            "id": token_id,
            "content": contents[text],
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": contents[text] != text,
            "special": True,
        }
        for text, token_id in sorted(special.items(), key=itemgetter(1))
    ]
    longest_first = sorted(contents.items(), key=lambda pair: -len(pair[0]))
    renamed = {text: name for text, name in longest_first if name != text}
    unused = {
        data for text in special if name_of_token(data := text.encode("utf-8")) != contents[text]
    }
    merges = [
        [name_of_token(a), name_of_token(b)]
        for a, b in tokenizer.merges
        if not unused & {a, b, a + b}
    ]
    decoder = [_BYTE_LEVEL, *(_replaced(name, text) for text, name in renamed.items())]
    content = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": _sequence("normalizers", [_replaced(*pair) for pair in renamed.items()]),
        "pre_tokenizer": _BYTE_LEVEL,
        "post_processor": None,
        "decoder": _sequence("decoders", decoder),
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {name: i for i, name in name_of_id.items()},
            "merges": merges,
        },
    }
    atomic_write(path, json.dumps(content, ensure_ascii=False).encode("utf-8"))


def written_names(tokenizer: BPETokenizer) -> dict[str, str]:
    """Special token -> its name in files of the tokenizers library: for most tokens, its text."""
    special = {text.encode("utf-8") for text in tokenizer.special_tokens}
    taken = {name_of_token(token) for token in tokenizer.vocab.values() if token not in special}
    renamed = {t for t in tokenizer.special_tokens if t in taken or _is_other_name(t)}
    # the private names replace texts before special tokens are searched, so that tokens which
    # contain each other must all be renamed
    overlapping = {
        text
        for text in tokenizer.special_tokens
        if any(text in other or other in text for other in renamed)
    }
    ids = tokenizer.id_of
    return {
        text: _private_name(ids[text.encode("utf-8")]) if text in overlapping else text
        for text in tokenizer.special_tokens
    }


def _is_other_name(text: str) -> bool:
    """Whether the text is also a byte-level name, but of other bytes than its own."""
    try:
        return token_of_name(text) != text.encode("utf-8")
    except ValueError:
        return False


def _private_name(token_id: int) -> str:
    """Two private-use characters of Unicode: no text has them."""
    return chr(0xF0000 + (token_id >> 15)) + chr(0xF0000 + (token_id & 0x7FFF))


def _replaced(pattern: str, content: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": {"String": pattern}, "content": content}


def _sequence(kind: str, parts: list[dict]) -> dict[str, Any] | None:
    if len(parts) < 2:
        return parts[0] if parts else None
    return {"type": "Sequence", kind: parts}


def read_tokenizer_json(path: str | Path) -> BPETokenizer:
    """The tokenizer of a `tokenizer.json`, if it is byte-level BPE with GPT-2's split pattern.

    Settings of padding and truncation are ignored: they belong to the code that makes batches.
    Raises: FileNotFoundError, or UserError with every setting of the file that we do not support.
    """
    content = read_json(_existing(path), "tokenizer.json")
    try:
        added = {token["content"]: token["id"] for token in content.get("added_tokens") or []}
        renamed = _refuse_other_kinds(content, path)
        special = {renamed.get(name, name): token_id for name, token_id in added.items()}
        names = content["model"]["vocab"]
        vocab = {i: token_of_name(name) for name, i in names.items() if name not in added}
        vocab.update((i, text.encode("utf-8")) for text, i in special.items())
        merges = [
            tuple(map(token_of_name, pair.split(" ") if isinstance(pair, str) else pair))
            for pair in content["model"]["merges"]
        ]
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"tokenizer.json: cannot read {str(path)!r} ({type(error).__name__}: {error})"
        ) from None
    return BPETokenizer(vocab, merges, list(special))


def read_written_names(path: str | Path) -> dict[str, str]:
    """Name -> text, for special tokens of a `tokenizer.json` whose name is not their text."""
    return _refuse_other_kinds(read_json(_existing(path), "tokenizer.json"), path)


def write_tiktoken(tokenizer: BPETokenizer, path: str | Path) -> None:
    """Writes the rank file that `tiktoken.load.load_tiktoken_bpe` reads, without special tokens.

    Raises: UserError when ids do not rise with the merges: tiktoken uses the id as the rank.
    """
    ids = tokenizer.id_of
    merged = [ids[a + b] for a, b in tokenizer.merges]
    if merged != sorted(merged):
        raise UserError(
            "tiktoken: the token ids are not in the order of the merges; tiktoken merges in the "
            "order of ids, and would encode differently"
        )
    special = {text.encode("utf-8") for text in tokenizer.special_tokens}
    lines = [
        f"{base64.b64encode(token).decode('ascii')} {token_id}\n"
        for token_id, token in sorted(tokenizer.vocab.items())
        if token not in special
    ]
    atomic_write(path, "".join(lines).encode("utf-8"))


def read_tiktoken(
    path: str | Path, special_tokens: Mapping[str, int] | Sequence[str] = ()
) -> BPETokenizer:
    """The tokenizer of a rank file, for use with GPT-2's split pattern.

    special_tokens  token -> id, or tokens that get the next free ids
    The file has no merges. A token's merge is found by merging its bytes with all lower ranks:
    that leaves the two tokens of the merge.
    Raises: FileNotFoundError, or UserError with the line that is not a token and a rank.
    """
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(
        _existing(path).read_text(encoding="utf-8").splitlines(), start=1
    ):
        try:
            encoded, rank = line.split()
            ranks[base64.b64decode(encoded, validate=True)] = int(rank)
        except (ValueError, binascii.Error):
            raise UserError(
                f"tiktoken: line {number} of {str(path)!r} is {line!r}; need a token in base64 "
                "and its rank"
            ) from None
    vocab = {rank: token for token, rank in ranks.items()}
    if isinstance(special_tokens, Mapping):
        vocab.update((i, text.encode("utf-8")) for text, i in special_tokens.items())
    pairs = (_pair_of(vocab[rank], rank, ranks) for rank in sorted(ranks.values()))
    return BPETokenizer(vocab, [pair for pair in pairs if pair], list(special_tokens))


def _pair_of(token: bytes, rank: int, ranks: Mapping[bytes, int]) -> Pair | None:
    """The two tokens that remain after all merges below the rank; None if not exactly two do."""
    parts = as_single_bytes(token)
    while len(parts) > 2:
        joined = [ranks.get(a + b, rank) for a, b in zip(parts, parts[1:])]
        best = min(joined)
        if best >= rank:
            return None
        i = joined.index(best)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return (parts[0], parts[1]) if len(parts) == 2 else None


def _refuse_other_kinds(content: dict[str, Any], path: str | Path) -> dict[str, str]:
    """Name in the file -> text, for added tokens whose name is not their text.

    Raises: UserError with every setting of the file that we do not support.
    """
    model, before = content.get("model") or {}, content.get("pre_tokenizer") or {}
    wrong = []
    if model.get("type") != "BPE":
        wrong.append(f"model {model.get('type')}, need BPE")
    if before.get("type") != "ByteLevel" or not before.get("use_regex", True):
        wrong.append(f"pre_tokenizer {before.get('type')}, need ByteLevel with GPT-2's pattern")
    if before.get("add_prefix_space"):
        wrong.append("add_prefix_space, need none")
    added = {token.get("content"): token for token in content.get("added_tokens") or []}
    renamed, normalizer = {}, content.get("normalizer")
    for part in (normalizer or {}).get("normalizers") or ([normalizer] if normalizer else []):
        text, name = (part.get("pattern") or {}).get("String"), part.get("content")
        if part.get("type") == "Replace" and text and name in added:
            renamed[name] = text
        else:
            wrong.append(f"normalizer {part.get('type')}, need none")
    after = content.get("post_processor") or {}
    if after.get("type") not in (None, "ByteLevel") and not _adds_nothing(after):
        wrong.append(f"post_processor {after.get('type')}, need none: it adds tokens to a text")
    for name in (
        "ignore_merges",
        "byte_fallback",
        "continuing_subword_prefix",
        "end_of_word_suffix",
        "dropout",
    ):
        if model.get(name):
            wrong.append(f"{name}, need none")
    for token in added.values():
        for name in ("lstrip", "rstrip", "single_word"):
            if token.get(name):
                wrong.append(f"{name} of the added token {token['content']!r}, need none")
    if wrong:
        raise UserError(f"tokenizer.json: {str(path)!r} has {'; '.join(wrong)}")
    return renamed


def _adds_nothing(after: dict[str, Any]) -> bool:
    """Whether the template has only the text. transformers always writes a template."""
    parts = after.get("single") or []
    return after.get("type") == "TemplateProcessing" and all("Sequence" in part for part in parts)


def _existing(path: str | Path) -> Path:
    if not Path(path).is_file():
        raise MissingError(Problem("tokenizer", f"got {str(path)!r}, which is not a file"))
    return Path(path)
