"""Data parallelism by hand: every rank has the whole model, and gradients are summed."""

import itertools
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from cs_lm.distributed.ranks import Ranks
from cs_lm.distributed.sharing import Sharing

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

    def __init__(
        self, parameters: Iterable[Tensor], bucket_bytes: int = BUCKET_BYTES, group: Any = None
    ):
        """group  the ranks that sum; None: all"""
        self._group = group
        wanted = list(dict.fromkeys(p for p in parameters if p.requires_grad))[::-1]
        self._buckets = [
            _Bucket(own, [0, *itertools.accumulate(p.numel() for p in own)])
            for own in in_buckets(wanted, bucket_bytes)
        ]
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
        work = dist.all_reduce(flat, group=self._group, async_op=True)
        self._sent.append((flat, work))

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


def in_buckets(tensors: list[Tensor], bucket_bytes: int) -> Iterator[list[Tensor]]:
    """The tensors in order, those of one dtype and device together up to so many bytes."""
    own: list[Tensor] = []
    size = 0
    for tensor in tensors:
        kind, num_bytes = (tensor.dtype, tensor.device), tensor.nbytes
        if own and (size + num_bytes > bucket_bytes or (own[0].dtype, own[0].device) != kind):
            yield own
            own, size = [], 0
        own.append(tensor)
        size += num_bytes
    if own:
        yield own


class DataParallel(Sharing):
    """Each rank has the whole model, computes its rows, and all ranks make the same update."""

    def __init__(self, ranks: Ranks, bucket_bytes: int = BUCKET_BYTES):
        self.ranks, self._bucket_bytes = ranks, bucket_bytes

    def take_model(self, model: nn.Module) -> None:
        super().take_model(model)
        self._gradients = GradientSum(model.parameters(), self._bucket_bytes, self.ranks.group)

    def begin(self) -> None:
        with torch.no_grad():
            self.ranks.broadcast_([*self.model.parameters(), *self.model.buffers()])

    def begin_backward(self, is_last: bool) -> None:
        self._gradients.begin_backward(is_last)

    def finish(self, loss_sum: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
        with self.waiting():
            self._gradients.finish()
            return self.ranks.sums(loss_sum, count)

    def differences(self) -> list[str]:
        named = {}
        for name, parameter in self.model.named_parameters():
            named[name] = parameter
            for key, value in self.optimizer.state.get(parameter, {}).items():
                if isinstance(value, Tensor):
                    named[f"{key} of {name}"] = value
        return self.ranks.differing(named)


class GradientMean(GradientSum):
    """The mean over all ranks instead of the sum, after every backward pass."""

    def __init__(self, parameters: Iterable[Tensor], bucket_bytes: int = BUCKET_BYTES):
        super().__init__(parameters, bucket_bytes)
        self.begin_backward(is_last=True)

    def finish(self) -> None:
        super().finish()
        self.begin_backward(is_last=True)
        gradients = [p.grad for one in self._buckets for p in one.parameters if p.grad is not None]
        if gradients:
            torch._foreach_div_(gradients, dist.get_world_size())


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
        self._gradients = GradientMean(module.parameters(), bucket_bytes)

    def forward(self, *arguments: Any, **named: Any) -> Any:
        return self.module(*arguments, **named)

    def finish(self) -> None:
        """Waits for all gradients."""
        self._gradients.finish()
