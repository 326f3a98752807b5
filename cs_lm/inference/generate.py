"""From scores to text: filters on scores, generation with a key-value cache, safe streaming."""

import codecs
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from cs_lm.config.fields import setting
from cs_lm.errors import UserError
from cs_lm.models.base import LanguageModel, evaluating, new_cache
from cs_lm.ops.reference import softmax


@dataclass(frozen=True)
class DecodingConfig:
    """How the next token is chosen, and when to stop."""

    max_new_tokens: int = setting(200, "at most this many", "tokens")
    temperature: float = setting(0.8, "scores are divided by it; 0: always the most likely token")
    top_k: int | None = setting(None, "choose among the k most likely tokens", "tokens")
    top_p: float | None = setting(
        None, "choose among the most likely tokens that together reach this probability"
    )
    repetition_penalty: float = setting(1.0, "above 1 makes tokens that stand already less likely")
    repetition_window: int | None = setting(
        None, "the penalty looks back this far; default: everything", "tokens"
    )
    stop: tuple[str, ...] = setting((), "text that ends the sample; it is not shown")
    stop_token: tuple[str, ...] = setting(
        (), "special tokens that end the sample; default: the end-of-text token alone"
    )
    num_samples: int = setting(1, "texts after each prompt, each with draws of its own")
    slide: int = setting(
        1, "positions dropped at once beyond the context; more is quicker", "tokens"
    )
    seed: int = setting(0, "the sample follows from it")

    def problems(self) -> list[str]:
        checks = [
            ("max_new_tokens", self.max_new_tokens >= 1, "1 or more"),
            (
                "temperature",
                self.temperature == 0 or 1e-6 <= self.temperature < math.inf,
                "0, or at least 1e-6",
            ),
            ("top_k", self.top_k is None or self.top_k >= 1, "1 or more"),
            ("top_p", self.top_p is None or 0 < self.top_p <= 1, "above 0, at most 1"),
            ("repetition_penalty", 0 < self.repetition_penalty < math.inf, "above 0"),
            (
                "repetition_window",
                self.repetition_window is None or self.repetition_window >= 1,
                "1 or more",
            ),
            ("stop", all(self.stop), "at least one character each"),
            ("num_samples", self.num_samples >= 1, "1 or more"),
            ("slide", self.slide >= 1, "1 or more"),
            ("seed", 0 <= self.seed < 1 << 63, "0 or more, below 2^63"),
        ]
        found = [
            f"--{n}: got {getattr(self, n)}, need {need}" for n, good, need in checks if not good
        ]
        if self.num_samples > 1 and self.temperature == 0:
            found.append("--num_samples: all are the same at --temperature 0; leave one out")
        for name in ("top_k", "top_p"):
            if self.temperature == 0 and getattr(self, name) is not None:
                found.append(f"--{name}: has no effect at --temperature 0; leave one of them out")
        if self.repetition_window is not None and self.repetition_penalty == 1.0:
            found.append("--repetition_window: has no effect without --repetition_penalty")
        return found


# ---- filters: pure functions on scores (..., V), which return scores of the same shape ----


def apply_temperature(scores: Tensor, temperature: float) -> Tensor:
    """Above 1 flattens the distribution, below 1 sharpens it. `temperature` > 0."""
    return scores / temperature


def keep_top_k(scores: Tensor, k: int) -> Tensor:
    """-inf for all but the k highest scores; of equal ones at the border, those that sort first."""
    k = min(k, scores.shape[-1])
    values, places = scores.topk(k, dim=-1)
    return torch.full_like(scores, -math.inf).scatter(-1, places, values)


def keep_top_p(scores: Tensor, p: float) -> Tensor:
    """-inf outside the smallest set of likeliest tokens whose probabilities sum to at least p.

    The likeliest token always stays. Source: Holtzman et al. 2020, nucleus sampling.
    """
    values, places = scores.sort(dim=-1, descending=True, stable=True)
    probabilities = softmax(values)
    mass_before = probabilities.cumsum(-1) - probabilities
    kept = values.masked_fill(mass_before >= p, -math.inf)
    kept[..., 0] = values[..., 0]
    return torch.empty_like(scores).scatter(-1, places, kept)


