"""Data parallelism by hand: every rank has the whole model, and gradients are summed."""

import itertools
import time
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from cs_lm.distributed.ranks import ALONE, Ranks

BUCKET_BYTES = 25 << 20


class _Bucket(NamedTuple):
    """Parameters whose gradients travel together, one after the other in one tensor."""

    parameters: list[Tensor]
    offsets: list[int]  # of each parameter, and the end


class GradientSum:
    """Sums the gradients over all ranks, while backward still computes others.

    Buckets are in the reverse order of the parameters, which is about the order in which backward
    finishes them. A bucket is sent when all its gradients are there and its predecessors are sent:
    autograd's order may differ between ranks, the order of communication must not.

        sum.begin_backward(is_last=True); loss.backward(); sum.finish()

    A parameter without a gradient on this rank counts as zeros. If no rank has one, it has none
    afterwards, as with one process.
    Numerics: all ranks get the same bits.
    Cost: gradients are copied once, into the bucket; they are views of it afterwards.
    """

    def __init__(self, parameters: Iterable[Tensor], bucket_bytes: int = BUCKET_BYTES):
        wanted = [p for p in parameters if p.requires_grad]
        self._buckets = list(_buckets(list(dict.fromkeys(wanted))[::-1], bucket_bytes))
        self._bucket_of = {
            id(p): number for number, one in enumerate(self._buckets) for p in one.parameters
        }
        for bucket in self._buckets:
            for parameter in bucket.parameters:
                parameter.register_post_accumulate_grad_hook(self._arrived)
        self._is_last = False
        self._start()

    def _start(self) -> None:
        self._missing = [len(one.parameters) for one in self._buckets]
        self._sent: list[tuple[Tensor, dist.Work]] = []

    def begin_backward(self, is_last: bool) -> None:
        """Call it before each backward pass; only the last one of an update communicates."""
        self._is_last = is_last

    def _arrived(self, parameter: Tensor) -> None:
        if self._is_last:
            self._missing[self._bucket_of[id(parameter)]] -= 1
            while len(self._sent) < len(self._buckets) and not self._missing[len(self._sent)]:
                self._send()

    def _send(self) -> None:
        parameters, _ = self._buckets[len(self._sent)]
        first = parameters[0]
        parts = [
            torch.zeros_like(p).view(-1) if p.grad is None else p.grad.reshape(-1)
            for p in parameters
        ]
        # how many ranks have each gradient
        parts.append(torch.tensor([p.grad is not None for p in parameters], dtype=first.dtype)
                     .to(first.device, non_blocking=True))  # fmt: skip
        flat = torch.cat(parts)
        self._sent.append((flat, dist.all_reduce(flat, async_op=True)))

    def finish(self) -> None:
        """Waits for all sums, which replace the gradients."""
        while len(self._sent) < len(self._buckets):
            self._send()
        for (parameters, offsets), (flat, work) in zip(self._buckets, self._sent):
            work.wait()
            for number, (p, start, end) in enumerate(zip(parameters, offsets, offsets[1:])):
                if p.grad is not None or flat[offsets[-1] + number]:
                    p.grad = flat[start:end].view(p.shape)
        self._is_last = False
        self._start()


def _buckets(parameters: list[Tensor], bucket_bytes: int) -> Iterable[_Bucket]:
    own: list[Tensor] = []
    size = 0
    for parameter in parameters:
        kind, num_bytes = (parameter.dtype, parameter.device), parameter.nbytes
        if own and (size + num_bytes > bucket_bytes or (own[0].dtype, own[0].device) != kind):
            yield _bucket(own)
            own, size = [], 0
        own.append(parameter)
        size += num_bytes
    if own:
        yield _bucket(own)


def _bucket(parameters: list[Tensor]) -> _Bucket:
    return _Bucket(parameters, [0, *itertools.accumulate(p.numel() for p in parameters)])


