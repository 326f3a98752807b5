"""An optimizer whose state is spread over the ranks: each updates its own parameters (ZeRO-1)."""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class ShardedOptimizer(torch.optim.Optimizer):
    """Makes the updates of another optimizer class, with its state spread over the ranks.

    Each parameter has one owner, the rank with the fewest numbers so far. Its owner updates it and
    sends it to the others. So a rank holds about a part 1 / W of the state.
    All ranks must have the same gradients, and call it with the same parameters.
    Source: Rajbhandari et al. 2020, ZeRO, stage 1.
    """

    def __init__(self, params: Any, optimizer_class: type[torch.optim.Optimizer], **settings: Any):
        self._class, self._settings = optimizer_class, settings
        self._own: torch.optim.Optimizer | None = None
        self._owners: dict[Tensor, int] = {}
        self._loads = [0] * dist.get_world_size()
        super().__init__(params, dict(settings))

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Gives each new parameter an owner."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        for parameter in group["params"]:
            owner = self._loads.index(min(self._loads))
            self._owners[parameter] = owner
            self._loads[owner] += parameter.numel()
        own = [p for p in group["params"] if self._owners[p] == dist.get_rank()]
        if not own:
            return
        part = {**group, "params": own}
        if self._own is None:
            self._own = self._class([part], **self._settings)
        else:
            self._own.add_param_group(part)

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None, **more: Any) -> Tensor | None:
        """One update; `more` goes to the other class."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self._own is not None:
            self._take_settings()
            self._own.step(**more)
        sent = [dist.broadcast(p, owner, async_op=True) for p, owner in self._owners.items()]
        for work in sent:
            work.wait()
        return loss

    def _take_settings(self) -> None:
        """Takes over what a schedule has changed in the groups, for example the learning rate."""
        groups = (
            group for group in self.param_groups
            if any(self._owners[p] == dist.get_rank() for p in group["params"])
        )  # fmt: skip
        for own, group in zip(self._own.param_groups, groups):
            own.update({key: value for key, value in group.items() if key != "params"})
