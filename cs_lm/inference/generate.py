"""Generates tokens with a key-value cache, several rows at once."""

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from cs_lm.errors import UserError
from cs_lm.inference.sampling import DecodingConfig, sample_token
from cs_lm.models.base import LanguageModel, evaluating, new_cache

# ---- generation ----


class _CachedDecoder:
    """The last logits of sequences of different length, computed in one batch.

    Rows are padded on the left. Positions count from each row's own first token, and padding is
    masked, so a row's logits do not depend on the other rows. The exception is beyond the context
    with `slide` > 1: there all rows drop their oldest positions at the same time.
    """

    def __init__(self, model: LanguageModel, rows: Sequence[list[int]], max_new: int, slide: int):
        self._model, self._slide = model, slide
        self._context = model.config.context_length
        longest = max(map(len, rows))
        self._cache = new_cache(model, len(rows), min(self._context, longest + max_new))

    def logits(self, rows: Sequence[list[int]]) -> Tensor:
        """Logits (B, V) after each row. The cache may hold all tokens but the newest already."""
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
        device = self._model.output_embedding.device
        seen, end = self._cache.length, self._cache.length + ids.shape[1]
        positions = mask = None
        if any(num_padding):
            padding = torch.tensor(num_padding).unsqueeze(-1)  # (B, 1)
            positions = (torch.arange(seen, end) - padding).clamp(min=0).to(device)  # (B, T)
            is_real = torch.arange(end) >= padding  # (B, S)
            mask = is_real.unsqueeze(1).expand(-1, ids.shape[1], -1).to(device)  # (B, T, S)
        hidden = self._model.hidden_states(ids.to(device), positions, mask, self._cache)
        return self._model.logits_of(hidden[:, -1])  # (B, V)


@torch.inference_mode()
def generate_tokens(
    model: LanguageModel,
    prompts: Sequence[Sequence[int]],
    config: DecodingConfig,
    finished: list[bool],
    stop_ids: frozenset[int] = frozenset(),
    usable_ids: Tensor | None = None,
) -> Iterator[list[int | None]]:
    """For each step, the new token of each row, or None for a row that has finished.

    A row finishes at a stop id, which is not returned, or when the caller sets its entry of
    `finished` to True. Each row has its own random generator, seeded with (seed, row).

    usable_ids  (V) boolean; ids with False are never chosen
    Raises: UserError for an empty prompt or an id outside the model's vocabulary.
    """
    if found := config.validate():
        raise UserError(*found)
    rows = [list(prompt) for prompt in prompts]
    for row in rows:
        check_prompt(row, model.config.vocab_size)
    generators = [
        torch.Generator().manual_seed((config.seed * 1_000_003 + row) % (1 << 63))
        for row in range(len(rows))
    ]
    reader = _CachedDecoder(model, rows, config.max_new_tokens, config.slide)
    for _ in range(config.max_new_tokens):
        with evaluating(model):
            logits = reader.logits(rows).float().cpu()
        if usable_ids is not None:
            logits = logits.masked_fill(~usable_ids, -math.inf)
        new_ids: list[int | None] = []
        for i, row in enumerate(rows):
            token_id = None
            if not finished[i]:
                token_id = sample_token(logits[i], row, config, generators[i])
                if token_id in stop_ids:
                    finished[i], token_id = True, None
            row.append(0 if token_id is None else token_id)
            new_ids.append(token_id)
        yield new_ids
        if all(finished):
            return


def check_prompt(token_ids: Sequence[int], vocab_size: int) -> None:
    if not token_ids:
        raise UserError("--prompt: got an empty prompt, need at least one token; give some text")
    wrong = [i for i in token_ids if not 0 <= i < vocab_size]
    if wrong:
        raise UserError(
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
    for new_ids in generate_tokens(model, prompts, config, finished, frozenset(stop_ids)):
        for output, token_id in zip(outputs, new_ids):
            if token_id is not None:
                output.append(token_id)
    return outputs
