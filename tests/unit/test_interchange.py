import json

import pytest

from cs_lm.tokenizer import BPETokenizer, train_bpe
from cs_lm.tokenizer.formats import (
    read_tiktoken,
    read_tokenizer_json,
    write_tiktoken,
    write_tokenizer_json,
)

TEXT = "The cat sat; the hat didn't. Déjà vu: 北京 🙂\n\n" * 9


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> BPETokenizer:
    path = tmp_path_factory.mktemp("t") / "t.txt"
    path.write_text(TEXT, encoding="utf-8")
    return BPETokenizer(*train_bpe(path, 300, ["<|é|>", "<|end|>"]), ["<|é|>", "<|end|>"])


def test_round_trips(tokenizer, tmp_path):
    write_tokenizer_json(tokenizer, tmp_path / "new" / "tokenizer.json")
    write_tiktoken(tokenizer, tmp_path / "a.tiktoken")
    special = {text: tokenizer.encode(text)[0] for text in tokenizer.special_tokens}
    for read in (
        read_tokenizer_json(tmp_path / "new" / "tokenizer.json"),
        read_tiktoken(tmp_path / "a.tiktoken", special),
        read_tiktoken(tmp_path / "a.tiktoken", tokenizer.special_tokens),
    ):
        assert read.fingerprint == tokenizer.fingerprint
        assert read.encode(TEXT + "<|end|>") == tokenizer.encode(TEXT + "<|end|>")


def test_what_we_would_do_otherwise_is_refused(tokenizer, tmp_path):
    path = tmp_path / "tokenizer.json"
    write_tokenizer_json(tokenizer, path)
    good = json.loads(path.read_text(encoding="utf-8"))
    for changes, message in [
        ({"model": {**good["model"], "type": "WordPiece"}}, "has model WordPiece, need BPE"),
        ({"pre_tokenizer": {"type": "Whitespace"}}, "pre_tokenizer Whitespace, need ByteLevel"),
        ({"pre_tokenizer": {**good["pre_tokenizer"], "add_prefix_space": True}}, "add_prefix_spa"),
        ({"normalizer": {"type": "NFC"}}, "normalizer NFC, need none"),
        ({"model": {**good["model"], "byte_fallback": True}}, "byte_fallback, need none"),
    ]:
        path.write_text(json.dumps({**good, **changes}), encoding="utf-8")
        with pytest.raises(ValueError, match=message):
            read_tokenizer_json(path)
    path.write_text("[]", encoding="utf-8")
    with pytest.raises(ValueError, match=r"tokenizer.json: .* cannot be read \(no JSON object\)"):
        read_tokenizer_json(path)
    with pytest.raises(FileNotFoundError, match="which is not a file"):
        read_tiktoken(tmp_path / "no")
    (tmp_path / "bad").write_text("YQ== 0\n??? 1\n", encoding="utf-8")
    with pytest.raises(ValueError, match="tiktoken: line 2 of .* need a token in base64"):
        read_tiktoken(tmp_path / "bad")


def test_ids_that_do_not_follow_the_merges_are_no_ranks(tmp_path):
    vocab = {**{i: bytes([i]) for i in range(256)}, 256: b"cd", 257: b"ab"}
    with pytest.raises(ValueError, match="ids are not in the order of the merges"):
        write_tiktoken(BPETokenizer(vocab, [(b"a", b"b"), (b"c", b"d")]), tmp_path / "x")
