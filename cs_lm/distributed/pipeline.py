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


class Absent(nn.Module):
    """In place of a layer that another stage has: it changes nothing, and has no parameters."""

    def __init__(self, device: torch.device):
        super().__init__()
        self.weight = torch.empty(0, device=device)  # who asks for the device of a weight gets it

    def forward(self, x: Tensor, **_: Any) -> Tensor:
        return x


def stage_layers(num_layers: int, team: Team) -> range:
    """The layers of this rank: of n layers, each stage has n / size, rounded down or up."""
    first, end = (num_layers * rank // team.size for rank in (team.rank, team.rank + 1))
    return range(first, end)


def _pass_on(hidden: Tensor, _weight: Tensor, targets: Tensor, _ignored: int) -> tuple:
    """In place of the loss, where a later stage computes it."""
    return hidden, targets.new_zeros(())


class Pipeline:
    """This rank's stage of a model, and its neighbours."""

    def __init__(self, model: nn.Module, team: Team, back: Team):
        """Takes the layers of other stages out of the model.

        back  the same ranks: gradients go this way. With NCCL, a send waits for its receiver, and
              holds up what its group sends or receives after it.
        """
        self.model, self.team, self._back = model, team, back
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
            model.ln_final, model.lm_head = Absent(device), None
            model.ops = model.ops._replace(linear_cross_entropy=_pass_on)
        self._sent: list[tuple[dist.Work, Tensor]] = []

    def _embed(self, token_ids: Tensor, positions: Tensor) -> tuple[Tensor, list[dict]]:
        """What the stage before has sent, in place of the embedding."""
        rotation = self.model.rope.rotation(positions)
        return self._received, [{"rotation": rotation}] * len(self.model.layers)

    # ---- neighbours ----

    def _send(self, tensor: Tensor, team: Team, step: int) -> None:
        tensor = tensor.detach().float().contiguous()
        neighbour = dist.get_global_rank(team.group, team.rank + step)
        self._sent.append((dist.isend(tensor, neighbour, team.group), tensor))
        # a neighbour is at most as many micro-batches behind as there are stages: older ones came
        self._wait(2 * team.size)

    def _receive(self, shape: Sequence[int], team: Team, step: int) -> Tensor:
        device = next(self.model.parameters()).device
        tensor = torch.empty(tuple(shape), device=device)
        dist.recv(tensor, dist.get_global_rank(team.group, team.rank + step), team.group)
        return tensor

    def _wait(self, may_be_left: int = 0) -> None:
        while len(self._sent) > may_be_left:
            work, _ = self._sent.pop(0)
            work.wait()

    # ---- passes ----

    def forward(
        self, batch: Any, loss: Callable[[Any, Any], Any], shape: Sequence[int]
    ) -> tuple[Tensor | None, Any]:
        """What was received, and the stage's output or, of the last stage, loss and count."""
        received = None
        if not self.is_first:
            received = self._received = self._receive(shape, self.team, -1)
            received.requires_grad_(torch.is_grad_enabled())
        found = loss(self.model, batch)
        if not self.is_last:
            found = found[0]
            self._send(found, self.team, 1)
        return received, found

    def _backward(self, received: Tensor | None, found: Any) -> None:
        if self.is_last:
            found[0].backward()
        else:
            found.backward(self._receive(found.shape, self._back, 1).to(found.dtype))
        if received is not None:
            self._send(received.grad, self._back, -1)

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
