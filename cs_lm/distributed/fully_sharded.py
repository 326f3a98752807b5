"""Each rank has a part of every weight, gradient and moment; torch's `fully_shard` moves them.

A layer's weights are gathered before it runs and freed after it, and its gradients are summed
into parts as soon as backward has left it. The optimizer and the clipper see this rank's parts
as plain tensors, never as DTensors: a view of a DTensor may be a copy, and updates of a copy are
lost.
"""

import functools
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method

from cs_lm.distributed.parts import Part, rows_of, whole_part
from cs_lm.distributed.ranks import Ranks
from cs_lm.distributed.sharing import Norm, Sharing
from cs_lm.ops.activation_checkpoint import checkpoint_activations


class FullySharded(Sharing):
    """Shards over `ranks.size / replicas` ranks; each of `replicas` groups has all parts.

    methods   of the model that use its weights, besides `forward`
    """

    saves_parts = True
    computes_together = True

    def __init__(
        self,
        ranks: Ranks,
        device: torch.device,
        replicas: int = 1,
        methods: Iterable[str] = ("hidden_states",),
        recompute: bool = False,
    ):
        """recompute  keep only each layer's input for backward, and compute the layer again"""
        self.ranks, self._methods, self._recompute = ranks, methods, recompute
        shards = ranks.size // replicas
        names = ("replicate", "shard")
        if replicas > 1:
            self._mesh = init_device_mesh(device.type, (replicas, shards), mesh_dim_names=names)
        else:
            self._mesh = DeviceMesh.from_group(ranks.group, device.type, mesh_dim_names=names[1:])
        self._shard = ranks.rank % shards, shards
        self._is_first_replica = ranks.rank < shards
        self._shard_group = self._group("shard")
        self._replica_group = self._group("replicate") if replicas > 1 else None

    def _group(self, name: str) -> Any:
        mesh = self._mesh[name] if self._mesh.ndim > 1 else self._mesh
        return mesh.get_group()

    def finish_layer(self, layer: nn.Module) -> None:
        if self._recompute:
            _recompute_inside(layer)
        self._shard_module(layer)

    def _shard_module(self, module: nn.Module) -> None:
        fully_shard(module, mesh=self._mesh)
        # gradients are sums, which the loss's count divides later
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)  # gloo has no other one with a factor

    def take_model(self, model: nn.Module) -> None:
        """Shards what is left of the model."""
        super().take_model(model)
        for layer in model.layers:
            if not isinstance(layer, FSDPModule) and next(layer.parameters(), None) is not None:
                self.finish_layer(layer)
        self._shard_module(model)
        # nothing here changes a layer's output in place
        warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view")
        for name in self._methods:
            register_fsdp_forward_method(model, name)
        self._parameters = dict(model.named_parameters())  # sharded ones; forward swaps them
        self._places = {p: self._place(p) for p in self._parameters.values()}
        for module in self._modules():
            # makes the whole weights, which a first pass for a sample could not make: gradients
            # do not take tensors from inference mode
            module.unshard()
            module.reshard()

    def _modules(self) -> Iterator[FSDPModule]:
        return (module for module in self.model.modules() if isinstance(module, FSDPModule))

    def _place(self, parameter: Tensor) -> Part:
        rows = rows_of(parameter.shape[0], *self._shard)
        local = parameter.detach().to_local()
        assert len(local) == len(rows), "fully_shard cuts rows in another way"
        start = (rows.start, *(0 for _ in parameter.shape[1:]))
        return Part(local, start, tuple(parameter.shape))

    def take(self, optimizer: torch.optim.Optimizer) -> None:
        super().take(optimizer)
        self._of_local = {part.tensor: part for part in self._places.values()}
        for group in optimizer.param_groups:
            group["params"] = [self._places[p].tensor for p in group["params"]]

    def begin(self) -> None:
        """Weights need no exchange: all ranks drew them from one seed, or read one file."""
        with torch.no_grad():
            self.ranks.broadcast_(list(self.model.buffers()))

    # ---- an update ----

    def begin_update(self) -> None:
        for module in self._modules():
            module.reshard()  # after an evaluation the weights are still there as a whole
        for parameter, place in self._places.items():
            parameter.grad = place.tensor.grad = None

    def collect_gradients(self) -> None:
        for parameter, place in self._places.items():
            gradient = parameter.grad
            place.tensor.grad = None if gradient is None else gradient.to_local()

    def finish(self, loss_sum: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
        self.collect_gradients()
        with self.waiting():  # inside the passes, torch communicates while it computes
            return self.ranks.sums(loss_sum, count)

    def clipped(self, part: nn.Module) -> Iterable[Tensor]:
        inside = {id(module) for module in part.modules()}
        for name, parameter in self._parameters.items():
            owner = self.model.get_submodule(name.rpartition(".")[0])
            if id(owner) in inside:
                yield self._places[parameter].tensor

    def joint_norm(self, gradients: list[Tensor], norm: Norm) -> Tensor:
        own = norm(gradients)
        square = own.double().square()
        with self.ranks.communicating():
            dist.all_reduce(square, group=self._shard_group)
        return square.sqrt().to(own.dtype)

    @contextmanager
    def computing(self) -> Iterator[None]:
        with self.ranks.communicating():
            yield

    # ---- what each process has ----

    def parameters(self) -> dict[str, Tensor]:
        return {name: self._places[p].tensor for name, p in self._parameters.items()}

    def held(self) -> dict[str, Part]:
        parts = {name: self._places[p] for name, p in self._parameters.items()}
        buffers = {name: whole_part(tensor) for name, tensor in self.model.named_buffers()}
        saved = self.model.state_dict()  # its names: some buffers are not saved
        return {name: parts[name] if name in parts else buffers[name] for name in saved}

    def saved(self) -> dict[str, Part]:
        if not self._is_first_replica:
            return {}
        is_first = self.ranks.is_first
        return {n: p for n, p in self.held().items() if is_first or n in self._parameters}

    def place_of(self, parameter: Tensor) -> Part:
        return self._of_local[parameter]

    def saved_moments(self) -> dict[str, Any]:
        found = super().saved_moments()
        return found if self._is_first_replica else {**found, "state": {}}

    def differences(self) -> list[str]:
        named = {f"buffer {name}": buffer for name, buffer in self.model.named_buffers()}
        found = self.ranks.differing(named) if named else []
        if self._replica_group is not None:
            parts = {name: part.tensor for name, part in self.held().items()}
            found += self.ranks.differing(parts, self._replica_group)
        return found


def _recompute_inside(layer: nn.Module) -> None:
    """Recomputes inside the layer's forward, where its weights are gathered."""
    plain = layer.forward

    def forward(x: Tensor, **named: Any) -> Tensor:
        if not torch.is_grad_enabled() or named.get("cache") is not None:
            return plain(x, **named)
        block = functools.partial(plain, **named)
        return checkpoint_activations(block, x, list(layer.parameters()))

    layer.forward = forward
