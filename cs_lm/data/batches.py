"""Batches and seeds, as pure functions of the run's seed and the number of the batch or step."""

from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from cs_lm.data.token_store import Tokens
from cs_lm.device import World
from cs_lm.errors import UserError

Starts = Callable[[int], np.ndarray]  # batch number -> first positions of its windows, (B,)


class Batch(NamedTuple):
    """Token ids, and the token that follows each of them.

    inputs   (B, T) int64
    targets  (B, T) int64
    """

    inputs: Tensor
    targets: Tensor


def num_windows(tokens: Tokens, seq_length: int) -> int:
    """How many windows of seq_length + 1 tokens there are; they overlap.

    Raises: UserError when there is none.
    """
    if len(tokens) <= seq_length:
        raise UserError(
            f"tokens: got {len(tokens)}, need at least {seq_length + 1} for one window of "
            f"--seq_length ({seq_length}); give a longer text or a shorter --seq_length"
        )
    return len(tokens) - seq_length


def sample_windows(tokens: Tokens, batch_size: int, seq_length: int, seed: int) -> Starts:
    """Random windows: all are equally likely, also the last one; each batch draws new ones."""
    count = num_windows(tokens, seq_length)

    def starts(index: int) -> np.ndarray:
        # a counter-based generator: batch 1,000,000 costs as much as batch 0
        generator = np.random.Generator(np.random.Philox(key=seed, counter=[0, index, 0, 0]))
        return generator.integers(0, count, size=batch_size)

    return starts


def shuffle_windows(tokens: Tokens, batch_size: int, seq_length: int, seed: int) -> Starts:
    """Windows that do not overlap: each comes once an epoch, in a new order each epoch.

    Memory: 8 bytes for each window of an epoch, two epochs at most.
    """
    count = 1 + (num_windows(tokens, seq_length) - 1) // seq_length

    @lru_cache(maxsize=2)  # a batch may hold windows of two epochs
    def order(epoch: int) -> np.ndarray:
        return np.random.default_rng((seed, epoch)).permutation(count)

    def starts(index: int) -> np.ndarray:
        epochs, places = np.divmod(index * batch_size + np.arange(batch_size), count)
        drawn = [order(int(epoch))[places[epochs == epoch]] for epoch in np.unique(epochs)]
        return np.concatenate(drawn) * seq_length

    return starts


SAMPLERS = {"random": sample_windows, "epoch": shuffle_windows}


class Copied(NamedTuple):
    """Rows (B, T + 1) that are being copied to the device; `event` is None if the copy is done."""

    rows: Tensor
    event: torch.cuda.Event | None = None

    def received(self) -> Batch:
        """The batch, usable on the caller's current CUDA stream.

        That stream waits for the copy; the host does not.
        """
        if self.event is not None:
            stream = torch.cuda.current_stream(self.rows.device)
            stream.wait_event(self.event)
            self.rows.record_stream(stream)  # no reuse of their memory before the stream is done
        return Batch(self.rows[:, :-1], self.rows[:, 1:])


def load_windows(
    tokens: Tokens, starts: np.ndarray, seq_length: int, device: torch.device
) -> Batch:
    """The windows that begin at the given positions."""
    return Copied(_windows(tokens, starts, seq_length).to(device)).received()


def _windows(tokens: Tokens, starts: np.ndarray, seq_length: int) -> Tensor:
    windows = np.stack([tokens.load_by_range(s, s + seq_length + 1) for s in starts.tolist()])
    return torch.from_numpy(windows.astype(np.int64))  # (B, T + 1)


def step_seed(seed: int, step: int) -> int:
    """The seed of a step, for its random numbers besides the batches, such as dropout."""
    return int(np.random.SeedSequence((seed, step)).generate_state(1, np.uint64)[0])


class BatchSource:
    """Maps a batch number to this process's rows of it; the same seed gives the same batches.

    The ranks of a world share each batch: each takes consecutive rows, in the order of the ranks.
    """

    def __init__(
        self,
        tokens: Tokens,
        batch_size: int,
        seq_length: int,
        seed: int,
        sampling: str,
        world: World,
    ):
        self._tokens, self._seq_length, self._device = tokens, seq_length, world.device
        self._rows = world.share_of(batch_size)
        self._starts = SAMPLERS[sampling](tokens, batch_size, seq_length, seed)
        is_cuda = world.device.type == "cuda"
        self._stream = torch.cuda.Stream(world.device) if is_cuda else None

    def starts(self, index: int) -> np.ndarray:
        """Start positions of this process's windows of the batch."""
        return self._starts(index)[self._rows]

    def __call__(self, index: int) -> Batch:
        return self.copied(index).received()

    def copied(self, index: int) -> Copied:
        """The rows, maybe still being copied. Any thread may call this.

        On CUDA the copy overlaps with computation: it uses pinned memory and its own stream.
        """
        rows = _windows(self._tokens, self.starts(index), self._seq_length)
        if self._stream is None:
            return Copied(rows.to(self._device))
        # a new thread starts with device 0, whatever the run's device is
        with torch.cuda.device(self._stream.device), torch.cuda.stream(self._stream):
            rows = rows.pin_memory().to(self._stream.device, non_blocking=True)
            event = torch.cuda.Event()
            event.record(self._stream)
        return Copied(rows, event)
