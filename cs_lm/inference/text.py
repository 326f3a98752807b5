"""From tokens to text, streamed as soon as it is certain."""

import codecs
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from cs_lm.errors import UserError
from cs_lm.inference.decoding_config import DecodingConfig
from cs_lm.inference.generate import Sample, generate_samples
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


class Completion(NamedTuple):
    """A text after a prompt, up to a stop token or a stop text, and the tokens it came from.

    finish_reason  "stop", or "length" for `max_new_tokens`
    """

    text: str
    sample: Sample
    finish_reason: str


def complete(
    model: LanguageModel,
    tokenizer: TextTokenizer,
    prompts: Sequence[str],
    config: DecodingConfig,
    show: Callable[[int, str], None] | None = None,
) -> list[Completion]:
    """`config.num_samples` consecutive completions of each prompt.

    show  called with (row, new text) as soon as text is certain, for streaming. Beam search and
          `best_of` know their text at the end only, and do not call it before.
    Raises: UserError for an empty prompt, a stop token that the tokenizer does not have, or
    allowed characters of which no token consists.
    """
    stop_ids = stop_ids_of(tokenizer, config.stop_token)
    allowed = allowed_ids(tokenizer, model.config.vocab_size, config.allowed_characters, stop_ids)
    if not prompts:
        return []
    ids = [tokenizer.encode(prompt) for prompt in prompts]
    is_streamed = config.num_beams == 1 and config.best_of is None
    num_rows = len(prompts) * config.num_rows
    streams = [TextStream(tokenizer.vocab, config.stop) for _ in range(num_rows)]
    texts = [""] * num_rows

    def add(row: int, text: str) -> None:
        texts[row] += text
        if text and show:
            show(row, text)

    def on_token(row: int, token_id: int) -> bool:
        text = streams[row].push(token_id)
        if is_streamed:
            add(row, text)
        return streams[row].stopped

    samples = generate_samples(model, ids, config, stop_ids, allowed, on_token)
    if not is_streamed:  # the samples are others than the rows
        streams = [TextStream(tokenizer.vocab, config.stop) for _ in samples]
        for row, sample in enumerate(samples):
            for token_id in sample.token_ids:
                add(row, streams[row].push(token_id))
    for row, stream in enumerate(streams):
        add(row, stream.close())
    return [
        Completion(text, sample, "stop" if sample.stopped or stream.stopped else "length")
        for text, sample, stream in zip(texts, samples, streams)
    ]


def generate_text(
    model: LanguageModel,
    tokenizer: TextTokenizer,
    prompts: Sequence[str],
    config: DecodingConfig,
    show: Callable[[int, str], None] | None = None,
) -> list[str]:
    """The texts of `complete`."""
    return [found.text for found in complete(model, tokenizer, prompts, config, show)]


def allowed_ids(
    tokenizer: TextTokenizer, vocab_size: int, characters: str | None, stop_ids: frozenset[int]
) -> Tensor:
    """(V) boolean: the ids that the tokenizer has; with `characters`, those made of them alone.

    The ids that end a text are always allowed.
    Raises: UserError if no other token is left.
    """
    ids = list(tokenizer.vocab)
    if characters is not None:
        wanted, special = set(characters), {t.encode("utf-8") for t in tokenizer.special_tokens}
        ids = [
            i
            for i, token in tokenizer.vocab.items()
            if token not in special and set(token.decode("utf-8", "replace")) <= wanted
        ]
        if not ids:
            raise UserError(
                f"--allowed_characters: got {characters!r}, need characters of which at least one "
                "token consists"
            )
    allowed = torch.zeros(vocab_size, dtype=torch.bool)
    allowed[[i for i in (*ids, *stop_ids) if i < vocab_size]] = True
    return allowed


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
