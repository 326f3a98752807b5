"""Pipeline parallelism by hand: each rank of a pipeline has some layers, and passes activations on.

Micro-batches follow each other. A stage computes some forward passes first, as many as there are
stages after it, then a forward and a backward pass in turns, and then the backward passes that are
left (1F1B). So stage s of p holds at most p - s micro-batches. With m of them, a stage waits for
(p - 1) / m of the time that it computes. Source: Narayanan et al. 2021, Efficient large-scale
language model training on GPU clusters using Megatron-LM, section 2.2.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from cs_lm.distributed.grid import Team
from cs_lm.distributed.parts import rows_of


class Absent(nn.Module):
    """In place of a layer that another stage has: it changes nothing, and has no parameters."""

    def __init__(self, device: torch.device):
        super().__init__()
        self.weight = torch.empty(0, device=device)  # who asks for the device of a weight gets it

    def forward(self, x: Tensor, **_: Any) -> Tensor:
        return x


def stage_layers(num_layers: int, team: Team) -> range:
    """The layers of this rank."""
    return rows_of(num_layers, team.rank, team.size)


class Pipeline:
    """This rank's stage of a model, and its neighbours."""

    def __init__(self, model: nn.Module, team: Team):
        """Takes the layers of other stages out of the model."""
        self.model, self.team = model, team
        self.is_first, self.is_last = team.rank == 0, team.rank == team.size - 1
        device = model.token_embeddings.weight.device
        own = stage_layers(len(model.layers), team)
        for number in range(len(model.layers)):
            if number not in own:
                model.layers[number] = Absent(device)
        self._received: Tensor | None = None
        if not self.is_first:
            model.token_embeddings = Absent(device)
            model.embed = self._embed
        if not self.is_last:
            model.ln_final, model.lm_head = Absent(device), Absent(device)
        self._sent: list[tuple[dist.Work, Tensor]] = []

    def _embed(self, token_ids: Tensor, positions: Tensor) -> tuple[Tensor, list[dict]]:
        """What the stage before has sent, in place of the embedding."""
        rotation = self.model.rope.rotation(positions)
        return self._received, [{"rotation": rotation}] * len(self.model.layers)

    # ---- neighbours ----

    def _neighbour(self, step: int) -> int:
        return dist.get_global_rank(self.team.group, self.team.rank + step)

    def _send(self, tensor: Tensor, step: int) -> None:
        tensor = tensor.detach().float().contiguous()
        self._sent.append((dist.isend(tensor, self._neighbour(step), self.team.group), tensor))

    def _receive(self, shape: Sequence[int], step: int) -> Tensor:
        device = next(self.model.parameters()).device
        tensor = torch.empty(tuple(shape), device=device)
        dist.recv(tensor, self._neighbour(step), self.team.group)
        return tensor

    def _wait(self) -> None:
        for work, _ in self._sent:
            work.wait()
        self._sent.clear()

    # ---- passes ----

    def forward(
        self, batch: Any, loss: Callable[[Any, Any], Any], shape: Sequence[int]
    ) -> tuple[Tensor | None, Any]:
        """What was received, and the stage's output or, of the last stage, loss and count."""
        received = None
        if not self.is_first:
            received = self._received = self._receive(shape, -1)
            received.requires_grad_(torch.is_grad_enabled())
        found = loss(self.model, batch) if self.is_last else self.model.hidden_states(batch.inputs)
        if not self.is_last:
            self._send(found, 1)
        return received, found

    def _backward(self, received: Tensor | None, found: Any) -> None:
        if self.is_last:
            found[0].backward()
        else:
            found.backward(self._receive(found.shape, 1).to(found.dtype))
        if received is not None:
            self._send(received.grad, -1)

    def train(
        self,
        batches: Sequence[Any],
        loss: Callable[[Any, Any], tuple[Tensor, Tensor]],
        shape: Sequence[int],
        begin_backward: Callable[[bool], None],
    ) -> tuple[Tensor, Tensor]:
        """All passes of an update (1F1B): sums of loss and count, 0 but for the last stage.

        shape  of the activations between stages
        """
        count, ahead = len(batches), min(self.team.size - self.team.rank - 1, len(batches))
        under_way: list[tuple[Tensor | None, Any]] = []
        sums, done = [], 0

        def one_backward() -> None:
            nonlocal done
            begin_backward(done == count - 1)
            self._backward(*under_way.pop(0))
            done += 1

        for number, batch in enumerate(batches):
            received, found = self.forward(batch, loss, shape)
            if self.is_last:
                sums.append(torch.stack((found[0].detach().double(), found[1].double())))
            under_way.append((received, found))
            if number >= ahead:
                one_backward()
        while under_way:
            one_backward()
        self._wait()
        device = next(self.model.parameters()).device
        total = torch.stack(sums).sum(0) if sums else torch.zeros(2, dtype=torch.float64)
        return tuple(total.to(device))

    @torch.no_grad()
    def evaluate(
        self, batch: Any, loss: Callable[[Any, Any], Any], shape: Sequence[int]
    ) -> tuple[Tensor, Tensor]:
        """Loss and count of a batch at all stages."""
        _, found = self.forward(batch, loss, shape)
        self._wait()
        device = next(self.model.parameters()).device
        sums = torch.zeros(2, dtype=torch.float64, device=device)
        if self.is_last:
            sums = torch.stack((found[0].double(), found[1].double()))
        dist.all_reduce(sums, group=self.team.group)
        return tuple(sums)
