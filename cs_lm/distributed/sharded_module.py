"""Fully sharded data parallelism by hand, for a training loop of one's own.

Each rank keeps its rows of the weights of chosen layers. A layer's whole weight is gathered when
the layer is called, and its gradient is summed into rows when backward reaches it. `fully_sharded`
does the same for runs, with torch's engine, which also frees and prefetches weights.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from cs_lm.distributed.data_parallel import GradientMean
from cs_lm.distributed.parts import row_part, rows_of
from cs_lm.distributed.ranks import sum_into_parts


class _Whole(torch.autograd.Function):
    """The whole weight from the rows of all ranks; its gradient becomes the mean, of the own rows.

    num_rows  of the whole weight; dtype  of what is sent and returned, None: that of the rows
    """

    @staticmethod
    def forward(ctx, own: Tensor, num_rows: int, dtype: torch.dtype | None) -> Tensor:
        ctx.own_dtype, ctx.num_own = own.dtype, len(own)
        size = dist.get_world_size()
        most = len(rows_of(num_rows, 0, size))
        sent = own.new_zeros(most, *own.shape[1:], dtype=dtype)  # short parts are filled up
        sent[: len(own)] = own
        parts = [torch.empty_like(sent) for _ in range(size)]
        dist.all_gather(parts, sent)
        return torch.cat(parts)[:num_rows]

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None, None]:
        size = dist.get_world_size()
        most = len(rows_of(len(gradient), 0, size))
        whole = gradient.new_zeros(most * size, *gradient.shape[1:])
        whole[: len(gradient)] = gradient
        own = gradient.new_empty(most, *gradient.shape[1:])
        sum_into_parts(own, whole)
        return own[: ctx.num_own].to(ctx.own_dtype) / size, None, None


class ShardedModule(nn.Module):
    """A module of which some layers' `weight` is spread over the ranks; all begin with rank 0's.

    `module.named_parameters()` has this rank's rows of these weights, in their dtype, and so are
    their gradients. Call `finish` between backward and the optimizer: it averages the gradients of
    the other parameters. Needs a process group.

    is_sharded     whether the weight of a layer is spread
    compute_dtype  of gathered weights and of what their layers compute; None: the weights' own
    """

    def __init__(
        self,
        module: nn.Module,
        is_sharded: Callable[[nn.Module], bool],
        compute_dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.module, self._dtype = module, compute_dtype
        with torch.no_grad():
            for tensor in (*module.parameters(), *module.buffers()):
                dist.broadcast(tensor, 0)
        self._num_rows: dict[Tensor, int] = {}  # of the whole weight, by this rank's rows
        own: dict[Tensor, nn.Parameter] = {}  # by the whole weight, which layers may share
        for layer in module.modules():
            if is_sharded(layer):
                whole = layer.weight
                if whole not in own:
                    rows = row_part(whole.detach(), dist.get_rank(), dist.get_world_size())
                    own[whole] = nn.Parameter(rows.tensor.clone(), whole.requires_grad)
                    self._num_rows[own[whole]] = len(whole)
                layer.weight = own[whole]
                layer.register_forward_pre_hook(self._gather)
                layer.register_forward_hook(self._put_back, always_call=True)
        self._others = GradientMean(p for p in module.parameters() if p not in self._num_rows)

    def _gather(self, layer: nn.Module, inputs: tuple) -> tuple:
        own = layer._parameters.pop("weight")
        layer._own_rows = [own]  # in a list: it must not become a parameter of another name
        layer.weight = _Whole.apply(own, self._num_rows[own], self._dtype)
        if self._dtype is None:
            return inputs
        return tuple(
            x.to(self._dtype) if isinstance(x, Tensor) and x.is_floating_point() else x
            for x in inputs
        )

    def _put_back(self, layer: nn.Module, inputs: tuple, output: Any) -> Any:
        del layer.weight
        (own,) = layer.__dict__.pop("_own_rows")
        layer._parameters["weight"] = own
        is_cast = self._dtype is not None and isinstance(output, Tensor)
        return output.to(own.dtype) if is_cast else output

    def forward(self, *arguments: Any, **named: Any) -> Any:
        return self.module(*arguments, **named)

    def finish(self) -> None:
        """Waits for the gradients of the parameters that are not spread."""
        self._others.finish()

    @torch.no_grad()
    def whole_parameters(self) -> dict[str, Tensor]:
        """Every parameter as a whole, by its name in the module."""
        found = self.module.named_parameters(remove_duplicate=False)
        return {
            name: _Whole.apply(p, self._num_rows[p], None) if p in self._num_rows else p.detach()
            for name, p in found
        }
