"""Several ranks compute one row together: tensor parallelism and context parallelism, by hand.

Tensor parallelism cuts weights. A rank has some heads, some rows of w1 and w3 with the columns of
w2 that belong to them, and some rows of the head. Between those parts, each rank has the positions
of its own (sequence parallelism), and norms work on these:

    x of own positions -> norm -> all positions gathered -> own heads -> sums, own positions -> + x

Context parallelism cuts the text: a rank has consecutive positions, and gathers the keys and values
of all ranks in attention. Pipeline parallelism gives each rank some layers: pipeline.py.
Sources: Shoeybi et al. 2019, Megatron-LM; Korthikanti et al. 2022, Reducing activation
recomputation in large Transformer models, section 4.2.
"""

import functools
import itertools
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from cs_lm.distributed.grid import Grid, Team
from cs_lm.distributed.parts import Part, rows_of
from cs_lm.distributed.pipeline import Pipeline, stage_layers
from cs_lm.distributed.ranks import Ranks, sum_into_parts
from cs_lm.distributed.sharing import LossFunction, Norm, Sharing

# ---- communication with gradients ----


def _gathered(x: Tensor, group: Any, dim: int) -> Tensor:
    parts = [torch.empty_like(x) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, x.contiguous(), group=group)
    return torch.cat(parts, dim)


def _summed_part(x: Tensor, group: Any, dim: int) -> Tensor:
    """This rank's part, along a dimension, of the sum over the ranks."""
    parts = [part.contiguous() for part in x.chunk(dist.get_world_size(group), dim)]
    stacked = torch.stack(parts)
    found = torch.empty_like(parts[0])
    sum_into_parts(found, stacked.view(-1, *found.shape[1:]), group)
    return found


class _Gather(torch.autograd.Function):
    """All parts along a dimension; the gradient is the sum over ranks, of the own part."""

    @staticmethod
    def forward(ctx, x: Tensor, group: Any, dim: int) -> Tensor:
        ctx.group, ctx.dim = group, dim
        return _gathered(x, group, dim)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None, None]:
        return _summed_part(gradient, ctx.group, ctx.dim), None, None


class _SumPart(torch.autograd.Function):
    """The own part of the sum over ranks; the gradient is gathered."""

    @staticmethod
    def forward(ctx, x: Tensor, group: Any, dim: int) -> Tensor:
        ctx.group, ctx.dim = group, dim
        return _summed_part(x, group, dim)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None, None]:
        return _gathered(gradient, ctx.group, ctx.dim), None, None


_ROWS_AT_ONCE = 1024


class _VocabularyCrossEntropy(torch.autograd.Function):
    """Cross-entropy of a head whose rows are spread over the ranks: the sum, the same at all.

    With m the greatest logit and z the sum of exp(logit - m), both over all ranks:
    loss = log z + m - logit of the target. Gradients are computed in the forward pass, some rows
    at a time: logits of all rows are never in memory.
    """

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, targets: Tensor, first: int, group: Any):
        """Shapes: hidden (n, D), weight (V / N, D), targets (n), -1 where nothing counts."""
        total = hidden.new_zeros((), dtype=torch.float32)
        grad_hidden, grad_weight = torch.zeros_like(hidden), torch.zeros_like(weight)
        for start in range(0, len(hidden), _ROWS_AT_ONCE):
            rows = slice(start, start + _ROWS_AT_ONCE)
            x, wanted = hidden[rows], targets[rows]
            logits = (x @ weight.T).float()
            highest = logits.amax(-1) if len(weight) else logits.new_full(x.shape[:1], -torch.inf)
            dist.all_reduce(highest, dist.ReduceOp.MAX, group)
            logits -= highest.unsqueeze(-1)
            local = wanted - first
            is_here = (local >= 0) & (local < len(weight))
            local = local.clamp(0, max(0, len(weight) - 1)).unsqueeze(-1)
            own = logits.gather(-1, local).squeeze(-1) if len(weight) else torch.zeros_like(highest)
            own = torch.where(is_here, own, 0.0)
            weights = logits.exp_()
            sums = torch.stack((weights.sum(-1), own))
            dist.all_reduce(sums, group=group)
            z, of_target = sums
            counts = wanted >= 0
            total += torch.where(counts, z.log() - of_target, 0.0).sum()
            gradient = weights.div_(z.unsqueeze(-1))
            if len(weight):
                gradient.scatter_add_(-1, local, -is_here.float().unsqueeze(-1))
            gradient *= counts.unsqueeze(-1)
            gradient = gradient.to(x.dtype)
            grad_hidden[rows] = (gradient @ weight.to(x.dtype)).to(x.dtype)
            grad_weight += (gradient.T @ x).to(weight.dtype)
        ctx.save_for_backward(grad_hidden, grad_weight)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor):
        grad_hidden, grad_weight = ctx.saved_tensors
        scale = gradient.to(grad_hidden.dtype)
        return grad_hidden * scale, grad_weight * gradient, None, None, None


