"""One key-value cache for rows that come and go: all rows end at the same column."""

import torch
from torch import Tensor

from cs_lm.models.base import LanguageModel, evaluating, new_cache
from cs_lm.models.kv_cache import KVCache


class RowCache:
    """The keys and values of up to `max_rows` texts of different length.

    The rows are aligned at the right: row i occupies the columns from `starts[i]` to the end that
    all rows share. Rows 0 to `num_rows` are in use. A step reads one new token of each of them.
    """

    def __init__(self, model: LanguageModel, max_rows: int):
        self._model, self._max_rows = model, max_rows
        self._context = model.config.context_length
        self._cache: KVCache | None = None  # memory is taken with the first row
        self.starts: list[int] = []

    @property
    def num_rows(self) -> int:
        return len(self.starts)

    @property
    def _end(self) -> int:
        return self._cache.length

    def add(self, prompts: KVCache, row: int, length: int) -> None:
        """Adds a row: the last `length` positions of one row of another cache."""
        if self._cache is None:
            self._cache = new_cache(self._model, self._max_rows, 2 * self._context)
        if not self.starts:
            self._cache.clear()
        if self._end < length:
            self._move(length - self._end)
        self._cache.write_row(self.num_rows, prompts, row, length)
        self.starts.append(self._end - length)

    def remove(self, row: int) -> None:
        """Frees a row; the last row takes its place."""
        last = self.num_rows - 1
        if row != last:
            self._cache.copy_rows(torch.tensor([last]), torch.tensor([row]))
        self.starts[row] = self.starts[last]
        self.starts.pop()

    def step(self, token_ids: list[int]) -> Tensor:
        """Logits (n, V) float32 after one more token of each row."""
        longest = self._end - min(self.starts)
        unused = self._end - longest
        if self._end == self._cache.capacity or unused > max(64, longest):
            self._move(-unused)
        device = self._model.output_embedding.device
        starts = torch.tensor(self.starts, device=device).unsqueeze(-1)  # (n, 1)
        positions = self._end - starts
        mask = torch.arange(self._end + 1, device=device) >= starts  # (n, S)
        ids = torch.tensor(token_ids, device=device).unsqueeze(-1)  # (n, 1)
        with evaluating(self._model):
            hidden = self._model.hidden_states(ids, positions, mask.unsqueeze(1), self._cache)
            return self._model.logits_of(hidden[:, -1]).float()

    def _move(self, columns: int) -> None:
        """Moves all rows to the right, or to the left for a negative number."""
        self._cache.shift(columns, self.num_rows)
        self.starts = [start + columns for start in self.starts]
