"""From tokens to text, streamed as soon as it is certain."""

import codecs
from collections.abc import Callable, Sequence
from typing import Protocol

import torch

from cs_lm.errors import UserError
from cs_lm.inference.generate import generate_tokens
from cs_lm.inference.sampling import DecodingConfig
from cs_lm.models.base import LanguageModel


class TextTokenizer(Protocol):
    """The part of a tokenizer that text generation needs."""

    vocab: dict[int, bytes]
    special_tokens: list[str]
    end_tokens: list[str]

    def encode(self, text: str) -> list[int]: ...


class TextStream:
    """Turns tokens into text, never into half a character or the start of a stop string.

    `push` returns the text that is certain by now; `close` returns the rest.
    """

    def __init__(self, vocab: dict[int, bytes], stop: Sequence[str] = ()):
        self._vocab = vocab
        self._stop = [text for text in stop if text]
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._held = ""
        self.stopped = False

    def push(self, token_id: int) -> str:
        return self._advance(self._decoder.decode(self._vocab[token_id]))

    def close(self) -> str:
        rest = self._advance(self._decoder.decode(b"", final=True))
        rest, self._held = rest + self._held, ""
        return rest

    def _advance(self, text: str) -> str:
        if self.stopped:
            return ""
        self._held += text
        found = [(self._held.find(stop) + len(stop), stop) for stop in self._stop]
        found = [(end, stop) for end, stop in found if end >= len(stop)]
        if found:  # the stop string that ends first, whatever the token borders are
            self.stopped = True
            end, stop = min(found)
            shown, self._held = self._held[: end - len(stop)], ""
            return shown
        certain = len(self._held) - self._length_of_possible_stop()
        shown, self._held = self._held[:certain], self._held[certain:]
        return shown

    def _length_of_possible_stop(self) -> int:
        """How many characters at the end of the text may be the start of a stop string."""
        longest = max(map(len, self._stop), default=1) - 1
        for length in range(min(longest, len(self._held)), 0, -1):
            if any(stop.startswith(self._held[-length:]) for stop in self._stop):
                return length
        return 0


def generate_text(
    model: LanguageModel,
    tokenizer: TextTokenizer,
    prompts: Sequence[str],
    config: DecodingConfig,
    show: Callable[[int, str], None] | None = None,
) -> list[str]:
    """The model's text after each prompt, up to a stop token or a stop string.

    Several samples of a prompt are consecutive rows: row i is sample i % num_samples.

    show  called with (row, new text) as soon as text is certain, for streaming
    Raises: UserError for an empty prompt, or a stop token that the tokenizer does not have.
    """
    size = model.config.vocab_size
    usable = torch.tensor([i in tokenizer.vocab for i in range(size)])
    stop_ids = stop_ids_of(tokenizer, config.stop_token)
    prompts = [prompt for prompt in prompts for _ in range(config.num_samples)]
    streams = [TextStream(tokenizer.vocab, config.stop) for _ in prompts]
    texts = [""] * len(prompts)
    finished = [False] * len(prompts)

    def add(row: int, text: str) -> None:
        texts[row] += text
        if text and show:
            show(row, text)

    ids = [tokenizer.encode(prompt) for prompt in prompts]
    for new_ids in generate_tokens(model, ids, config, finished, stop_ids, usable):
        for row, token_id in enumerate(new_ids):
            if token_id is not None:
                add(row, streams[row].push(token_id))
                finished[row] = streams[row].stopped
    for row, stream in enumerate(streams):
        add(row, stream.close())
    return texts


def stop_ids_of(tokenizer: TextTokenizer, asked: Sequence[str]) -> frozenset[int]:
    """The ids that end a text. Raises: UserError for a text that is no special token."""
    unknown = [token for token in asked if token not in tokenizer.special_tokens]
    if unknown:
        raise UserError(
            f"--stop_token: got {unknown[0]!r}, need special tokens of the model: "
            f"{', '.join(tokenizer.special_tokens) or 'it has none'}; use --stop for other text"
        )
    ends = {token.encode("utf-8") for token in asked or tokenizer.end_tokens}
    return frozenset(i for i, token in tokenizer.vocab.items() if token in ends)
