"""Words encoded in windows are what the definition makes of them."""

import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cs_lm.tokenizer import BPETokenizer, bpe, fast_bpe, long_words
from cs_lm.tokenizer.merge_table import MergeTable
from cs_lm.tokenizer.tokenizer import LONG_WORD_BYTES

BYTES = {i: bytes([i]) for i in range(256)}


def trained(text: bytes, num_merges: int) -> BPETokenizer:
    """A vocabulary that training makes of one word: with long tokens, if it repeats itself."""
    merges = fast_bpe.train_merges({text: 1}, num_merges)
    tokens = list(dict.fromkeys(a + b for a, b in merges))
    return BPETokenizer(BYTES | {256 + i: token for i, token in enumerate(tokens)}, merges)


def by_definition(tokenizer: BPETokenizer, word: bytes) -> list[int]:
    ids = {token: token_id for token_id, token in tokenizer.vocab.items()}
    ranks = {pair: rank for rank, pair in enumerate(tokenizer.merges)}
    return [ids[token] for token in bpe.encode_word(word, ranks)]


@pytest.fixture
def small_windows(monkeypatch):
    """So small that tokens reach across them and windows often do not join."""
    monkeypatch.setattr(long_words, "_SIZES", ((4, 3), (9, 5)))


@given(data=st.data())
def test_any_word_in_any_windows(data):
    letters = data.draw(st.sampled_from([b"a", b"ab", b"abc", b"abcdefgh", bytes(range(60, 90))]))
    of_letters = st.lists(st.sampled_from(list(letters)), min_size=1, max_size=120).map(bytes)
    tokenizer = trained(data.draw(of_letters), data.draw(st.integers(0, 40)))
    word = data.draw(of_letters) * data.draw(st.integers(1, 3))
    sizes = data.draw(st.sampled_from([((1, 1), (2, 1)), ((4, 3), (9, 5)), ((16, 16), (5, 2))]))
    before, long_words._SIZES = long_words._SIZES, sizes
    try:
        merges = tokenizer._merges
        if merges.is_proper:
            ids = long_words.encode_long_word(word, merges, tokenizer._encode_whole)
            assert ids.tolist() == by_definition(tokenizer, word)
    finally:
        long_words._SIZES = before


@pytest.mark.parametrize(
    "letters", ["0123456789", "ACGT", "=", "ab", "".join(map(chr, range(0x4E00, 0x4E80)))]
)
def test_a_long_word(letters):
    chosen = random.Random(0)
    word = "".join(chosen.choice(letters) for _ in range(3 * LONG_WORD_BYTES)).encode()
    tokenizer = trained(word[:LONG_WORD_BYTES], 200)
    assert tokenizer._merges.is_proper
    assert tokenizer.encode(word.decode()) == by_definition(tokenizer, word)


def test_what_windows_cannot_do_is_done_whole():
    """Merges that no training makes: a token made in two ways, or before its parts."""
    for merges in (
        [(b"a", b"b"), (b"b", b"c"), (b"ab", b"c"), (b"a", b"bc")],
        [(b"ab", b"c"), (b"a", b"b")],
    ):
        tokens = dict.fromkeys(a + b for a, b in merges)
        tokenizer = BPETokenizer(BYTES | {256 + i: t for i, t in enumerate(tokens)}, merges)
        assert not tokenizer._merges.is_proper
        word = b"abcbcab" * LONG_WORD_BYTES
        assert tokenizer.encode(word.decode()) == by_definition(tokenizer, word)


def test_a_missing_byte_is_named():
    tokenizer = BPETokenizer({1: b"a", 2: b"b", 3: b"ab"}, [(b"a", b"b")])
    with pytest.raises(ValueError, match="byte b'c' of 'abab.* is not in the vocabulary"):
        tokenizer.encode("ab" * LONG_WORD_BYTES + "c")


def test_sure_borders_by_hand():
    merges = MergeTable({(b"a", b"b"): 0, (b"ab", b"c"): 1}, {})
    assert merges.sure_borders(b"abcab").tolist() == [3]
    assert merges.sure_borders(b"cba").tolist() == [1, 2]
    assert np.array_equal(MergeTable({}, {}).sure_borders(b"xyz"), [1, 2])
