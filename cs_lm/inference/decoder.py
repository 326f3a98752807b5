"""The rows of tokens that grow, and the logits after them, with a key-value cache."""

from collections.abc import Sequence

import torch
from torch import Tensor

from cs_lm.errors import UserError
from cs_lm.inference.decoding_config import DecodingConfig
from cs_lm.inference.sampling import History
from cs_lm.models.base import LanguageModel, evaluating, new_cache
from cs_lm.models.kv_cache import KVCache


def _check_prompt(token_ids: Sequence[int], vocab_size: int) -> None:
    if not token_ids:
        raise UserError("--prompt: got an empty prompt, need at least one token; give some text")
    wrong = [i for i in token_ids if not 0 <= i < vocab_size]
    if wrong:
        raise UserError(
            f"prompt: got token id {wrong[0]}, need 0 to {vocab_size - 1}; was the prompt encoded "
            "with another tokenizer?"
        )


def check_prompts(
    model: LanguageModel, prompts: Sequence[Sequence[int]], config: DecodingConfig
) -> None:
    """Raises UserError for invalid settings, an empty prompt or an id that the model lacks."""
    if found := config.validate():
        raise UserError(*found)
    for prompt in prompts:
        _check_prompt(prompt, model.config.vocab_size)


class TokenRows:
    """Token ids of several rows, aligned at the right, with room for new ones.

    Padding at the left of a row repeats its first token, so that the set of a row's tokens does
    not depend on the other rows.

    num_padding  (B) on the CPU
    """

    def __init__(
        self, prompts: Sequence[Sequence[int]], max_new: int, device: torch.device, copies: int = 1
    ):
        self.num_prompt = self.length = max(map(len, prompts))
        padding = [self.length - len(prompt) for prompt in prompts]
        rows = [[prompt[0]] * n + list(prompt) for prompt, n in zip(prompts, padding)]
        self.num_padding = torch.tensor(padding).repeat_interleave(copies)
        self._ids = torch.empty(
            len(prompts) * copies, self.length + max_new, dtype=torch.int64, device=device
        )
        self._ids[:, : self.length] = torch.tensor(rows).repeat_interleave(copies, 0)
        self._num_padding_there = self.num_padding.to(device)

    @property
    def token_ids(self) -> Tensor:
        """(B, N)"""
        return self._ids[:, : self.length]

    @property
    def history(self) -> History:
        return History(self.token_ids, self._num_padding_there, self.num_prompt)

    def append(self, token_ids: Tensor) -> None:
        """Adds one token to each row. Shapes: token_ids (B)"""
        self._ids[:, self.length] = token_ids
        self.length += 1

    def copy_rows(self, sources: Tensor, targets: Tensor) -> None:
        """Rows `targets` become equal to rows `sources`. Shapes: both (n), without a row in both"""
        self._ids[targets, : self.length] = self._ids[sources, : self.length]

    def keep_rows(self, kept: Tensor) -> None:
        """Only these rows stay, in this order. Shapes: kept (n)"""
        self._ids, self._num_padding_there = self._ids[kept], self._num_padding_there[kept]
        self.num_padding = self.num_padding[kept.cpu()]


class CachedDecoder:
    """The logits after rows of different length, computed in one batch.

    Positions count from each row's own first token, and padding is masked, so a row's logits do
    not depend on the other rows. The exception is beyond the context with `slide` > 1: there all
    rows drop their oldest positions at the same time.

    copies  this many consecutive rows start with the same prompt, which is read once
    """

    def __init__(self, model: LanguageModel, rows: TokenRows, max_new: int, slide: int, copies=1):
        self._model, self._rows, self._slide, self._copies = model, rows, slide, copies
        self._context = model.config.context_length
        self._capacity = min(self._context, rows.length + max_new)
        self._cache: KVCache | None = None

    @property
    def cache(self) -> KVCache:
        """The keys and values of the rows, once `logits` has read them."""
        return self._cache

    def copy_rows(self, sources: Tensor, targets: Tensor) -> None:
        """Rows `targets` become equal to rows `sources`. Shapes: both (n), without a row in both"""
        self._rows.copy_rows(sources, targets)
        self._cache.copy_rows(sources, targets)

    def keep_rows(self, kept: Tensor) -> None:
        """Only these rows stay, in this order. Call it after `logits`. Shapes: kept (n)"""
        self._rows.keep_rows(kept)
        self._cache.keep_rows(kept)
        self._num_padding = self._num_padding[kept.cpu()]

    def logits(self) -> Tensor:
        """Logits (B, V) float32 after each row. The cache may hold all but the newest tokens."""
        with evaluating(self._model):
            if self._cache is None:
                return self._read_prompts()
            if self._cache.length < self._capacity:
                return self._read(self._rows.token_ids[:, -1:])
            return self._read_window(max(1, self._context - self._slide + 1))

    def _read_prompts(self) -> Tensor:
        num_rows = len(self._rows.num_padding) // self._copies
        self._cache = new_cache(self._model, num_rows, self._capacity)
        logits = self._read_window(self._context, step=self._copies)
        if self._copies > 1:
            self._cache = self._cache.repeated(self._copies)
            self._num_padding = self._num_padding.repeat_interleave(self._copies, 0)
            logits = logits.repeat_interleave(self._copies, 0)
        return logits

    def _read_window(self, length: int, step: int = 1) -> Tensor:
        """Reads the last `length` tokens of every `step`-th row into the empty cache."""
        real = self._rows.length - self._rows.num_padding[::step]
        width = min(length, int(real.max()))
        self._cache.clear()
        self._num_padding = (width - real).clamp(min=0).unsqueeze(-1)  # (B, 1)
        return self._read(self._rows.token_ids[::step, -width:])

    def _read(self, ids: Tensor) -> Tensor:
        device = ids.device
        seen, end = self._cache.length, self._cache.length + ids.shape[1]
        positions = mask = None
        if self._num_padding.any():
            padding = self._num_padding.to(device)  # (B, 1)
            positions = (torch.arange(seen, end, device=device) - padding).clamp(min=0)  # (B, T)
            is_real = torch.arange(end, device=device) >= padding  # (B, S)
            mask = is_real.unsqueeze(1).expand(-1, ids.shape[1], -1)  # (B, T, S)
        hidden = self._model.hidden_states(ids, positions, mask, self._cache)
        return self._model.logits_of(hidden[:, -1]).float()  # (B, V)
