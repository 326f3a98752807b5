"""What a step draws, as a pure function of the seed and the step's or batch's number."""

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
    """inputs   (B, T) int64 token ids
    targets  (B, T) int64: the token that follows each of them
    """

    inputs: Tensor
    targets: Tensor


def num_windows(tokens: Tokens, seq_length: int) -> int:
    """How many windows of seq_length + 1 tokens there are; they overlap.

    Raises: ValueError when there is none.
    """
    if len(tokens) <= seq_length:
        raise UserError(
            f"tokens: got {len(tokens)}, need at least {seq_length + 1} for one window of "
            f"--seq_length ({seq_length}); give a longer text or a shorter --seq_length"
        )
    return len(tokens) - seq_length


def sample_windows(tokens: Tokens, batch_size: int, seq_length: int, seed: int) -> Starts:
    """Every window equally likely, the last one included; drawn anew for each batch number."""
    count = num_windows(tokens, seq_length)

    def starts(index: int) -> np.ndarray:
        # a counter-based generator: batch 1,000,000 costs what batch 0 does
        generator = np.random.Generator(np.random.Philox(key=seed, counter=[0, index, 0, 0]))
        return generator.integers(0, count, size=batch_size)

    return starts


def shuffle_windows(tokens: Tokens, batch_size: int, seq_length: int, seed: int) -> Starts:
    """Windows that do not overlap, each once an epoch, in an order that changes with the epoch.

    Memory: 8 bytes for each window of an epoch, two epochs at most.
    """
    count = 1 + (num_windows(tokens, seq_length) - 1) // seq_length

    @lru_cache(maxsize=2)  # a batch may lie across the border of two epochs
    def order(epoch: int) -> np.ndarray:
        return np.random.default_rng((seed, epoch)).permutation(count)

    def starts(index: int) -> np.ndarray:
        positions = range(index * batch_size, (index + 1) * batch_size)
        return np.array([order(at // count)[at % count] for at in positions]) * seq_length

    return starts


SAMPLERS = {"random": sample_windows, "epoch": shuffle_windows}


class Copied(NamedTuple):
    """Rows (B, T + 1) on their way to the device; `event` is None where they are there."""

    rows: Tensor
    event: torch.cuda.Event | None = None

    def received(self) -> Batch:
        """The batch, for the stream of whoever calls this.

        The host does not wait: the stream does, before it uses them.
        """
        if self.event is not None:
            stream = torch.cuda.current_stream(self.rows.device)
            stream.wait_event(self.event)
            self.rows.record_stream(stream)  # their memory is not given away before that
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
    """For what a step draws besides its batches."""
    return int(np.random.SeedSequence((seed, step)).generate_state(1, np.uint64)[0])


class BatchSource:
    """Batch number -> this process's rows of it; the same seed gives the same batches.

    Together, the ranks of a world read each batch once: rank after rank, in consecutive rows.
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
        """Where the windows of the batch begin."""
        return self._starts(index)[self._rows]

    def __call__(self, index: int) -> Batch:
        return self.copied(index).received()

    def copied(self, index: int) -> Copied:
        """For any thread. On CUDA the copy runs beside the computation, from pinned memory, on a
        stream of its own.
        """
        rows = _windows(self._tokens, self.starts(index), self._seq_length)
        if self._stream is None:
            return Copied(rows.to(self._device))
        # a thread begins with device 0 as its own, whatever the run's is
        with torch.cuda.device(self._stream.device), torch.cuda.stream(self._stream):
            rows = rows.pin_memory().to(self._stream.device, non_blocking=True)
            event = torch.cuda.Event()
            event.record(self._stream)
        return Copied(rows, event)
