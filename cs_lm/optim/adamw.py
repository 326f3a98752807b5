"""The AdamW optimizer."""

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from cs_lm.ops.compile import CompileWithFallback


class AdamW(torch.optim.Optimizer):
    """Adam with decoupled weight decay (Loshchilov and Hutter 2019), equal to torch's.

    At step t, with gradient g:

        m <- beta1 m + (1 - beta1) g          v <- beta2 v + (1 - beta2) g^2
        p <- p (1 - lr weight_decay)
        p <- p - lr / (1 - beta1^t) * m / (sqrt(v / (1 - beta2^t)) + eps)

    Parameter state: `step` (int), `exp_avg` and `exp_avg_sq` (the parameter's shape and dtype),
    created when its first gradient arrives.
    Numerics: all factors are Python floats that go to the device with the kernel call; nothing is
    read back. The root is taken of v + 1e-36.
    Raises: ValueError for a setting outside its range.
    """

    state_names = ("step", "exp_avg", "exp_avg_sq")
    _compiled: Callable[..., None] | None = None

    def __init__(
        self,
        params,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
    ):
        for name, value in (("lr", lr), ("eps", eps), ("weight_decay", weight_decay)):
            if not value >= 0:
                raise ValueError(f"AdamW: got {name} {value}, need 0 or more")
        if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"AdamW: got betas {betas}, need two numbers from 0 to below 1")
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(
        self, closure: Callable[[], Tensor] | None = None, should_apply: Tensor | None = None
    ) -> Tensor | None:
        """One update; returns the closure's loss, if there is a closure.

        should_apply  a bool on the gradients' device. False: only the number of steps changes.
                      The host does not wait for its value
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            by_step: dict[int, list[Tensor]] = {}  # parameters may differ in their number of steps
            for parameter in group["params"]:
                if parameter.grad is not None:
                    by_step.setdefault(self._next_step(parameter), []).append(parameter)
            if should_apply is not None and should_apply.device.type == "cpu":
                if not should_apply:  # reading it is free on a CPU
                    continue
                should_apply = None
            for step, parameters in by_step.items():
                states = [self.state[parameter] for parameter in parameters]
                tensors = (
                    parameters,
                    [parameter.grad for parameter in parameters],
                    [state["exp_avg"] for state in states],
                    [state["exp_avg_sq"] for state in states],
                )
                whole = self._compiled is not None or parameters[0].device.type != "cpu"
                for portion in (tensors,) if whole else _portions(tensors):
                    self._update(portion, step, group, should_apply)
        return loss

    def compile(self, on_failure: Callable[[str], None] | None = None) -> None:
        """Makes each further step one pass over memory, with code from torch.compile.

        on_failure  called with one line if compilation fails; the steps then run uncompiled
        Cost: half a second of compiling for each parameter, at the first step on a machine.
        """
        self._compiled = CompileWithFallback(_adamw, on_failure)

    def num_updates(self) -> set[int]:
        """How many updates the parameters have had: a single number, except during an update."""
        return {state["step"] for state in self.state.values()}

    def _next_step(self, parameter: Tensor) -> int:
        state = self.state[parameter]
        if not state:
            state["step"] = 0
            state["exp_avg"] = torch.zeros_like(parameter)
            state["exp_avg_sq"] = torch.zeros_like(parameter)
        state["step"] += 1
        return state["step"]

    def _update(
        self, tensors: tuple[list[Tensor], ...], step: int, group: dict, should_apply: Tensor | None
    ) -> None:
        beta1, beta2 = group["betas"]
        # both bias corrections, moved into eps and the step size
        correction = math.sqrt(1 - beta2**step)
        factors = (
            1 - group["lr"] * group["weight_decay"],
            group["eps"] * correction,
            group["lr"] / (1 - beta1**step) * correction,
        )
        update = _adamw
        if self._compiled is not None:  # torch.compile takes numbers as constants; these change
            first = tensors[0][0]
            wide = torch.promote_types(first.dtype, torch.float32)
            on_device = torch.tensor(factors, dtype=wide).to(first.device, non_blocking=True)
            update, factors = self._compiled, on_device.unbind()
        update(*tensors, (beta1, beta2), *factors, should_apply)


# Far below eps^2. A CPU takes six times as long for the root of 0, and thirty times for that of a
# number below 1e-38. Embedding rows have 0 until their token occurs, and such numbers long after.
_SMALLEST_SQUARE = 1e-36


def _adamw(
    parameters: list[Tensor],
    gradients: list[Tensor],
    means: list[Tensor],
    squares: list[Tensor],
    betas: tuple[float, float],
    decay: float | Tensor,
    eps: float | Tensor,
    step_size: float | Tensor,
    should_apply: Tensor | None,
) -> None:
    """The update of `AdamW`, in place. Where `should_apply` is False, nothing changes."""

    def factor(value: float | Tensor, neutral: float) -> float | Tensor:
        return value if should_apply is None else torch.where(should_apply, value, neutral)

    beta1, beta2 = betas
    if should_apply is None:
        torch._foreach_lerp_(means, gradients, 1 - beta1)
    else:  # the same with operations that take a factor on the device
        gradients = [torch.where(should_apply, gradient, 0) for gradient in gradients]
        torch._foreach_mul_(means, factor(beta1, 1))
        torch._foreach_add_(means, gradients, alpha=1 - beta1)
    torch._foreach_mul_(squares, factor(beta2, 1))
    torch._foreach_addcmul_(squares, gradients, gradients, value=1 - beta2)
    roots = torch._foreach_add(squares, _SMALLEST_SQUARE)
    torch._foreach_sqrt_(roots)
    torch._foreach_add_(roots, [eps] * len(roots))
    if should_apply is not None:
        torch._foreach_mul_(roots, factor(1, math.inf))
    if isinstance(decay, Tensor) or decay != 1:
        torch._foreach_mul_(parameters, factor(decay, 1))
    if isinstance(step_size, Tensor):  # the next operation takes only a number
        torch._foreach_div_(roots, step_size)
        step_size = 1.0
    torch._foreach_addcdiv_(parameters, means, roots, value=-step_size)


# On a CPU, this many numbers of each tensor of an update fit the cache.
_CPU_PORTION = 1 << 18


def _portions(tensors: tuple[list[Tensor], ...]) -> Iterator[tuple[list[Tensor], ...]]:
    """The same lists in portions that fit a CPU's cache.

    Large tensors are split into ranges of their memory; one that is not contiguous stays whole.
    """
    portion, size = [], 0
    for together in zip(*tensors):  # a parameter, its gradient and moments
        numel = max(1, together[0].numel())
        whole = numel <= _CPU_PORTION or not together[0].is_contiguous()
        step = numel if whole else _CPU_PORTION
        for start in range(0, numel, step):
            if size + step > _CPU_PORTION and portion:
                yield tuple(map(list, zip(*portion)))
                portion, size = [], 0
            part = slice(start, start + step)
            portion.append(together if whole else [x.view(-1)[part] for x in together])
            size += step
    if portion:
        yield tuple(map(list, zip(*portion)))
