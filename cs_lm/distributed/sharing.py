"""How several processes share a model, its optimizer and each update: the interface."""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from cs_lm.distributed.parts import Part, whole_part
from cs_lm.distributed.ranks import ALONE, Ranks

LossFunction = Callable[[Any, Any], tuple[Tensor, Tensor]]  # (model, batch): sum and count
Norm = Callable[[list[Tensor]], Tensor]  # of some gradients, together


class Sharing:
    """This class: one process has all of it and does all of it. Others override what differs.

    Of a model: `finish_layer` while it is made, `take_model` and `take` when it is made, `begin`
    when its weights are loaded. Of an update, in this order: `begin_update`, `accumulate`,
    `finish`, `clipped` and `joint_norm`, `update`.

    saves_parts         whether each process saves a part of the state, and not rank 0 all of it
    computes_together   whether every forward pass needs all processes
    can_generate        whether the model can write text while it is shared
    """

    ranks: Ranks = ALONE
    saves_parts = False
    computes_together = False
    can_generate = True
    _waited_s = 0.0

    @staticmethod
    def alone(model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> "Sharing":
        """One process with all of the model, and of its optimizer where it makes updates."""
        found = Sharing()
        found.take_model(model)
        if optimizer is not None:
            found.take(optimizer)
        return found

    def finish_layer(self, layer: nn.Module) -> None:
        """Called with each layer of a model when it has its initial weights."""

    def take_model(self, model: nn.Module) -> None:
        """Called when the model is made, before its optimizer."""
        self.model = model

    def take(self, optimizer: torch.optim.Optimizer) -> None:
        """The model's optimizer, which has no state yet; it may get other tensors."""
        self.optimizer = optimizer

    def begin(self) -> None:
        """Makes the weights and buffers those of rank 0, where ranks have them all."""

    def of_whole_rows(self, loss: LossFunction) -> LossFunction:
        """A loss without gradients, of rows of which processes have parts; all get the same."""
        return loss

    def part_of_batch(self, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """What this process reads of the (B, T) inputs and targets of its rows."""
        return inputs, targets

    # ---- an update ----

    def begin_update(self) -> None:
        """Removes the gradients."""
        for parameter in self.model.parameters():
            parameter.grad = None

    def begin_backward(self, is_last: bool) -> None:
        """Called before the backward pass of each micro-batch."""

    def accumulate(
        self, batches: Sequence[Any], loss: LossFunction, joins: bool = True
    ) -> tuple[Tensor, Tensor]:
        """All forward and backward passes of an update: sum of the losses, and their count.

        joins  False: leave gradients of this process's rows, where the others are not needed
        """
        sums, counts = [], []
        for number, batch in enumerate(batches, 1):
            loss_sum, count = loss(self.model, batch)
            self.begin_backward(joins and number == len(batches))
            loss_sum.backward()
            sums.append(loss_sum.detach())
            counts.append(count)
        return torch.stack(sums).sum(), torch.stack(counts).sum()

    def finish(self, loss_sum: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
        """After the last backward pass: gradients and both sums become those of all rows."""
        return loss_sum, count

    def collect_gradients(self) -> None:
        """After backward without `finish`: the tensors of `parameters` get their gradients."""

    def clipped(self, part: nn.Module) -> Iterable[Tensor]:
        """Parameters of a part of the model, whose gradients are clipped together."""
        return part.parameters()

    def joint_norm(self, gradients: list[Tensor], norm: Norm) -> Tensor:
        """The norm of a whole part of the model; gradients  those of `clipped`."""
        return norm(gradients)

    def update(self, should_apply: Tensor) -> None:
        """One step of the optimizer, from the gradients."""
        self.optimizer.step(should_apply=should_apply)

    def computing(self) -> AbstractContextManager[None]:
        """Around forward and backward passes: turns a lost rank into a RankLostError."""
        return nullcontext()

    # ---- what each process has ----

    def parameters(self) -> dict[str, Tensor]:
        """What this process has of each parameter, with its gradient."""
        return dict(self.model.named_parameters())

    def optimized(self) -> dict[str, Tensor]:
        """The optimizer's tensor of each parameter."""
        return self.parameters()

    def held(self) -> dict[str, Part]:
        """What this process has of each tensor in the model's state dict."""
        return {name: whole_part(tensor) for name, tensor in self.model.state_dict().items()}

    def saved(self) -> dict[str, Part]:
        """The part of `held` that this process saves. All of them together save everything."""
        return self.held()

    def place_of(self, parameter: Tensor) -> Part:
        """The place of one of the optimizer's tensors in its whole parameter."""
        return whole_part(parameter)

    def numbered(self) -> dict[int, Tensor]:
        """The optimizer's tensors by their numbers in its state dict."""
        groups = self.optimizer.param_groups
        return dict(enumerate(p for group in groups for p in group["params"]))

    def group_sizes(self) -> list[int]:
        """The number of parameters in each of the optimizer's groups."""
        return [len(group["params"]) for group in self.optimizer.param_groups]

    def saved_moments(self) -> dict[str, Any]:
        """The optimizer's state dict, with each moment as a part."""
        found = self.optimizer.state_dict()
        first = 0
        for group, size in zip(found["param_groups"], self.group_sizes()):
            group["params"] = list(range(first, first + size))
            first += size
        found["state"] = {}
        for number, parameter in self.numbered().items():
            place, state = self.place_of(parameter), self.optimizer.state.get(parameter, {})
            if state:
                found["state"][number] = {
                    name: place._replace(tensor=value) if isinstance(value, Tensor) else value
                    for name, value in state.items()
                }
        return found

    # ---- checks ----

    def differences(self) -> list[str]:
        """Names of tensors that are not equal on all ranks, but should be."""
        return []

    # ---- time ----

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Around communication: counts its time, which is less than the device's on CUDA."""
        start_s = time.perf_counter()
        with self.ranks.communicating():
            yield
        self._waited_s += time.perf_counter() - start_s

    def take_waited_s(self) -> float:
        """Seconds that this process has waited for others since the last call."""
        waited_s, self._waited_s = self._waited_s, 0.0
        return waited_s
