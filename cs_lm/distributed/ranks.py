"""The processes ("ranks") that train one model together: joining them, and what they agree on."""

import copy
import os
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from cs_lm.device import World
from cs_lm.distributed.launch import Launched, launched
from cs_lm.errors import Problem, UserError, is_out_of_memory

# Rank 0 may have to encode a large text while the others wait [s].
_PREPARING_S = 24 * 3600.0
# Ranks may write their parts of a checkpoint at different speeds [s].
_WRITING_S = 3600.0
_MISSING_WAIT_S = 5.0  # after a failure: how long to wait for a sign of the other ranks


class RankLostError(Exception):
    """Another rank has ended or does not answer; the message names it."""


def wide_dtype(device: torch.device) -> torch.dtype:
    """The dtype for sums over ranks: float64 counts all tokens that there can be."""
    return torch.float32 if device.type == "mps" else torch.float64


class Ranks:
    """This process alone: nothing is communicated. `Joined` is the same among several processes."""

    rank, size = 0, 1
    device: torch.device | None = None  # of this rank; None: the caller chooses
    names: Sequence[str] = ()  # each rank of the run with its process and host
    group: Any = None  # of torch.distributed; None: all

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def world(self, device: torch.device) -> World:
        return World(device, self.rank, self.size)

    def sum_(self, tensor: Tensor) -> Tensor:
        """Replaces the tensor by the sum of all ranks' ones; returns it."""
        return tensor

    def sums(self, *scalars: Tensor) -> tuple[Tensor, ...]:
        """The sums of all ranks' scalars."""
        wide = wide_dtype(scalars[0].device)
        totals = self.sum_(torch.stack([one.to(wide) for one in scalars]))
        return tuple(total.to(one.dtype) for total, one in zip(totals, scalars))

    def differing(self, named: Mapping[str, Tensor], group: Any = None) -> list[str]:
        """The names of the tensors whose bits are not equal on all ranks of the group."""
        return []

    def max(self, number: int) -> int:
        """The greatest number of all ranks. All ranks must call it."""
        return number

    def texts(self, text: str) -> list[str]:
        """The text of each rank."""
        return [text]

    def from_first(self, text: str) -> str:
        """The text of rank 0."""
        return text

    def broadcast_(self, tensors: Sequence[Tensor]) -> None:
        """Replaces the tensors by those of rank 0."""

    def within(self, group: Any, rank: int, size: int) -> "Ranks":
        """Some of the ranks, for sums and broadcasts; rank  this one's number among them"""
        return self

    def branch(self) -> "Ranks":
        """The same ranks, whose words go a way of their own: for a thread. All must call it."""
        return self

    @contextmanager
    def first_alone(self) -> Iterator[None]:
        """While entered, rank 0 works; the others enter after it, for example to find its files."""
        yield

    @contextmanager
    def communicating(self) -> Iterator[None]:
        """Raises: RankLostError instead of the RuntimeError of a failed communication."""
        yield

    def wait_for_first(self, at_most_s: float) -> None:
        """Call it at the end: returns when rank 0 has called it, too, or after that time.

        torchrun ends all ranks soon after one of them has ended.
        """

    def leave(self) -> None:
        """Ends the communication."""


ALONE = Ranks()