def vocabulary_cross_entropy(
    first: int, group: Any, hidden: Tensor, weight: Tensor, targets: Tensor, ignore_index: int
) -> tuple[Tensor, Tensor]:
    """Sum [nats] and count, as `ops.linear_cross_entropy`; first  the head's first row here."""
    flat = torch.where(targets == ignore_index, -1, targets).reshape(-1)
    hidden = hidden.reshape(-1, hidden.shape[-1])
    total = _VocabularyCrossEntropy.apply(hidden, weight, flat, first, group)
    return total, (flat >= 0).sum()


# ---- the model ----


# The dimension in which a layer's weights are cut: 0 rows, 1 columns.
_CUTS = {
    "attn.q_proj.weight": 0, "attn.k_proj.weight": 0, "attn.v_proj.weight": 0,
    "attn.output_proj.weight": 1, "ffn.w1.weight": 0, "ffn.w3.weight": 0, "ffn.w2.weight": 1,
}  # fmt: skip
_HEAD = "lm_head.weight"
_POSITIONS = -2  # the dimension of positions in (B, T, D) and (B, H, T, K)


class ModelParallel(Sharing):
    """Shares a `TransformerLM` among the teams of a grid, and then as `data` does.

    It can train and evaluate, not write text.

    data  how the ranks that compute other rows, or other positions, share the cut model
    """

    saves_parts = True
    computes_together = True
    can_generate = False

    def __init__(
        self,
        data: Sharing,
        ranks: Ranks,
        grid: Grid,
        num_layers: int,
        order: Sequence[Sequence[str]],
    ):
        """order  the names of all parameters in each of the optimizer's groups"""
        self.data, self.ranks, self._order = data, ranks, order
        self.tensor, self.context = grid.tensor, grid.context
        self._team, self._back = grid.pipeline, grid.back
        self._row = grid.row  # the ranks with other positions of the same rows
        self._own_layers = range(num_layers)
        if self._team is not None:
            self._stages = ranks.within(*self._team)
            self._own_layers = stage_layers(num_layers, self._team)
        self._num_made, self.pipeline = 0, None

    def finish_layer(self, layer: nn.Module) -> None:
        self._num_made += 1
        if self._num_made - 1 not in self._own_layers:
            for parameter in layer.parameters():  # of another stage: no memory for it
                parameter.data = parameter.data.new_empty(0)
            return
        if self.context is not None:
            _share_context(layer.attn, self.context)
        if self.tensor is not None:
            _cut_layer(layer, self.tensor)
        if self.context is not None or self.tensor is not None:
            layer.fused = False  # one operation for all of it knows nothing of teams
        self.data.finish_layer(layer)

    def take_model(self, model: nn.Module) -> None:
        self.model = model
        self._cuts: dict[str, int] = {}  # of each weight that is cut, the dimension
        if self._team is not None:
            self.pipeline = Pipeline(model, self._team, self._back)
        if self.tensor is not None:
            self._share_ends(model)
        if self.context is not None:
            _shift_positions(model, self.context)
        self.data.take_model(model)
        for name in self.data.parameters():
            cut = 0 if name == _HEAD else _CUTS.get(name.split(".", 2)[-1])
            if self.tensor is not None and cut is not None:
                self._cuts[name] = cut

    def _share_ends(self, model: nn.Module) -> None:
        team = self.tensor
        embed, norm = model.embed, model.ln_final.forward

        def embed_part(token_ids: Tensor, positions: Tensor) -> tuple[Tensor, list[dict]]:
            x, of_layers = embed(token_ids, positions)
            return x.chunk(team.size, _POSITIONS)[team.rank], of_layers

        def norm_and_gather(x: Tensor) -> Tensor:
            return _Gather.apply(norm(x), team.group, _POSITIONS)

        if self.pipeline is None or self.pipeline.is_first:
            model.embed = embed_part
        if self.pipeline is not None and not self.pipeline.is_last:
            return
        model.ln_final.forward = norm_and_gather
        self.vocabulary = model.lm_head.weight.shape[0]
        rows = rows_of(self.vocabulary, team.rank, team.size)
        _cut(model.lm_head, 0, rows)
        loss = functools.partial(vocabulary_cross_entropy, rows.start, team.group)
        model.ops = model.ops._replace(linear_cross_entropy=loss)

    def take(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer
        self.data.take(optimizer)
        self._names = {id(p): name for name, p in self.optimized().items()}

    def begin(self) -> None:
        self.data.begin()

    def part_of_batch(self, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """What this rank reads of (B, T) inputs and targets."""
        if self.context is None:
            return inputs, targets
        team = self.context
        return tuple(x.chunk(team.size, -1)[team.rank] for x in (inputs, targets))

    def of_whole_rows(self, loss: LossFunction) -> LossFunction:
        def whole(model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
            batch = type(batch)(*self.part_of_batch(*batch))
            if self.pipeline is None:
                sums = loss(model, batch)
            else:
                sums = self.pipeline.evaluate(batch, loss, self._activations(batch))
            return sums if self.context is None else self._row.sums(*sums)

        return whole

    def _activations(self, batch: Any) -> tuple[int, int, int]:
        """The shape of what stages pass on."""
        num_rows, length = batch.inputs.shape
        of_tensor = 1 if self.tensor is None else self.tensor.size
        return num_rows, length // of_tensor, self.model.config.d_model

    # ---- an update ----

    def accumulate(
        self, batches: Sequence[Any], loss: LossFunction, joins: bool = True
    ) -> tuple[Tensor, Tensor]:
        if self.pipeline is None:
            return super().accumulate(batches, loss, joins)
        shape = self._activations(batches[0])
        return self.pipeline.train(
            batches, loss, shape, lambda is_last: self.begin_backward(joins and is_last)
        )

    def begin_update(self) -> None:
        self.data.begin_update()

    def collect_gradients(self) -> None:
        self.data.collect_gradients()

    def begin_backward(self, is_last: bool) -> None:
        self.data.begin_backward(is_last)

    def computing(self) -> AbstractContextManager[None]:
        return self.ranks.communicating()

    def finish(self, loss_sum: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
        sums = self.data.finish(loss_sum, count)
        with self.waiting():
            if self._team is not None:
                sums = self._stages.sums(*sums)
            if self.tensor is not None:
                self._sum_whole_gradients()
        return sums

    def _sum_whole_gradients(self) -> None:
        whole = self._whole_gradients()
        if not whole:
            return
        flat = torch.cat([gradient.reshape(-1) for gradient in whole])
        dist.all_reduce(flat, group=self.tensor.group)
        for gradient, part in zip(whole, flat.split([g.numel() for g in whole])):
            gradient.copy_(part.view_as(gradient))

    def _whole_gradients(self) -> list[Tensor]:
        """Gradients of weights that all ranks of the team have: each rank's is that of its part."""
        found = self.data.parameters().items()
        return [p.grad for name, p in found if name not in self._cuts and p.grad is not None]

    def clipped(self, part: nn.Module) -> Iterable[Tensor]:
        return self.data.clipped(part)

    def joint_norm(self, gradients: list[Tensor], norm: Norm) -> Tensor:
        found = self._norm_of_stage(gradients, norm)
        if self._team is None:
            return found
        (square,) = self._stages.sums(found.double().square())
        return square.sqrt().to(found.dtype)

    def _norm_of_stage(self, gradients: list[Tensor], norm: Norm) -> Tensor:
        if self.tensor is None:
            return self.data.joint_norm(gradients, norm)
        whole = {id(gradient) for gradient in self._whole_gradients()}
        squares = []
        for is_whole in (True, False):
            own = [g for g in gradients if (id(g) in whole) == is_whole]
            found = self.data.joint_norm(own, norm) if own else gradients[0].new_zeros(())
            squares.append(found.double().square())
        with self.ranks.communicating():
            dist.all_reduce(squares[1], group=self.tensor.group)
        return (squares[0] + squares[1]).sqrt().to(gradients[0].dtype)

    def update(self, should_apply: Tensor) -> None:
        self.data.update(should_apply)

    # ---- what each process has ----

    def parameters(self) -> dict[str, Tensor]:
        return self.data.parameters()

    def optimized(self) -> dict[str, Tensor]:
        return self.data.optimized()

    def held(self) -> dict[str, Part]:
        return {name: self._widened(name, part) for name, part in self.data.held().items()}

    def saved(self) -> dict[str, Part]:
        is_first = self.tensor is None or self.tensor.rank == 0
        if not self.data.saves_parts and not self.data.ranks.is_first:
            return {}
        return {
            name: self._widened(name, part)
            for name, part in self.data.saved().items()
            if is_first or name in self._cuts
        }

    def place_of(self, parameter: Tensor) -> Part:
        return self._widened(self._names[id(parameter)], self.data.place_of(parameter))

    def numbered(self) -> dict[int, Tensor]:
        numbers = {name: n for n, name in enumerate(itertools.chain(*self._order))}
        return {numbers[name]: p for name, p in self.optimized().items()}

    def group_sizes(self) -> list[int]:
        return [len(names) for names in self._order]

    def saved_moments(self) -> dict[str, Any]:
        found = super().saved_moments()
        if not self.data.saves_parts and not self.data.ranks.is_first:
            return {**found, "state": {}}
        if self.tensor is None or self.tensor.rank == 0:
            return found
        cut = {n for n, p in self.numbered().items() if self._names[id(p)] in self._cuts}
        return {**found, "state": {n: s for n, s in found["state"].items() if n in cut}}

    def _widened(self, name: str, part: Part) -> Part:
        """The place of a part of a cut weight in the whole weight."""
        if name not in self._cuts:
            return part
        dim, team = self._cuts[name], self.tensor
        start, whole = list(part.start), list(part.whole)
        if name == _HEAD:
            first, size = rows_of(self.vocabulary, team.rank, team.size).start, self.vocabulary
        else:
            first, size = whole[dim] * team.rank, whole[dim] * team.size
        start[dim], whole[dim] = start[dim] + first, size
        return Part(part.tensor, tuple(start), tuple(whole))

    def differences(self) -> list[str]:
        found = self.data.differences()
        if self.tensor is not None:
            found += self.ranks.differing(self._whole(), self.tensor.group)
        return found

    def _whole(self) -> dict[str, Tensor]:
        """Weights that are not cut, and their moments: the same at all ranks of the tensor team."""
        found = {}
        for name, parameter in self.optimized().items():
            if name not in self._cuts:
                found[name] = parameter
                for key, value in self.optimizer.state.get(parameter, {}).items():
                    if isinstance(value, Tensor):
                        found[f"{key} of {name}"] = value
        return found

    def take_waited_s(self) -> float:
        return super().take_waited_s() + self.data.take_waited_s()


def _cut(linear: nn.Module, dim: int, rows: range) -> None:
    weight = linear.weight.detach().narrow(dim, rows.start, len(rows)).clone()
    linear.weight = nn.Parameter(weight)


def _cut_layer(layer: nn.Module, team: Team) -> None:
    """Cuts the layer's weights, and lets attention and feed-forward work on all positions."""
    for name, dim in _CUTS.items():
        linear = layer.get_submodule(name.removesuffix(".weight"))
        _cut(linear, dim, rows_of(linear.weight.shape[dim], team.rank, team.size))
    layer.attn.num_heads //= team.size
    for part in (layer.attn, layer.ffn):
        part.forward = functools.partial(_on_all_positions, part.forward, team)


def _on_all_positions(forward: Callable[..., Tensor], team: Team, x: Tensor, *more: Any) -> Tensor:
    whole = _Gather.apply(x, team.group, _POSITIONS)
    return _SumPart.apply(forward(whole, *more), team.group, _POSITIONS)


def _share_context(attn: nn.Module, team: Team) -> None:
    """Queries of the own positions see the keys of all positions up to them."""
    attention = attn.ops.attention

    def shared(q: Tensor, k: Tensor, v: Tensor, **more: Any) -> Tensor:
        end = (team.rank + 1) * k.shape[_POSITIONS]
        k, v = (_Gather.apply(x, team.group, _POSITIONS).narrow(_POSITIONS, 0, end) for x in (k, v))
        return attention(q, k, v, **more)

    attn.ops = attn.ops._replace(attention=shared)


def _shift_positions(model: nn.Module, team: Team) -> None:
    embed = model.embed

    def shifted(token_ids: Tensor, positions: Tensor) -> tuple[Tensor, list[dict]]:
        return embed(token_ids, positions + team.rank * token_ids.shape[-1])

    model.embed = shifted
