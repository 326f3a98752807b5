"""Our tokenizer beside tiktoken and the tokenizers library, on GPT-2's vocabulary and real text."""

import lzma
import random

import pytest

from cs_lm.tokenizer import BPETokenizer, train_bpe
from cs_lm.tokenizer.formats import (
    read_tiktoken,
    read_tokenizer_json,
    write_tiktoken,
    write_tokenizer_json,
)
from cs_lm.tokenizer.pretokenizer import SPLIT_PATTERN

END = "<|endoftext|>"
AWKWARD = f"I'll   go\n\n {END}naïve 北京 🙂🙂 1234567 x²  \t\r\n don't''s {END}{END} \u3000end  "


@pytest.fixture(scope="module")
def gpt2(corpora) -> BPETokenizer:
    return BPETokenizer.from_files(
        corpora / "gpt2" / "vocab.json", corpora / "gpt2" / "merges.txt", [END]
    )


@pytest.fixture(scope="module")
def shakespeare(corpora) -> str:
    return (corpora / "tinyshakespeare.txt").read_text(encoding="utf-8")


def test_equal_to_tiktoken(gpt2, shakespeare):
    tiktoken = pytest.importorskip("tiktoken", reason="tiktoken is not installed")
    ranks = {token: i for i, token in gpt2.vocab.items() if token != END.encode()}
    theirs = tiktoken.Encoding(
        "gpt2", pat_str=SPLIT_PATTERN, mergeable_ranks=ranks, special_tokens={END: 50256}
    )
    for text in (AWKWARD, shakespeare, "=" * 5000, " " * 5000, "北" * 3000):
        assert gpt2.encode(text) == theirs.encode(text, allowed_special="all")
    for letters in ("0123456789", "ACGT", "etaoin", "".join(map(chr, range(0x4E00, 0x5E00)))):
        word = "".join(random.Random(0).choices(letters, k=20_000))
        assert gpt2.encode(word) == theirs.encode(word)


def test_special_tokens_and_surrogates_as_tiktoken_has_them(gpt2):
    tiktoken = pytest.importorskip("tiktoken", reason="tiktoken is not installed")
    ranks = {token: i for i, token in gpt2.vocab.items() if token != END.encode()}
    theirs = tiktoken.Encoding(
        "gpt2", pat_str=SPLIT_PATTERN, mergeable_ranks=ranks, special_tokens={END: 50256}
    )
    for text in (AWKWARD, "a\ud800b\udc00", "\ud83d\ude42"):
        for settings in (
            {"allowed_special": "all"},
            {"allowed_special": set(), "disallowed_special": ()},
            {"allowed_special": {END}, "disallowed_special": "all"},
        ):
            expected = theirs.encode(text, **settings)
            assert gpt2.encode(text, **settings) == expected
            assert list(gpt2.encode_iterable([text], **settings)) == expected
    settings = {"allowed_special": set(), "disallowed_special": "all"}
    for one in (theirs, gpt2):
        with pytest.raises(ValueError, match="endoftext"):
            one.encode(AWKWARD, **settings)


def test_tokenizers_reads_our_files(shakespeare, tmp_path):
    tokenizers = pytest.importorskip("tokenizers", reason="tokenizers is not installed")
    path = tmp_path / "text.txt"
    path.write_text(shakespeare[:300_000], encoding="utf-8")
    vocab, merges = train_bpe(path, 700, [END])
    ours = BPETokenizer(vocab, merges, [END])
    ours.save(tmp_path / "vocab.json", tmp_path / "merges.txt")
    theirs = tokenizers.ByteLevelBPETokenizer(
        str(tmp_path / "vocab.json"), str(tmp_path / "merges.txt")
    )
    theirs.add_special_tokens([END])
    for text in (AWKWARD, shakespeare[300_000:400_000]):
        assert theirs.encode(text).ids == ours.encode(text)


@pytest.fixture(scope="module")
def ours(shakespeare, tmp_path_factory) -> BPETokenizer:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(shakespeare[:300_000], encoding="utf-8")
    specials = [END, "<|a b|>"]
    vocab, merges = train_bpe(path, 700, specials)
    return BPETokenizer(vocab, merges, specials)