class Joined(Ranks):
    """This process among several.

    Tensors are summed on the device, words are exchanged on the CPU with gloo.
    Raises: RankLostError for a communication that fails or takes longer than `timeout_s`.
    """

    def __init__(self, place: Launched, device: torch.device, timeout_s: float):
        backend = "nccl" if device.type == "cuda" else "gloo"
        if device.type == "cuda":
            torch.cuda.set_device(device)
        timeout = timedelta(seconds=timeout_s)
        dist.init_process_group(backend, rank=place.rank, world_size=place.size, timeout=timeout)
        self.rank, self.size, self.device = place.rank, place.size, device
        self._place = place  # in the run
        self.group = dist.group.WORLD
        self._words = dist.new_group(backend="gloo", timeout=timeout)
        self._store = dist.distributed_c10d._get_default_store()
        self._num_waits, self._is_first_lost = 0, False
        where = f"process {os.getpid()} on {socket.gethostname()}"
        self.names = self.texts(f"rank {self.rank} ({where})")

    def sum_(self, tensor: Tensor) -> Tensor:
        with self.communicating():
            dist.all_reduce(tensor, group=self.group)
        return tensor

    def differing(self, named: Mapping[str, Tensor], group: Any = None) -> list[str]:
        sums = torch.stack([checksum(tensor) for tensor in named.values()])
        highest, lowest = sums.clone(), sums.clone()
        with self.communicating():
            dist.all_reduce(highest, dist.ReduceOp.MAX, group or self.group)
            dist.all_reduce(lowest, dist.ReduceOp.MIN, group or self.group)
        return [name for name, differs in zip(named, highest != lowest) if differs]

    def max(self, number: int) -> int:
        value = torch.tensor(number)
        with self.communicating():
            dist.all_reduce(value, dist.ReduceOp.MAX, self._words)
        return int(value)

    def texts(self, text: str) -> list[str]:
        data = text.encode("utf-8")
        data = len(data).to_bytes(8, "little") + data
        own = torch.zeros(self.max(len(data)), dtype=torch.uint8)
        own[: len(data)] = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        found = [torch.empty_like(own) for _ in range(self.size)]
        with self.communicating():
            dist.all_gather(found, own, self._words)
        rows = [row.numpy().tobytes() for row in found]
        return [row[8 : 8 + int.from_bytes(row[:8], "little")].decode("utf-8") for row in rows]

    def from_first(self, text: str) -> str:
        return self.texts(text if self.is_first else "")[0]

    def broadcast_(self, tensors: Sequence[Tensor]) -> None:
        with self.communicating():
            for tensor in tensors:
                dist.broadcast(tensor, dist.get_global_rank(self.group, 0), self.group)

    def within(self, group: Any, rank: int, size: int) -> Ranks:
        own = copy.copy(self)
        own.group, own.rank, own.size = group, rank, size
        return own

    def branch(self) -> Ranks:
        own = copy.copy(self)
        own._words = dist.new_group(backend="gloo", timeout=timedelta(seconds=_WRITING_S))
        return own

    @contextmanager
    def first_alone(self) -> Iterator[None]:
        self._num_waits += 1
        key = f"rank 0 is done {self._num_waits}"
        if not self.is_first:
            self._wait_for(key)
        is_done = "no"
        try:
            yield
            is_done = "yes"
        finally:
            if self.is_first:
                with suppress(RuntimeError):  # it must not hide what has failed
                    self._store.set(key, is_done)

    def _wait_for(self, key: str) -> None:
        try:
            self._store.wait([key], timedelta(seconds=_PREPARING_S))
            is_done = self._store.get(key) == b"yes"
        except RuntimeError:  # the store was where rank 0 was
            is_done = False
        if not is_done:
            raise UserError(f"{self.names[0]} could not prepare the run; its message says why")

    @contextmanager
    def communicating(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            if is_out_of_memory(error) or not _is_of_communication(error):
                raise  # a fault of this rank, whatever the others wait for
            if lost := self._missing():
                raise RankLostError(f"{', '.join(lost)} has ended or does not answer") from error
            first_line = str(error).partition("\n")[0]
            raise RankLostError(f"the ranks cannot reach each other: {first_line}") from error

    def _missing(self) -> list[str]:
        """The ranks that do not answer any more."""
        silent = set(range(self._place.size))
        end_s = time.monotonic() + _MISSING_WAIT_S
        try:
            self._store.set(f"alive {self._place.rank}", "yes")
            while silent and time.monotonic() < end_s:
                silent = {rank for rank in silent if not self._store.check([f"alive {rank}"])}
                time.sleep(0.1)
        except RuntimeError:  # the store is where rank 0 is, or was
            silent = {0}
        self._is_first_lost |= 0 in silent
        return [self.names[rank] for rank in sorted(silent)]

    def wait_for_first(self, at_most_s: float) -> None:
        if self.is_first:
            self._store.set("rank 0 has ended", "yes")
            return
        if self._is_first_lost:
            return
        with suppress(RuntimeError):  # too late, or its store is gone
            self._store.wait(["rank 0 has ended"], timedelta(seconds=at_most_s))

    def leave(self) -> None:
        dist.destroy_process_group()


def _is_of_communication(error: RuntimeError) -> bool:
    """Gloo raises plain RuntimeErrors, which name its files or what has happened."""
    words = ("gloo", "connection", "broken pipe", "socket", "timed out", "timeout")
    text = str(error).lower()
    return isinstance(error, dist.DistError) or any(word in text for word in words)


def sum_into_parts(own: Tensor, whole: Tensor, group: Any = None) -> None:
    """`own` becomes this rank's rows, as many at each rank, of the sum of all ranks' `whole`."""
    newer = getattr(dist, "reduce_scatter_single", None)  # the other name warns since torch 2.13
    (newer or dist.reduce_scatter_tensor)(own, whole, group=group)


_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def checksum(tensor: Tensor) -> Tensor:
    """The sum of the tensor's bits, read as integers: an int64 scalar on its device."""
    bits = tensor.detach().contiguous().view(_INTEGERS[tensor.element_size()])
    return bits.sum(dtype=torch.int64)


def join(device: torch.device, timeout_s: float) -> Ranks:
    """Joins the other processes that `torchrun` started.

    Raises: UserError when torchrun did not start this process, or they cannot be reached.
    """
    place = launched()
    if place is None:
        raise UserError(
            Problem(
                "--parallel",
                "this process was not started by torchrun",
                fix="start it with: torchrun --nproc_per_node 2 run_clm.py ...",
            )
        )
    try:
        return Joined(place, device, timeout_s)
    except (RuntimeError, ValueError) as error:
        first_line = str(error).partition("\n")[0]
        raise UserError(
            f"rank {place.rank} of {place.size}: cannot join the others ({first_line})"
        ) from None
