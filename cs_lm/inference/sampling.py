"""From logits to one token for each row: the order of the filters, and the draw.

The filters are applied in this order, which is that of `transformers`:

    repetition penalty        on the prompt and the sample
    frequency and presence    on the sample alone (OpenAI's definition; `transformers` has none)
    no repeated n-gram        on the prompt and the sample
    allowed tokens
    temperature               0: the most likely token is taken here
    top-k, top-p, min-p, typical

Each sees what the one before has left. Then one token is drawn.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from cs_lm.errors import UserError
from cs_lm.inference import filters
from cs_lm.inference.decoding_config import DecodingConfig
from cs_lm.ops.reference import log_softmax, softmax


class NotANumberError(UserError):
    """The logits are NaN, as those of a model whose weights are not finite."""


NOT_NUMBERS = "the model's logits are not numbers (NaN or infinite)"


class History(NamedTuple):
    """The tokens of each row before the next one, aligned at the right.

    token_ids    (B, N); padding at the left of a row repeats one of the row's tokens
    num_padding  (B)
    num_prompt   the first columns, which hold the prompts and their padding
    """

    token_ids: Tensor
    num_padding: Tensor
    num_prompt: int


class TokenLogprobs(NamedTuple):
    """Log-probabilities [nats] of one token of each row, and of the most likely ones, best first.

    Shapes: chosen (B), top_ids and top (B, n)
    """

    chosen: Tensor
    top_ids: Tensor
    top: Tensor


def token_logprobs(logits: Tensor, token_ids: Tensor, num_top: int) -> TokenLogprobs:
    """Those of the ids (B) under the logits (B, V), before any filter."""
    log_probs = log_softmax(logits)
    top, top_ids = log_probs.topk(min(num_top, logits.shape[-1]))
    return TokenLogprobs(_picked(log_probs, token_ids), top_ids, top)


def uniform_draws(seed: int, rows: Sequence[int], num_draws: int) -> Tensor:
    """Numbers in [0, 1) for each row: (B, num_draws) float64. They follow from (seed, row)."""
    draws = torch.empty(len(rows), num_draws, dtype=torch.float64)
    for numbers, row in zip(draws, rows):
        generator = torch.Generator().manual_seed((seed * 1_000_003 + row) % (1 << 63))
        torch.rand(num_draws, generator=generator, dtype=torch.float64, out=numbers)
    return draws


def penalised(
    logits: Tensor, history: History, config: DecodingConfig, allowed: Tensor | None = None
) -> Tensor:
    """The logits (B, V) after the filters that look at the history, and the allowed tokens (V)."""
    token_ids, num_padding, num_prompt = history
    if config.repetition_penalty != 1.0:
        recent = token_ids[:, -(config.repetition_window or token_ids.shape[1]) :]
        logits = filters.repetition_penalty_logits(logits, recent, config.repetition_penalty)
    if config.frequency_penalty or config.presence_penalty:
        penalties = config.frequency_penalty, config.presence_penalty
        logits = filters.count_penalty_logits(logits, token_ids[:, num_prompt:], *penalties)
    if config.no_repeat_ngram is not None:
        size = config.no_repeat_ngram
        logits = filters.no_repeat_ngram_logits(logits, token_ids, size, num_padding)
    return logits if allowed is None else filters.allowed_logits(logits, allowed)


def filtered(logits: Tensor, config: DecodingConfig) -> tuple[Tensor, Tensor | None]:
    """What temperature and the filters after it leave of the logits (..., V).

    Returns n logits (..., n), some of them -inf, and their ids (..., n), or None: all, in order.
    top-k leaves k logits, so that the filters after it have less to do.
    """
    places = None
    logits = filters.apply_temperature(logits, config.temperature)
    if config.top_k is not None:
        logits, places = logits.topk(min(config.top_k, logits.shape[-1]))
    if config.top_p is not None:
        logits = filters.top_p_logits(logits, config.top_p)
    if config.min_p is not None:
        logits = filters.min_p_logits(logits, config.min_p)
    if config.typical_p is not None:
        logits = filters.typical_logits(logits, config.typical_p)
    return logits, places


def draw(logits: Tensor, uniform: Tensor) -> Tensor:
    """The place where the cumulative probability passes `uniform`, in [0, 1).

    A place with probability 0 is never drawn. The place is at most n, and without a meaning if no
    logit is finite.
    Shapes: logits (..., n), uniform (...) float64, returns (...) int64
    """
    return draw_by_weight(softmax(logits), uniform)


def draw_by_weight(weights: Tensor, uniform: Tensor) -> Tensor:
    """`draw` from weights that are not negative, and need not add up to 1."""
    cumulative = weights.cumsum(-1)
    total = cumulative[..., -1:].double()
    target = uniform.unsqueeze(-1) * total
    target = torch.minimum(target, total * (1 - 2**-23))  # below the total, also when rounded
    return torch.searchsorted(cumulative, target.to(cumulative.dtype), right=True).squeeze(-1)


NOTHING_ALLOWED, NOT_A_NUMBER = -1, -2


def sample_tokens(
    logits: Tensor,
    history: History,
    config: DecodingConfig,
    uniform: Tensor,
    allowed: Tensor | None = None,
) -> Tensor:
    """The next token of each row (B), from the logits (B, V) and one uniform number a row (B).

    `NOTHING_ALLOWED` (-1) stands for a row whose filters leave no token, `NOT_A_NUMBER` (-2) for
    one whose logits are NaN or infinite.
    """
    logits = penalised(logits, history, config, allowed)
    if config.temperature == 0:
        token_ids = logits.argmax(-1)
        peak = _picked(logits, token_ids)
    else:
        left, places = filtered(logits, config)
        peak = left.amax(-1)
        place = draw(left, uniform).clamp(max=left.shape[-1] - 1)
        token_ids = place if places is None else _picked(places, place)
    token_ids = token_ids.masked_fill(peak == -math.inf, NOTHING_ALLOWED)
    return token_ids.masked_fill(~(peak < math.inf), NOT_A_NUMBER)


def _picked(values: Tensor, places: Tensor) -> Tensor:
    """Each row's value at its place. Shapes: (..., n), (...), returns (...)"""
    return values.gather(-1, places.unsqueeze(-1)).squeeze(-1)