def penalise_repetition(scores: Tensor, token_ids: Tensor, penalty: float) -> Tensor:
    """Scores of the given tokens made smaller: positive ones divided, negative ones multiplied.

    A token that occurs several times is penalised once. Shapes: scores (..., V), token_ids (..., N)
    Source: Keskar et al. 2019, CTRL, made sign-aware.
    """
    old = scores.gather(-1, token_ids)
    return scores.scatter(-1, token_ids, torch.where(old > 0, old / penalty, old * penalty))


class NotANumberError(UserError):
    """What a model with weights that are not finite makes of any text."""


_NOT_NUMBERS = "the model's scores are not numbers (NaN)"


def choose_token(
    scores: Tensor, history: Sequence[int], config: DecodingConfig, generator: torch.Generator
) -> int:
    """The next token of one sequence from its scores (V) on the CPU.

    Raises: NotANumberError for scores with a NaN among them; a look costs nothing until then.
    """
    if config.repetition_penalty != 1.0:
        window = config.repetition_window or len(history)
        recent = torch.tensor(history[-window:], dtype=torch.int64)
        scores = penalise_repetition(scores, recent, config.repetition_penalty)
    if config.temperature == 0:
        chosen = int(scores.argmax())
        if math.isnan(scores[chosen]):
            raise NotANumberError(_NOT_NUMBERS)
        return chosen
    scores = apply_temperature(scores, config.temperature)
    if config.top_k is not None:
        scores = keep_top_k(scores, config.top_k)
    if config.top_p is not None:
        scores = keep_top_p(scores, config.top_p)
    try:
        return int(torch.multinomial(softmax(scores), 1, generator=generator))
    except RuntimeError:
        if scores.isnan().any():
            raise NotANumberError(_NOT_NUMBERS) from None
        raise


# ---- generation ----


class _Reader:
    """Feeds sequences of different length to a model in one batch and gives their last scores.

    Rows are padded on the left; positions count from each row's own first token, and padding is
    masked, so a row's scores do not depend on its neighbours. Only beyond the context do rows
    share something: with `slide` > 1, all of them drop their oldest positions at the same time.
    """

    def __init__(self, model: LanguageModel, rows: Sequence[list[int]], max_new: int, slide: int):
        self._model, self._slide = model, slide
        self._context = model.config.context_length
        longest = max(map(len, rows))
        self._cache = new_cache(model, len(rows), min(self._context, longest + max_new))

    def scores(self, rows: Sequence[list[int]]) -> Tensor:
        """Scores (B, V) after rows of which all but the newest token may have been read before."""
        if self._cache.length == 0:
            return self._read_window(rows, self._context)
        if self._cache.length < self._cache.capacity:
            newest = torch.tensor([[row[-1]] for row in rows])
            return self._read(newest, self._num_padding)
        return self._read_window(rows, max(1, self._context - self._slide + 1))

    def _read_window(self, rows: Sequence[list[int]], length: int) -> Tensor:
        windows = [row[-length:] for row in rows]
        width = max(map(len, windows))
        self._cache.clear()
        self._num_padding = [width - len(window) for window in windows]
        ids = torch.tensor([[0] * (width - len(w)) + w for w in windows])
        return self._read(ids, self._num_padding)

    def _read(self, ids: Tensor, num_padding: list[int]) -> Tensor:
        device = self._model.head_weight.device
        seen, end = self._cache.length, self._cache.length + ids.shape[1]
        positions = mask = None
        if any(num_padding):
            padding = torch.tensor(num_padding).unsqueeze(-1)  # (B, 1)
            positions = (torch.arange(seen, end) - padding).clamp(min=0).to(device)  # (B, T)
            is_real = torch.arange(end) >= padding  # (B, S)
            mask = is_real.unsqueeze(1).expand(-1, ids.shape[1], -1).to(device)  # (B, T, S)
        hidden = self._model.hidden_states(ids.to(device), positions, mask, self._cache)
        return self._model.scores_of(hidden[:, -1])  # (B, V)