class Sharing:
    """How several processes share an update. This class: one process does all of it.

    begin_backward(is_last)     before the backward pass of each micro-batch
    finish(loss_sum, count)     after the last one: gradients and sums are those of all rows
    """

    ranks: Ranks = ALONE

    def begin_backward(self, is_last: bool) -> None:
        pass

    def finish(self, loss_sum: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
        return loss_sum, count

    def differences(self, optimizer: torch.optim.Optimizer) -> list[str]:
        """Names of tensors that are not equal on all ranks, but should be."""
        return []

    def take_waited_s(self) -> float:
        """Seconds that this process has waited for others since the last call."""
        return 0.0


ALL_OF_IT = Sharing()


class DataParallel(Sharing):
    """Each rank has the whole model, computes its rows, and all ranks make the same update.

    Begins with rank 0's weights and buffers.
    """

    def __init__(self, model: nn.Module, ranks: Ranks, bucket_bytes: int = BUCKET_BYTES):
        self.ranks, self._model = ranks, model
        with torch.no_grad():
            ranks.broadcast_([*model.parameters(), *model.buffers()])
        self._gradients = GradientSum(model.parameters(), bucket_bytes)
        self._waited_s = 0.0

    def begin_backward(self, is_last: bool) -> None:
        self._gradients.begin_backward(is_last)

    def finish(self, loss_sum: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
        start_s = time.perf_counter()
        with self.ranks.communicating():
            self._gradients.finish()
        # float64 counts all tokens that there can be
        wide = torch.float32 if loss_sum.device.type == "mps" else torch.float64
        total, counted = self.ranks.sum_(torch.stack((loss_sum.to(wide), count.to(wide))))
        self._waited_s += time.perf_counter() - start_s
        return total.to(loss_sum.dtype), counted.to(count.dtype)

    def take_waited_s(self) -> float:
        """On CUDA the host's waiting, which is less than the device's."""
        waited_s, self._waited_s = self._waited_s, 0.0
        return waited_s

    def differences(self, optimizer: torch.optim.Optimizer) -> list[str]:
        named = {}
        for name, parameter in self._model.named_parameters():
            named[name] = parameter
            for key, value in optimizer.state.get(parameter, {}).items():
                if isinstance(value, Tensor):
                    named[f"{key} of {name}"] = value
        sums = torch.stack([checksum(tensor) for tensor in named.values()])
        highest, lowest = sums.clone(), sums.clone()
        with self.ranks.communicating():
            dist.all_reduce(highest, dist.ReduceOp.MAX)
            dist.all_reduce(lowest, dist.ReduceOp.MIN)
        return [name for name, differs in zip(named, highest != lowest) if differs]


_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def checksum(tensor: Tensor) -> Tensor:
    """The sum of the tensor's bits, read as integers: an int64 scalar on its device."""
    bits = tensor.detach().contiguous().view(_INTEGERS[tensor.element_size()])
    return bits.sum(dtype=torch.int64)


class ReplicatedModule(nn.Module):
    """A module whose gradients become the mean over all ranks, for a training loop of one's own.

    Begins with rank 0's weights and buffers. Call `finish` between backward and the optimizer.
    Needs a process group.
    """

    def __init__(self, module: nn.Module, bucket_bytes: int = BUCKET_BYTES):
        super().__init__()
        self.module = module
        with torch.no_grad():
            for tensor in (*module.parameters(), *module.buffers()):
                dist.broadcast(tensor, 0)
        self._gradients = GradientSum(module.parameters(), bucket_bytes)
        self._gradients.begin_backward(is_last=True)

    def forward(self, *arguments: Any, **named: Any) -> Any:
        return self.module(*arguments, **named)

    def finish(self) -> None:
        """Waits for all sums, and divides them by the number of ranks."""
        self._gradients.finish()
        self._gradients.begin_backward(is_last=True)
        parameters = [p for p in self.module.parameters() if p.requires_grad]
        gradients = [p.grad for p in parameters if p.grad is not None]
        torch._foreach_div_(gradients, dist.get_world_size())
