"""Generates tokens, several rows at once."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from cs_lm.inference.beam_search import beam_search
from cs_lm.inference.decoder import CachedDecoder, TokenRows, check_prompts
from cs_lm.inference.decoding_config import DecodingConfig
from cs_lm.inference.sampling import (
    NOT_A_NUMBER,
    NOT_NUMBERS,
    NotANumberError,
    sample_tokens,
    token_logprobs,
    uniform_draws,
)
from cs_lm.models.base import LanguageModel


class Step(NamedTuple):
    """One new token of each row.

    token_ids  the new id, or None for a row that has finished
    logits     (B, V), from which the ids were chosen, before any filter
    chosen     (B) the same ids as a tensor; without a meaning for finished rows
    """

    token_ids: list[int | None]
    logits: Tensor
    chosen: Tensor


@torch.inference_mode()
def generate_tokens(
    model: LanguageModel,
    prompts: Sequence[Sequence[int]],
    config: DecodingConfig,
    finished: list[bool],
    stop_ids: frozenset[int] = frozenset(),
    allowed: Tensor | None = None,
) -> Iterator[Step]:
    """Draws the next token of all rows, again and again.

    Each prompt has `config.num_rows` consecutive rows. A row finishes at a stop id, which is not
    returned, when the filters leave no token, or when the caller sets its entry of `finished` to
    True. What a row draws follows from the seed and its number, whatever its neighbours are.

    allowed  (V) boolean; ids with False are never chosen
    Raises: UserError for an empty prompt or an id outside the model's vocabulary,
    NotANumberError for logits that are NaN.
    """
    check_prompts(model, prompts, config)
    device = model.output_embedding.device
    max_new, copies = config.max_new_tokens, config.num_rows
    rows = TokenRows(prompts, max_new, device, copies)
    decoder = CachedDecoder(model, rows, max_new, config.slide, copies)
    uniform = torch.zeros(max_new, 1)
    if config.temperature > 0:
        uniform = uniform_draws(config.seed, range(len(finished)), max_new).T
    uniform, allowed = uniform.to(device), None if allowed is None else allowed.to(device)
    for step in range(max_new):
        logits = decoder.logits()
        chosen = sample_tokens(logits, rows.history, config, uniform[step], allowed)
        rows.append(chosen.clamp(min=0))
        new_ids: list[int | None] = chosen.tolist()
        if any(i == NOT_A_NUMBER and not done for i, done in zip(new_ids, finished)):
            raise NotANumberError(NOT_NUMBERS)
        for row, token_id in enumerate(new_ids):
            if finished[row] or token_id < 0 or token_id in stop_ids:
                finished[row], new_ids[row] = True, None
        yield Step(new_ids, logits, chosen)
        if all(finished):
            return


class Sample(NamedTuple):
    """New tokens after a prompt, without the stop id.

    logprobs      log-probability of each token under the model, before any filter [nats]; empty if
                  neither `num_alternatives` nor `best_of` asked for it
    alternatives  for each token, the most likely ids with their log-probabilities, best first;
                  empty without `num_alternatives`
    stopped       whether a stop id, a stop text or the filters ended it, and not the length
    """

    token_ids: list[int]
    logprobs: list[float]
    alternatives: list[list[tuple[int, float]]]
    stopped: bool

    @property
    def mean_logprob(self) -> float:
        """[nats per token]; 0 for a sample without tokens."""
        return sum(self.logprobs) / max(1, len(self.logprobs))


def generate_samples(
    model: LanguageModel,
    prompts: Sequence[Sequence[int]],
    config: DecodingConfig,
    stop_ids: frozenset[int] = frozenset(),
    allowed: Tensor | None = None,
    on_token=lambda row, token_id: False,
) -> list[Sample]:
    """`config.num_samples` consecutive samples of each prompt.

    With `best_of`, they are those with the highest mean log-probability, best first.

    on_token  called with the number of a row and its new id; True finishes the row
    """
    if config.num_beams > 1:
        found = beam_search(model, prompts, config, stop_ids, allowed)
        return [Sample(ids, [], [], stopped) for ids, stopped in found]
    num_rows = len(prompts) * config.num_rows
    finished = [False] * num_rows
    samples = [Sample([], [], [], False) for _ in range(num_rows)]
    wants_logprobs = config.num_alternatives is not None or config.best_of is not None
    for step in generate_tokens(model, prompts, config, finished, stop_ids, allowed):
        if wants_logprobs:
            _note_logprobs(samples, step, config.num_alternatives)
        for row, token_id in enumerate(step.token_ids):
            if token_id is not None:
                samples[row].token_ids.append(token_id)
                finished[row] = bool(on_token(row, token_id))
    samples = [sample._replace(stopped=done) for sample, done in zip(samples, finished)]
    if config.best_of is None:
        return samples
    groups = [samples[i : i + config.best_of] for i in range(0, num_rows, config.best_of)]
    ranked = [sorted(group, key=lambda sample: -sample.mean_logprob) for group in groups]
    return [sample for group in ranked for sample in group[: config.num_samples]]


def _note_logprobs(samples: list[Sample], step: Step, num_alternatives: int | None) -> None:
    found = token_logprobs(step.logits, step.chosen.clamp(min=0), num_alternatives or 0)
    chosen, top_ids, top = (x.tolist() for x in found)
    for row, token_id in enumerate(step.token_ids):
        if token_id is not None:
            samples[row].logprobs.append(chosen[row])
            if num_alternatives is not None:
                samples[row].alternatives.append(list(zip(top_ids[row], top[row])))


def generate(
    model: LanguageModel,
    prompts: Sequence[Sequence[int]],
    config: DecodingConfig,
    stop_ids: Sequence[int] = (),
) -> list[list[int]]:
    """The new token ids after each prompt, without the prompt and the stop id."""
    samples = generate_samples(model, prompts, config, frozenset(stop_ids))
    return [sample.token_ids for sample in samples]
