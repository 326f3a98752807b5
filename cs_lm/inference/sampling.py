"""From logits to one token: the filters and the draw, as pure functions."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cs_lm.config.fields import setting
from cs_lm.errors import Problem, UserError
from cs_lm.ops.reference import softmax


@dataclass(frozen=True)
class DecodingConfig:
    """How the next token is chosen, and when to stop."""

    max_new_tokens: int = setting(200, "at most this many", "tokens")
    temperature: float = setting(0.8, "logits are divided by it; 0: always the most likely token")
    top_k: int | None = setting(None, "choose among the k most likely tokens", "tokens")
    top_p: float | None = setting(
        None, "choose among the most likely tokens that together reach this probability"
    )
    repetition_penalty: float = setting(
        1.0, "above 1 makes tokens that already occurred less likely"
    )
    repetition_window: int | None = setting(
        None, "the penalty looks back this far; default: everything", "tokens"
    )
    stop: tuple[str, ...] = setting((), "text that ends the sample; it is not shown")
    stop_token: tuple[str, ...] = setting(
        (), "special tokens that end the sample; default: the end-of-text token alone"
    )
    num_samples: int = setting(1, "number of samples for each prompt")
    slide: int = setting(
        1, "tokens dropped at once when the context is full; more is faster", "tokens"
    )
    seed: int = setting(0, "the sample follows from it")

    def validate(self) -> list[Problem]:
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
            Problem(f"--{n}", f"got {getattr(self, n)}", need)
            for n, good, need in checks
            if not good
        ]
        if self.num_samples > 1 and self.temperature == 0:
            what = "all samples are the same at --temperature 0"
            found.append(Problem("--num_samples", what, fix="remove one of the two flags"))
        for name in ("top_k", "top_p"):
            if self.temperature == 0 and getattr(self, name) is not None:
                what = "has no effect at --temperature 0"
                found.append(Problem(f"--{name}", what, fix="leave one of them out"))
        if self.repetition_window is not None and self.repetition_penalty == 1.0:
            what = "has no effect without --repetition_penalty"
            found.append(Problem("--repetition_window", what))
        return found


def apply_temperature(logits: Tensor, temperature: float) -> Tensor:
    """Above 1 flattens the distribution, below 1 sharpens it. `temperature` > 0."""
    return logits / temperature


def top_k_logits(logits: Tensor, k: int) -> Tensor:
    """The logits, -inf for all but the k highest; of equal ones, those that `topk` puts first."""
    k = min(k, logits.shape[-1])
    values, places = logits.topk(k, dim=-1)
    return torch.full_like(logits, -math.inf).scatter(-1, places, values)


def top_p_logits(logits: Tensor, p: float) -> Tensor:
    """The logits, -inf outside the smallest set of likeliest tokens that sum to at least p.

    p is a probability. The likeliest token always stays.
    Source: Holtzman et al. 2020, nucleus sampling.
    """
    values, places = logits.sort(dim=-1, descending=True, stable=True)
    probabilities = softmax(values)
    mass_before = probabilities.cumsum(-1) - probabilities
    kept = values.masked_fill(mass_before >= p, -math.inf)
    kept[..., 0] = values[..., 0]
    return torch.empty_like(logits).scatter(-1, places, kept)


def repetition_penalty_logits(logits: Tensor, token_ids: Tensor, penalty: float) -> Tensor:
    """The logits, lower for the given tokens: positive ones divided, negative ones multiplied.

    A token that occurs several times is penalised once. Shapes: logits (..., V), token_ids (..., N)
    Source: Keskar et al. 2019, CTRL, made sign-aware.
    """
    old = logits.gather(-1, token_ids)
    return logits.scatter(-1, token_ids, torch.where(old > 0, old / penalty, old * penalty))


class NotANumberError(UserError):
    """The logits are NaN, as those of a model whose weights are not finite."""


_NOT_NUMBERS = "the model's logits are not numbers (NaN)"


def sample_token(
    logits: Tensor, history: Sequence[int], config: DecodingConfig, generator: torch.Generator
) -> int:
    """The next token of one sequence from its logits (V) on the CPU.

    Raises: NotANumberError if one of the logits is NaN. Without a NaN, the check costs nothing.
    """
    if config.repetition_penalty != 1.0:
        window = config.repetition_window or len(history)
        recent = torch.tensor(history[-window:], dtype=torch.int64)
        logits = repetition_penalty_logits(logits, recent, config.repetition_penalty)
    if config.temperature == 0:
        chosen = int(logits.argmax())
        if math.isnan(logits[chosen]):
            raise NotANumberError(_NOT_NUMBERS)
        return chosen
    logits = apply_temperature(logits, config.temperature)
    if config.top_k is not None:
        logits = top_k_logits(logits, config.top_k)
    if config.top_p is not None:
        logits = top_p_logits(logits, config.top_p)
    try:
        return int(torch.multinomial(softmax(logits), 1, generator=generator))
    except RuntimeError:
        if logits.isnan().any():
            raise NotANumberError(_NOT_NUMBERS) from None
        raise