def test_tokenizers_loads_our_tokenizer_json(ours, shakespeare, tmp_path):
    tokenizers = pytest.importorskip("tokenizers", reason="tokenizers is not installed")
    write_tokenizer_json(ours, tmp_path / "tokenizer.json")
    theirs = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    for text in (AWKWARD, f"x<|a b|>{END}<|a b|> y", shakespeare[300_000:400_000]):
        assert theirs.encode(text).ids == ours.encode(text)
        assert theirs.decode(ours.encode(text), skip_special_tokens=False) == text
    assert theirs.get_vocab_size() == ours.vocab_size


def test_we_load_their_tokenizer_json(ours, shakespeare, tmp_path):
    tokenizers = pytest.importorskip("tokenizers", reason="tokenizers is not installed")
    theirs = tokenizers.ByteLevelBPETokenizer()
    theirs.train_from_iterator([shakespeare[:200_000]], vocab_size=600, special_tokens=[END])
    theirs.save(str(tmp_path / "tokenizer.json"))
    read = read_tokenizer_json(tmp_path / "tokenizer.json")
    for text in (AWKWARD, shakespeare[300_000:350_000]):
        assert read.encode(text) == theirs.encode(text).ids


def test_tiktoken_loads_our_rank_file(ours, shakespeare, tmp_path):
    tiktoken = pytest.importorskip("tiktoken", reason="tiktoken is not installed")
    from tiktoken.load import load_tiktoken_bpe

    write_tiktoken(ours, tmp_path / "a.tiktoken")
    special = {text: ours.encode(text)[0] for text in ours.special_tokens}
    theirs = tiktoken.Encoding(
        "ours",
        pat_str=SPLIT_PATTERN,
        special_tokens=special,
        mergeable_ranks=load_tiktoken_bpe(str(tmp_path / "a.tiktoken")),
    )
    for text in (AWKWARD, f"x<|a b|>{END}", shakespeare[300_000:400_000]):
        assert theirs.encode(text, allowed_special="all") == ours.encode(text)
    read = read_tiktoken(tmp_path / "a.tiktoken", special)
    assert (read.vocab, read.merges) == (ours.vocab, ours.merges)


def test_merges_of_gpt2_are_found_again_from_ranks(gpt2, tmp_path):
    write_tiktoken(gpt2, tmp_path / "gpt2.tiktoken")
    read = read_tiktoken(tmp_path / "gpt2.tiktoken", [END])
    assert read.merges == gpt2.merges and read.fingerprint == gpt2.fingerprint


@pytest.mark.slow
@pytest.mark.parametrize("which", ["gpt2", "ours"])
def test_equal_ids_on_whole_books(which, gpt2, ours, corpora, tmp_path):
    """4 MB of text, with GPT-2's vocabulary and with one of ours."""
    tiktoken = pytest.importorskip("tiktoken", reason="tiktoken is not installed")
    tokenizers = pytest.importorskip("tokenizers", reason="tokenizers is not installed")
    if not (corpora / "books-valid.txt.xz").is_file():
        pytest.skip(f"{corpora} holds no books-valid.txt.xz")
    text = lzma.decompress((corpora / "books-valid.txt.xz").read_bytes()).decode("utf-8")
    tokenizer = {"gpt2": gpt2, "ours": ours}[which]
    ids = tokenizer.encode(text)
    special = {token: tokenizer.encode(token)[0] for token in tokenizer.special_tokens}
    ranks = {
        t: i for i, t in tokenizer.vocab.items() if t.decode("utf-8", "replace") not in special
    }
    encoding = tiktoken.Encoding(
        "x", pat_str=SPLIT_PATTERN, mergeable_ranks=ranks, special_tokens=special
    )
    assert ids == encoding.encode(text, allowed_special="all")
    write_tokenizer_json(tokenizer, tmp_path / "tokenizer.json")
    theirs = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert ids == theirs.encode(text).ids
    assert tokenizer.decode(ids) == text
