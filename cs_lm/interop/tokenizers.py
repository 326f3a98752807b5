"""Tokenizers beside weights: each token setting in a folder's files is used or is an error."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from cs_lm.config.shared import DEFAULT_SPECIAL_TOKENS
from cs_lm.errors import UserError
from cs_lm.interop.layouts import HF, written_ids
from cs_lm.interop.sources import ADDED_TOKENS
from cs_lm.storage.json_file import read_json, write_json
from cs_lm.tokenizer import BPETokenizer
from cs_lm.tokenizer.formats import (
    read_tokenizer_json,
    read_written_names,
    write_tokenizer_json,
    written_names,
)

TOKENIZER_JSON = "tokenizer.json"
SPECIAL_MAP, CONFIG, GENERATION = (
    "special_tokens_map.json",
    "tokenizer_config.json",
    "generation_config.json",
)
_ROLES = (
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
    "additional_special_tokens",
)
_PAIRS = (("vocab.json", "merges.txt"), ("encoder.json", "vocab.bpe"))
PAD = "<|pad|>"


class _Named(NamedTuple):
    """A token that a file names; token_id is None if the file does not give it."""

    text: str
    token_id: int | None
    file: str


def read_tokenizer(folder: Path) -> BPETokenizer:
    """The byte-level tokenizer beside weights, from `tokenizer.json` or a pair of files.

    Tokens that other files of the folder name become special tokens, too. `end_tokens` are those
    that its settings name as ends of a text, or else the default special tokens.
    Raises: FileNotFoundError if there is none, UserError for another kind of tokenizer, or for
    files that contradict each other.
    """
    tokenizer = _read(folder)
    named = list(_named(folder))
    vocab, ids = dict(tokenizer.vocab), dict(tokenizer.id_of)
    specials = dict.fromkeys(tokenizer.special_tokens)
    by_file = {token.text: token for token in named if token.token_id is not None}
    texts = {}
    if (folder / TOKENIZER_JSON).is_file():
        texts = read_written_names(folder / TOKENIZER_JSON)
    for name, token_id, file in named:
        text = texts.get(name, name)
        if token_id is None and text in by_file:
            token_id = by_file[text].token_id
        have, token = ids.get(text.encode("utf-8")), text.encode("utf-8")
        if have is None and token_id is None:
            raise UserError(
                f"weights: {file} of {str(folder)!r} names the token {text!r}, which the "
                "vocabulary does not have; add it to added_tokens.json with its id, or take it out"
            )
        if have is None and token_id in vocab:
            raise UserError(
                f"weights: {file} of {str(folder)!r} gives {text!r} the id {token_id}, which is "
                f"that of {vocab[token_id]!r}"
            )
        if have is not None and token_id not in (None, have):
            raise UserError(
                f"weights: {file} of {str(folder)!r} gives {text!r} the id {token_id}, and the "
                f"vocabulary {have}"
            )
        if have is None:
            vocab[token_id], ids[token] = token, token_id
        specials[text] = None
    ends = _ends(folder, vocab)
    found = BPETokenizer(vocab, tokenizer.merges, list(specials))
    found.end_tokens = ends or [text for text in specials if text in DEFAULT_SPECIAL_TOKENS]
    return found


def _read(folder: Path) -> BPETokenizer:
    if (folder / TOKENIZER_JSON).is_file():  # it takes precedence over all other files
        return read_tokenizer_json(folder / TOKENIZER_JSON)
    for vocab, merges in _PAIRS:
        if (folder / vocab).is_file() and (folder / merges).is_file():
            tokenizer = BPETokenizer.from_files(folder / vocab, folder / merges)
            known = set(tokenizer.vocab.values())
            specials = [t for t in DEFAULT_SPECIAL_TOKENS if t.encode("utf-8") in known]
            return BPETokenizer(tokenizer.vocab, tokenizer.merges, specials)
    raise FileNotFoundError(
        f"weights: {str(folder)!r} has no tokenizer.json, nor vocab.json and merges.txt; give "
        "--vocab_path and --merges_path of the tokenizer"
    )


def _named(folder: Path) -> Iterator[_Named]:
    """Every token that the files beside the vocabulary name."""
    for text, token_id in _json(folder / ADDED_TOKENS).items():
        if type(token_id) is not int:
            raise UserError(f"weights: {ADDED_TOKENS} of {str(folder)!r} gives {text!r} no id")
        yield _Named(text, token_id, ADDED_TOKENS)
    config = _json(folder / CONFIG)
    for name in ("add_prefix_space", "add_bos_token", "add_eos_token"):
        if config.get(name):
            raise UserError(
                f"weights: {CONFIG} of {str(folder)!r} has {name}; need none: our tokenizer adds "
                "nothing to a text"
            )
    added = config.get("added_tokens_decoder") or {}
    for token_id, token in added.items() if isinstance(added, dict) else [("", None)]:
        is_sound = isinstance(token, dict) and isinstance(token.get("content"), str)
        if not is_sound or not token_id.isdecimal():
            raise UserError(
                f"weights: added_tokens_decoder in {CONFIG} of {str(folder)!r} has {token!r} for "
                f"{token_id!r}; need tokens with their content, by id"
            )
        for name in ("lstrip", "rstrip", "single_word"):
            if token.get(name):
                raise UserError(
                    f"weights: {CONFIG} of {str(folder)!r} has {name} for {token['content']!r}; "
                    "need none"
                )
        yield _Named(token["content"], int(token_id), CONFIG)
    for file, content in ((SPECIAL_MAP, _json(folder / SPECIAL_MAP)), (CONFIG, config)):
        for role in _ROLES:
            for text in _texts(content.get(role)):
                yield _Named(text, None, file)


def _texts(value: Any) -> list[str]:
    values = value if isinstance(value, list) else [value]
    found = [one.get("content") if isinstance(one, dict) else one for one in values]
    return [text for text in found if isinstance(text, str) and text]


def _ends(folder: Path, vocab: dict[int, bytes]) -> list[str]:
    """The tokens that end a text. Ids without a token are left out: they never occur."""
    for file in (GENERATION, HF):
        asked = _json(folder / file).get("eos_token_id")
        ids = [] if asked is None else asked if isinstance(asked, list) else [asked]
        if not all(type(i) is int for i in ids):
            raise UserError(
                f"weights: eos_token_id in {file} of {str(folder)!r} is {asked!r}; need a whole "
                "number, or a list of them"
            )
        try:
            found = [vocab[i].decode("utf-8") for i in ids if i in vocab]
        except UnicodeDecodeError:
            raise UserError(
                f"weights: eos_token_id in {file} of {str(folder)!r} names a token that is a part "
                "of a character; need one that is text"
            ) from None
        if found:
            return found
    return []


def _json(path: Path) -> dict[str, Any]:
    return read_json(path, "weights") if path.is_file() else {}


def pad_token(tokenizer: BPETokenizer, vocab_size: int) -> tuple[str, int] | None:
    """The token that pads the shorter rows of a batch, and its id; None without a free id.

    It is the first end of a text, or another special token, or an id of the model without a token.
    """
    ends = [text for text in tokenizer.end_tokens if text in tokenizer.special_tokens]
    for text in (*ends, *tokenizer.special_tokens):
        return text, tokenizer.id_of[text.encode("utf-8")]
    return (PAD, tokenizer.vocab_size) if tokenizer.vocab_size < vocab_size else None


def end_ids(tokenizer: BPETokenizer) -> list[int]:
    return [tokenizer.id_of[text.encode("utf-8")] for text in tokenizer.end_tokens]


def write_tokenizer(tokenizer: BPETokenizer, vocab_size: int, context: int, folder: Path) -> None:
    """Writes transformers' AutoTokenizer files, and GPT-2's pair of files for older versions."""
    tokenizer.save(folder / "vocab.json", folder / "merges.txt")
    pad = pad_token(tokenizer, vocab_size)
    is_new = pad is not None and pad[1] not in tokenizer.vocab
    write_tokenizer_json(tokenizer, folder / TOKENIZER_JSON, pad if is_new else None)
    names = written_names(tokenizer)
    roles: dict[str, Any] = {}
    ends = [names[text] for text in tokenizer.end_tokens if text in names]
    if ends:  # an end token that is ordinary text has no role: only eos_token_id names it
        roles["bos_token"] = roles["eos_token"] = ends[0]
    if pad is not None:
        roles["pad_token"] = names.get(pad[0], pad[0])
    write_json(folder / SPECIAL_MAP, roles)
    write_json(
        folder / CONFIG,
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": context,
            "padding_side": "left",
            "clean_up_tokenization_spaces": False,
            **roles,
            "model_input_names": ["input_ids", "attention_mask"],
        },
    )
    ids = written_ids(end_ids(tokenizer), None if pad is None else pad[1])
    write_json(folder / GENERATION, {name: i for name, i in ids.items() if i is not None})
