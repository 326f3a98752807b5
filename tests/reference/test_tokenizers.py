"""Our tokenizer beside tiktoken and the tokenizers library, on GPT-2's vocabulary and real text."""

import pytest

from cs_lm.tokenizer import BPETokenizer, train_bpe
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
