"""What a step draws, as a pure function of the seed and the step's or batch's number."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from cs_lm.data.token_store import Tokens

Starts = Callable[[int], np.ndarray]  # batch number -> first positions of its windows, (B,)


def num_starts(tokens: Tokens, seq_length: int) -> int:
    """How many windows of seq_length + 1 tokens there are.

    Raises: ValueError when there is none.
    """
    if len(tokens) <= seq_length:
        raise ValueError(
            f"tokens: got {len(tokens)}, need at least {seq_length + 1} for one window of "
            f"--seq_length ({seq_length}); give a longer text or a shorter --seq_length"
        )
    return len(tokens) - seq_length


def random_starts(tokens: Tokens, batch_size: int, seq_length: int, seed: int) -> Starts:
    """Every window equally likely, the last one included; drawn anew for each batch number."""
    count = num_starts(tokens, seq_length)

    def starts(index: int) -> np.ndarray:
        # a counter-based generator: batch 1,000,000 costs what batch 0 does
        generator = np.random.Generator(np.random.Philox(key=seed, counter=[0, index, 0, 0]))
        return generator.integers(0, count, size=batch_size)

    return starts


def epoch_starts(tokens: Tokens, batch_size: int, seq_length: int, seed: int) -> Starts:
    """Windows that do not overlap, each once an epoch, in an order that changes with the epoch."""
    num_windows = 1 + (num_starts(tokens, seq_length) - 1) // seq_length

    def starts(index: int) -> np.ndarray:
        positions = index * batch_size + np.arange(batch_size)
        epochs, places = np.divmod(positions, num_windows)
        order = [
            permuted(places[epochs == epoch], num_windows, (seed, int(epoch)))
            for epoch in np.unique(epochs)
        ]
        return np.concatenate(order) * seq_length

    return starts


SAMPLERS = {"random": random_starts, "epoch": epoch_starts}


def permuted(places: np.ndarray, size: int, key: tuple[int, ...]) -> np.ndarray:
    """Where a pseudo-random permutation of range(size) sends the places.

    A Feistel network permutes the next power of four; places that fall outside are sent on until
    they are inside (cycle walking), which keeps it a permutation. No array of `size` entries.
    Source: Black and Rogaway 2002, Ciphers with arbitrary finite domains.
    """
    half_bits = max(1, ((size - 1).bit_length() + 1) // 2)
    mask = np.uint64((1 << half_bits) - 1)
    round_keys = np.random.SeedSequence(key).generate_state(6, np.uint64)

    def encipher(values: np.ndarray) -> np.ndarray:
        left, right = values >> np.uint64(half_bits), values & mask
        for round_key in round_keys:
            mixed = (right + round_key) * np.uint64(0x9E3779B97F4A7C15)  # wraps at 2^64
            mixed = (mixed ^ (mixed >> np.uint64(29))) * np.uint64(0xBF58476D1CE4E5B9)
            left, right = right, left ^ (mixed >> np.uint64(32)) & mask
        return left << np.uint64(half_bits) | right

    values = encipher(places.astype(np.uint64))
    while (outside := values >= size).any():
        values[outside] = encipher(values[outside])
    return values.astype(np.int64)


class Copied(NamedTuple):
    """Rows (B, T + 1) on their way to the device; `event` is None where they are there."""

    rows: Tensor
    event: torch.cuda.Event | None = None

    def received(self) -> tuple[Tensor, Tensor]:
        """x and y = x shifted by one, both (B, T), for the stream of whoever calls this.

        The host does not wait: the stream does, before it uses them.
        """
        if self.event is not None:
            stream = torch.cuda.current_stream(self.rows.device)
            stream.wait_event(self.event)
            self.rows.record_stream(stream)  # their memory is not given away before that
        return self.rows[:, :-1], self.rows[:, 1:]


def load_windows(
    tokens: Tokens, starts: np.ndarray, seq_length: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """x and y = x shifted by one, both (B, T) int64, from windows at the given positions."""
    return Copied(_windows(tokens, starts, seq_length).to(device)).received()


def _windows(tokens: Tokens, starts: np.ndarray, seq_length: int) -> Tensor:
    windows = np.stack([tokens.load_by_range(s, s + seq_length + 1) for s in starts.tolist()])
    return torch.from_numpy(windows.astype(np.int64))  # (B, T + 1)


def seed_of_step(seed: int, step: int) -> int:
    """For what a step draws besides its batches."""
    return int(np.random.SeedSequence((seed, step)).generate_state(1, np.uint64)[0])


class BatchSource:
    """Batch number -> (x, y); the same seed gives the same batches, from any number on."""

    def __init__(
        self,
        tokens: Tokens,
        batch_size: int,
        seq_length: int,
        seed: int,
        sampling: str,
        device: torch.device,
    ):
        self._tokens, self._seq_length, self._device = tokens, seq_length, device
        # a batch's number -> where its windows begin
        self.starts = SAMPLERS[sampling](tokens, batch_size, seq_length, seed)
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def __call__(self, index: int) -> tuple[Tensor, Tensor]:
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
