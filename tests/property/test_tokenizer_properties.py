from functools import cache

from hypothesis import given
from hypothesis import strategies as st

from cs_lm.tokenizer import BPETokenizer, bpe, fast_bpe
from cs_lm.tokenizer.pretokenizer import SpecialTokenSplitter, split_words
from cs_lm.tokenizer.word_counts import count_words

SPECIALS = ["<|endoftext|>", "<|endoftext|><|endoftext|>", "<|", "é"]
# Pieces that meet at awkward borders: white space of several kinds, contractions, halves of
# special tokens, letters and digits of other scripts, signs, combining marks.
PIECES = [
    " ", "  ", "\n", "\t", "\r\n", "\u00a0", "\u3000", "'", "'s", "'ll", "'l", "''", "a", "b",
    "the", "The", "1", "²", "Ⅷ", "北京", "é", "e\u0301", "🙂", "-", "...", "<", "<|", "|>",
    "<|endof", "text|>", "<|endoftext|>", "\u0000", "_", "don't", " 't", "\u200d", "ﬁ",
]  # fmt: skip
texts = st.one_of(st.text(), st.lists(st.sampled_from(PIECES)).map("".join))
small_words = st.dictionaries(st.text("abc", min_size=1).map(str.encode), st.integers(1, 5))


@cache
def tokenizer() -> BPETokenizer:
    counts = count_words(["".join(PIECES) * 3 + "the cat the hat, the end. don't " * 9])
    merges = fast_bpe.train_merges({w.encode(): n for w, n in counts.items()}, 80)
    tokens = [bytes([b]) for b in range(256)] + [a + b for a, b in merges]
    return BPETokenizer(dict(enumerate(dict.fromkeys(tokens))), merges, SPECIALS)


@given(texts)
def test_round_trip(text):
    assert tokenizer().decode(tokenizer().encode(text)) == text


@given(texts, st.data())
def test_any_cutting_gives_the_same_ids(text, data):
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)))))
    parts = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)])]
    expected = tokenizer().encode(text)
    assert list(tokenizer().encode_iterable(parts)) == expected
    for block_chars in (1, 2, 7):  # small blocks force a cut at nearly every border
        blocks = tokenizer().encode_blocks(parts, block_chars)
        assert [i for block in blocks for i in block] == expected


@given(texts, texts)
def test_what_precedes_a_safe_cut_never_changes(text, more):
    splitter = SpecialTokenSplitter(SPECIALS)
    cut = splitter.safe_cut(text)
    head, tail = tokenizer().encode(text[:cut]), tokenizer().encode(text[cut:] + more)
    assert head + tail == tokenizer().encode(text + more)


@given(texts)
def test_split_loses_nothing(text):
    assert "".join(split_words(text)) == text
    assert "".join(SpecialTokenSplitter(SPECIALS).split(text)) == text


@given(st.binary(max_size=60))
def test_decode_any_bytes(data):
    assert tokenizer().decode(list(data)) == data.decode("utf-8", "replace")


@given(small_words, st.integers(0, 20))
def test_fast_training_is_the_definition(word_counts, num_merges):
    expected = bpe.train_merges(word_counts, num_merges)
    assert fast_bpe.train_merges(word_counts, num_merges) == expected


@given(
    st.lists(st.tuples(*[st.text("ab", min_size=1, max_size=3).map(str.encode)] * 2), unique=True),
    st.text("ab", max_size=120).map(str.encode),
)
def test_fast_encoding_is_the_definition(merges, word):
    """For any list of merges, in any order, also one that no training would give."""
    ranks = {pair: rank for rank, pair in enumerate(merges)}
    expected = bpe.encode_word(word, ranks)
    assert fast_bpe.encode_word(word, ranks) == expected
    assert fast_bpe._encode_long_word(word, ranks) == expected