@torch.inference_mode()
def token_steps(
    model: LanguageModel,
    prompts: Sequence[Sequence[int]],
    config: DecodingConfig,
    finished: list[bool],
    stop_ids: frozenset[int] = frozenset(),
    usable_ids: Tensor | None = None,
) -> Iterator[list[int | None]]:
    """Step after step, the new token of each row, or None for a row that has finished.

    A row finishes at a stop id, which is not given out, or when the caller sets its place in
    `finished`. Each row draws from a generator of its own that follows from (seed, row).

    usable_ids  (V) boolean; ids outside are never chosen
    Raises: ValueError for an empty prompt or an id outside the model's vocabulary.
    """
    if found := config.problems():
        raise ValueError("\n".join(found))
    rows = [list(prompt) for prompt in prompts]
    for row in rows:
        check_prompt(row, model.config.vocab_size)
    generators = [
        torch.Generator().manual_seed((config.seed * 1_000_003 + row) % (1 << 63))
        for row in range(len(rows))
    ]
    reader = _Reader(model, rows, config.max_new_tokens, config.slide)
    for _ in range(config.max_new_tokens):
        with evaluating(model):
            scores = reader.scores(rows).float().cpu()
        if usable_ids is not None:
            scores = scores.masked_fill(~usable_ids, -math.inf)
        new_ids: list[int | None] = []
        for i, row in enumerate(rows):
            token_id = None
            if not finished[i]:
                token_id = choose_token(scores[i], row, config, generators[i])
                if token_id in stop_ids:
                    finished[i], token_id = True, None
            row.append(0 if token_id is None else token_id)
            new_ids.append(token_id)
        yield new_ids
        if all(finished):
            return


def check_prompt(token_ids: Sequence[int], vocab_size: int) -> None:
    if not token_ids:
        raise ValueError("--prompt: got an empty prompt, need at least one token; give some text")
    wrong = [i for i in token_ids if not 0 <= i < vocab_size]
    if wrong:
        raise ValueError(
            f"prompt: got token id {wrong[0]}, need 0 to {vocab_size - 1}; was the prompt encoded "
            "with another tokenizer?"
        )


def generate(
    model: LanguageModel,
    prompts: Sequence[Sequence[int]],
    config: DecodingConfig,
    stop_ids: Sequence[int] = (),
) -> list[list[int]]:
    """The new token ids after each prompt, without the prompt and the stop id."""
    finished = [False] * len(prompts)
    outputs: list[list[int]] = [[] for _ in prompts]
    for new_ids in token_steps(model, prompts, config, finished, frozenset(stop_ids)):
        for output, token_id in zip(outputs, new_ids):
            if token_id is not None:
                output.append(token_id)
    return outputs


# ---- text ----


class TextTokenizer(Protocol):
    """What text generation needs of a tokenizer."""

    vocab: dict[int, bytes]
    special_tokens: list[str]
    end_tokens: list[str]

    def encode(self, text: str) -> list[int]: ...


class TextStream:
    """Tokens in, text out, never half a character and never the beginning of a stop string.

    `push` returns what is certain by now; `close` returns what is left.
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
        if found:  # the one that is complete first, however the text came in tokens
            self.stopped = True
            end, stop = min(found)
            shown, self._held = self._held[: end - len(stop)], ""
            return shown
        certain = len(self._held) - self._length_of_possible_stop()
        shown, self._held = self._held[:certain], self._held[certain:]
        return shown

    def _length_of_possible_stop(self) -> int:
        """How much of the end of the text may be the beginning of a stop string."""
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
    """What the model writes after each prompt; it ends at a stop token or a stop string.

    With several samples, those of a prompt stand side by side: row i is sample i % num_samples.

    show  called with (row, new text) as soon as text is certain, for streaming
    Raises: ValueError for an empty prompt, or a stop token that the tokenizer does not have.
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
    for new_ids in token_steps(model, ids, config, finished, stop_ids, usable):
        for row, token_id in enumerate(new_ids):
            if token_id is not None:
                add(row, streams[row].push(token_id))
                finished[row] = streams[row].stopped
    for row, stream in enumerate(streams):
        add(row, stream.close())
    return texts


def stop_ids_of(tokenizer: TextTokenizer, asked: Sequence[str]) -> frozenset[int]:
    """The ids that end a text. Raises: UserError for what is no special token."""
    unknown = [token for token in asked if token not in tokenizer.special_tokens]
    if unknown:
        raise UserError(
            f"--stop_token: got {unknown[0]!r}, need special tokens of the model: "
            f"{', '.join(tokenizer.special_tokens) or 'it has none'}; other text goes to --stop"
        )
    ends = {token.encode("utf-8") for token in asked or tokenizer.end_tokens}
    return frozenset(i for i, token in tokenizer.vocab.items() if token in ends)
