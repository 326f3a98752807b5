from functools import cache

import pytest
import regex
from hypothesis import given, settings
from hypothesis import strategies as st

from cs_lm.tokenizer import BPETokenizer, bpe, fast_bpe, pair_index
from cs_lm.tokenizer.merge_table import MergeTable
from cs_lm.tokenizer.pretokenizer import SpecialTokenSplitter, split_words
from cs_lm.tokenizer.word_boundaries import character_classes, word_starts
from cs_lm.tokenizer.word_counts import count_words
from cs_lm.tokenizer.word_encoder import WordEncoder
from cs_lm.tokenizer.word_table import WordTable

SPECIALS = ["<|endoftext|>", "<|endoftext|><|endoftext|>", "<|", "é"]
# Pieces that meet at awkward borders: white space of several kinds, contractions, halves of
# special tokens, letters and digits of other scripts, signs, combining marks.
PIECES = [
    " ",
    "  ",
    "\n",
    "\t",
    "\r\n",
    "\u00a0",
    "\u3000",
    "'",
    "'s",
    "'ll",
    "'l",
    "''",
    "a",
    "b",
    "the",
    "The",
    "1",
    "²",
    "Ⅷ",
    "北京",
    "é",
    "e\u0301",
    "🙂",
    "-",
    "...",
    "<",
    "<|",
    "|>",
    "<|endof",
    "text|>",
    "<|endoftext|>",
    "\u0000",
    "_",
    "don't",
    " 't",
    "\u200d",
    "ﬁ",
]
texts = st.one_of(st.text(), st.lists(st.sampled_from(PIECES)).map("".join))
small_words = st.dictionaries(st.text("abc", min_size=1).map(str.encode), st.integers(1, 200))


@cache
def tokenizer() -> BPETokenizer:
    counts = count_words(["".join(PIECES) * 3 + "the cat the hat, the end. don't " * 9])
    merges = fast_bpe.train_merges(counts, 80)
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


@pytest.mark.parametrize("few, small", [(64, 100_000), (0, 0), (10**9, 0)])
@given(small_words, st.integers(0, 20))
def test_fast_training_is_the_definition(few, small, word_counts, num_merges):
    """In a loop and in arrays, with all pairs kept and with the frequent ones alone."""
    expected = bpe.train_merges(word_counts, num_merges)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pair_index, "_FEW_PLACES", few)
        patch.setattr(pair_index, "_SMALL", small)
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
    assert fast_bpe.merge_tokens(bpe.as_single_bytes(word), ranks) == expected


def words_by_starts(text):
    data, starts = text.encode(), word_starts(text).tolist()
    return [data[a:b].decode() for a, b in zip(starts, [*starts[1:], len(data)])]


@given(texts)
def test_borders_from_arrays_are_those_of_the_pattern(text):
    assert words_by_starts(text) == split_words(text)


@given(st.text(" \n\t\u00a0a'sdtmvrel1.", max_size=30))
@settings(max_examples=500)
def test_white_space_and_contractions_are_cut_as_the_pattern_does(text):
    assert words_by_starts(text) == split_words(text)


def test_character_classes_are_those_of_the_pattern():
    classes = character_classes()
    for code in [*range(0x3100), 0xE000, 0x1F642, 0x20000, 0x10FFFF]:
        if 0xD800 <= code < 0xE000:
            continue
        kinds = [regex.match(kind, chr(code)) for kind in (r"\p{L}", r"\p{N}", r"\s")]
        expected = next((i for i, kind in enumerate(kinds, start=1) if kind), 0)
        assert min(classes[code], 3) == expected, hex(code)


@given(st.lists(texts, max_size=4), st.sampled_from([1, 4, 100]))
def test_equal_numbers_are_equal_words(parts, capacity):
    table, known = WordTable(capacity), {}
    for text in parts:
        words = [word.encode() for word in split_words(text)]
        numbers, new = table.numbers(text.encode(), word_starts(text))
        for place in new.tolist():
            assert known.setdefault(words[place], len(known)) == len(known) - 1
        for word, number in zip(words, numbers.tolist(), strict=True):
            assert number == (known[word] if len(word) <= 16 and 0 not in word else -1)
    assert table.count == len(known)


@given(
    st.lists(st.tuples(*[st.text("ab", min_size=1, max_size=3).map(str.encode)] * 2), unique=True),
    st.lists(st.text("ab", min_size=1, max_size=30).map(str.encode), min_size=1, max_size=6),
)
def test_encoding_many_words_is_the_definition(merges, words):
    ranks = {pair: rank for rank, pair in enumerate(merges)}
    tokens = {token for pair in merges for token in (*pair, pair[0] + pair[1])} | {b"a", b"b"}
    ids = {token: i for i, token in enumerate(sorted(tokens))}
    encoded, lengths = MergeTable(ranks, ids).encode_words(words)
    expected = [[ids[token] for token in bpe.encode_word(word, ranks)] for word in words]
    assert lengths.tolist() == list(map(len, expected))
    assert encoded.tolist() == [i for word_ids in expected for i in word_ids]


@given(st.lists(texts, min_size=1, max_size=5), st.sampled_from([8, 16, 64]))
def test_forgetting_words_changes_nothing(parts, max_words):
    """A table that holds next to nothing gives the same ids, text after text."""
    plain = BPETokenizer(tokenizer().vocab, tokenizer().merges)
    merges = MergeTable({pair: rank for rank, pair in enumerate(plain.merges)}, plain.id_of)
    encoder = WordEncoder(merges, plain._encode_word, max_words)
    for text in parts:
        assert [i for ids in encoder.encode([text]) for i in ids.tolist()] == plain.encode(text)
