"""Ids of text without special tokens; what repeats is encoded once."""

from collections.abc import Callable, Mapping
from itertools import chain

from cs_lm.tokenizer.pieces import cut_pieces, words_of_piece

Ids = list[int]
# Longer pieces hardly ever come back.
_MAX_CACHED_CHARS = 64


class PieceEncoder(dict[str, Ids]):
    """Piece -> ids, filled as pieces are met; the bound is kept between two texts.

    encode_word     ids of one word
    one_token_words  the words that are a single token, most of any text: never cached
    max_pieces      pieces remembered, at about 200 bytes each

    Being a dict, it is looked up without a call into Python where a piece is known.
    """

    def __init__(
        self,
        encode_word: Callable[[str], Ids],
        one_token_words: Mapping[str, Ids],
        max_pieces: int,
    ):
        super().__init__()
        self._encode_word = encode_word
        self._one_token_words = one_token_words
        self._max_pieces = max_pieces
        self._words: dict[str, Ids] = {}

    def encode(self, text: str) -> Ids:
        if len(self) > self._max_pieces:
            self.clear()
        if len(self._words) > self._max_pieces:
            self._words.clear()
        ids: Ids = []
        for words, pieces in cut_pieces(text):
            for word in words:
                ids += self._ids_of_word(word)
            ids += chain.from_iterable(map(self.__getitem__, pieces))
        return ids

    def __missing__(self, piece: str) -> Ids:
        words = words_of_piece(piece)
        if len(words) == 1:
            ids = self._ids_of_word(words[0])
        else:
            ids = list(chain.from_iterable(map(self._ids_of_word, words)))
        if len(piece) <= _MAX_CACHED_CHARS:
            self[piece] = ids
        return ids

    def _ids_of_word(self, word: str) -> Ids:
        ids = self._one_token_words.get(word) or self._words.get(word)
        if ids is None:
            ids = self._encode_word(word)
            if len(word) <= _MAX_CACHED_CHARS:
                self._words[word] = ids
        return ids
