"""The settings of text generation."""

import math
from dataclasses import dataclass
from typing import Any

from cs_lm.config.fields import setting
from cs_lm.errors import Problem

FILTERS = ("top_k", "top_p", "min_p", "typical_p")  # without effect at temperature 0


@dataclass(frozen=True)
class DecodingConfig:
    """How the next token is chosen, and when to stop."""

    max_new_tokens: int = setting(200, "at most this many", "tokens")
    temperature: float = setting(0.8, "logits are divided by it; 0: always the most likely token")
    top_k: int | None = setting(None, "choose among the k most likely tokens", "tokens")
    top_p: float | None = setting(
        None, "choose among the most likely tokens that together reach this probability"
    )
    min_p: float | None = setting(
        None, "leave out tokens less likely than this share of the most likely one"
    )
    typical_p: float | None = setting(
        None, "choose among the most typical tokens that together reach this probability"
    )
    repetition_penalty: float = setting(
        1.0, "above 1 makes tokens that already occurred less likely"
    )
    repetition_window: int | None = setting(
        None, "the penalty looks back this far; default: everything", "tokens"
    )
    frequency_penalty: float = setting(
        0.0, "lowers a logit by this much for each time that the sample has the token"
    )
    presence_penalty: float = setting(
        0.0, "lowers a logit by this much if the sample has the token"
    )
    no_repeat_ngram: int | None = setting(
        None, "no sequence of this many tokens occurs twice", "tokens"
    )
    allowed_characters: str | None = setting(
        None, "use only tokens that consist of these characters"
    )
    num_beams: int = setting(
        1, "beam search for the most likely text with this many beams; needs temperature 0"
    )
    length_penalty: float = setting(
        1.0, "beam search: above 0 prefers longer texts, below 0 shorter ones"
    )
    stop: tuple[str, ...] = setting((), "text that ends the sample; it is not shown")
    stop_token: tuple[str, ...] = setting(
        (), "special tokens that end the sample; default: the end-of-text token alone"
    )
    num_samples: int = setting(1, "number of samples for each prompt")
    best_of: int | None = setting(
        None, "draw this many samples, and keep those with the highest mean log-probability"
    )
    num_alternatives: int | None = setting(
        None, "also give each token's log-probability, and this many of the most likely tokens"
    )
    slide: int = setting(
        1, "tokens dropped at once when the context is full; more is faster", "tokens"
    )
    seed: int = setting(0, "the sample follows from it")

    @property
    def num_rows(self) -> int:
        """Rows that are generated for each prompt: its samples, or the candidates for them."""
        return self.best_of or self.num_samples

    def validate(self) -> list[Problem]:
        found = [
            Problem(f"--{name}", f"got {_shown(getattr(self, name))}", need)
            for name, good, need in self._ranges()
            if not good
        ]
        return found or self._without_effect()

    def _ranges(self) -> list[tuple[str, bool, str]]:
        def is_at_least(least: float, value: Any) -> bool:
            return value is None or least <= value < math.inf

        def is_share(value: float | None) -> bool:
            return value is None or 0 < value <= 1

        counts = ("max_new_tokens", "num_samples", "num_beams", "slide")
        counts += ("top_k", "repetition_window", "no_repeat_ngram", "best_of")
        temperature = self.temperature
        return [
            *((name, is_at_least(1, getattr(self, name)), "1 or more") for name in counts),
            (
                "temperature",
                temperature == 0 or is_at_least(1e-6, temperature),
                "0, or at least 1e-6",
            ),
            ("top_p", is_share(self.top_p), "above 0, at most 1"),
            ("min_p", is_share(self.min_p), "above 0, at most 1"),
            ("typical_p", is_share(self.typical_p), "above 0, at most 1"),
            ("repetition_penalty", 0 < self.repetition_penalty < math.inf, "above 0"),
            ("frequency_penalty", math.isfinite(self.frequency_penalty), "a finite number"),
            ("presence_penalty", math.isfinite(self.presence_penalty), "a finite number"),
            ("length_penalty", math.isfinite(self.length_penalty), "a finite number"),
            ("stop", all(self.stop), "at least one character each"),
            ("allowed_characters", self.allowed_characters != "", "at least one character"),
            ("num_alternatives", is_at_least(0, self.num_alternatives), "0 or more"),
            ("seed", 0 <= self.seed < 1 << 63, "0 or more, below 2^63"),
        ]

    def _without_effect(self) -> list[Problem]:
        found = []
        greedy, beams = self.temperature == 0, self.num_beams > 1
        if greedy and not beams and self.num_rows > 1:
            name = "best_of" if self.best_of else "num_samples"
            what = "all samples are the same at --temperature 0"
            found.append(Problem(f"--{name}", what, fix="remove one of the two flags"))
        for name in FILTERS:
            if greedy and getattr(self, name) is not None:
                what = "has no effect at --temperature 0"
                found.append(Problem(f"--{name}", what, fix="leave one of them out"))
        if self.repetition_window is not None and self.repetition_penalty == 1.0:
            what = "has no effect without --repetition_penalty"
            found.append(Problem("--repetition_window", what))
        if self.best_of is not None and self.best_of < self.num_samples:
            need = f"at least --num_samples ({self.num_samples})"
            found.append(Problem("--best_of", f"got {self.best_of}", need))
        if beams and not greedy:
            need = "--temperature 0 with it: beam search draws nothing"
            found.append(Problem("--num_beams", f"got {self.num_beams}", need))
        if beams and self.best_of is not None:
            found.append(Problem("--best_of", "has no effect with --num_beams"))
        if beams and self.num_alternatives is not None:
            found.append(Problem("--num_alternatives", "has no effect with --num_beams"))
        if beams and self.num_samples > self.num_beams:
            need = f"at most --num_beams ({self.num_beams})"
            found.append(Problem("--num_samples", f"got {self.num_samples}", need))
        if not beams and self.length_penalty != 1.0:
            found.append(Problem("--length_penalty", "has no effect without --num_beams"))
        return found


def _shown(value: Any) -> str:
    return " ".join(map(repr, value)) if isinstance(value, tuple) else str(value)
