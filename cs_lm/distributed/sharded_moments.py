"""Data parallelism in which each rank has a part of the optimizer's moments (ZeRO, stage 1).

Rank r updates the rows r of every parameter, and then sends them to the others. A rank has all
weights and gradients, and 1 / W of the moments. Source: Rajbhandari et al. 2020, ZeRO.
"""

import torch
import torch.distributed as dist
from torch import Tensor

from cs_lm.distributed.data_parallel import DataParallel, in_buckets
from cs_lm.distributed.parts import Part, row_part, rows_of


class ShardedMoments(DataParallel):
    """As `DataParallel`. The optimizer gets this rank's rows of each parameter, as views.

    A parameter has at least one dimension.
    """

    saves_parts = True

    def take(self, optimizer: torch.optim.Optimizer) -> None:
        super().take(optimizer)
        own = self.ranks.rank, self.ranks.size
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self._rows = {p: row_part(p.detach(), *own) for p in parameters}
        self._places = {part.tensor: part for part in self._rows.values()}
        for group in optimizer.param_groups:
            group["params"] = [self._rows[p].tensor for p in group["params"]]
        self._buckets = list(in_buckets(parameters, self._bucket_bytes))

    def optimized(self) -> dict[str, Tensor]:
        return {name: self._rows[p].tensor for name, p in self.model.named_parameters()}

    def place_of(self, parameter: Tensor) -> Part:
        return self._places[parameter]

    def saved(self) -> dict[str, Part]:
        """Its rows of each parameter; rank 0 also the buffers."""
        parameters = {name: self._rows[p] for name, p in self.model.named_parameters()}
        return (self.held() if self.ranks.is_first else {}) | parameters

    @torch.no_grad()
    def update(self, should_apply: Tensor) -> None:
        for parameter, (view, (first, *_), _) in self._rows.items():
            gradient = parameter.grad
            view.grad = None if gradient is None else gradient[first : first + len(view)]
        super().update(should_apply)
        with self.waiting():
            for bucket in self._buckets:
                self._gather(bucket)

    def _gather(self, parameters: list[Tensor]) -> None:
        """The parameters get the rows of the other ranks."""
        size = self.ranks.size
        lengths = [len(rows_of(len(p), 0, size)) * p[0].numel() for p in parameters]
        own = parameters[0].new_zeros(sum(lengths))  # short parts are filled up
        for parameter, part in zip(parameters, own.split(lengths)):
            view = self._rows[parameter].tensor
            part[: view.numel()] = view.reshape(-1)
        every = own.new_empty(size, len(own))
        dist.all_gather(list(every), own, self.ranks.group)
        for column, parameter in zip(every.split(lengths, dim=1), parameters):
            numbers = column.reshape(-1)[: parameter.numel()]
            parameter.copy_(numbers.view(parameter.shape))

    def differences(self) -> list[str]:
        return self.ranks.differing({name: p.tensor for name, p in self.held().items()})
