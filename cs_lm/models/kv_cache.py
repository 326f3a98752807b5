"""The key-value cache: keys and values of earlier positions, in memory allocated once."""

import torch
from torch import Tensor


def positions_after(cache: "KVCache | None", token_ids: Tensor, context_length: int) -> Tensor:
    """(T): the positions of ids (..., T), starting at the cache's length, or at 0.

    Raises: ValueError if they exceed the context.
    """
    seen = cache.length if cache is not None else 0
    end = seen + token_ids.shape[-1]
    if end > context_length:
        raise ValueError(
            f"model: got a sequence of {end} tokens, need at most context_length "
            f"({context_length}); shorten it"
        )
    return torch.arange(seen, end, device=token_ids.device)


class KVCache:
    """Preallocated keys and values of every layer.

    shape  (L, B, H, capacity, K), of the keys of all layers, and again of the values
    """

    def __init__(
        self, shape: tuple[int, int, int, int, int], dtype: torch.dtype, device: torch.device | str
    ):
        self._keys, self._values = torch.empty((2, *shape), dtype=dtype, device=device)
        self.capacity = shape[3]
        self.length = 0

    def extend(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Writes T new positions after `length`; returns all keys and values up to their end.

        With fewer rows than the cache has, they are its first rows. The returned tensors are
        views. `advance` moves `length` once all layers have written.
        Raises: ValueError when the capacity is exceeded.
        """
        end = self.length + keys.shape[-2]
        if end > self.capacity:
            raise ValueError(
                f"KVCache: got {end} positions, need at most its capacity ({self.capacity})"
            )
        rows = slice(keys.shape[0])
        stored_keys, stored_values = self._keys[layer, rows], self._values[layer, rows]
        stored_keys[:, :, self.length : end] = keys
        stored_values[:, :, self.length : end] = values
        return stored_keys[:, :, :end], stored_values[:, :, :end]

    def advance(self, num_positions: int) -> None:
        self.length += num_positions

    def clear(self) -> None:
        self.length = 0

    def repeated(self, copies: int) -> "KVCache":
        """A cache with `copies` consecutive rows for each row of this one."""
        num_layers, batch_size, *rest = self._keys.shape
        shape = num_layers, batch_size * copies, *rest
        other = KVCache(shape, self._keys.dtype, self._keys.device)
        other.length = self.length
        for new, old in ((other._keys, self._keys), (other._values, self._values)):
            filled = old[:, :, None, :, : self.length].expand(-1, -1, copies, -1, -1, -1)
            new[..., : self.length, :].unflatten(1, (batch_size, copies)).copy_(filled)
        return other

    def copy_rows(self, sources: Tensor, targets: Tensor) -> None:
        """Rows `targets` become equal to rows `sources`. Shapes: both (n), without a row in both"""
        for stored in (self._keys, self._values):
            stored[:, targets, :, : self.length] = stored[:, sources, :, : self.length]

    def keep_rows(self, kept: Tensor) -> None:
        """Only these rows stay, in this order. Shapes: kept (n)"""
        self._keys, self._values = self._keys[:, kept], self._values[:, kept]

    def write_row(self, row: int, other: "KVCache", other_row: int, length: int) -> None:
        """The last `length` positions of a row of another cache, as the last ones of a row here.

        The positions before them become 0: attention masks them, and 0 times NaN would be NaN.
        """
        start, other_start = self.length - length, other.length - length
        for stored, given in ((self._keys, other._keys), (self._values, other._values)):
            new = given[:, other_row, :, other_start : other.length]
            stored[:, row, :, :start] = 0
            stored[:, row, :, start : self.length] = new

    def shift(self, positions: int, num_rows: int) -> None:
        """Moves the first `num_rows` rows to later positions, or to earlier ones if negative.

        Positions that become free at the start are 0.
        """
        old = slice(max(0, -positions), self.length)
        new = slice(max(0, positions), self.length + positions)
        for stored in (self._keys, self._values):
            stored[:, :num_rows, :, new] = stored[:, :num_rows, :, old].clone()
            stored[:, :num_rows, :, : max(0, positions)] = 0
        self.length += positions
