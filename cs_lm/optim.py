"""AdamW, its parameter groups, and the gradient clipper."""

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from cs_lm.layers import Embedding, RMSNorm


class AdamW(torch.optim.Optimizer):
    """Adam with decoupled weight decay (Loshchilov and Hutter 2019), equal to torch's.

    At step t, with gradient g:

        m <- beta1 m + (1 - beta1) g          v <- beta2 v + (1 - beta2) g^2
        p <- p (1 - lr weight_decay)
        p <- p - lr / (1 - beta1^t) * m / (sqrt(v / (1 - beta2^t)) + eps)

    State a parameter: `step` (int), `exp_avg` and `exp_avg_sq` (the parameter's shape and dtype),
    created when its first gradient arrives.
    Numerics: all factors are Python floats that go to the device with the kernel call; nothing is
    read back.
    Raises: ValueError for a setting outside its range.
    """

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
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
        """One update; returns the closure's loss, if there is a closure."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group)
        return loss

    def _update(self, parameter: Tensor, group: dict) -> None:
        gradient, state = parameter.grad, self.state[parameter]
        if not state:
            state["step"] = 0
            state["exp_avg"] = torch.zeros_like(parameter)
            state["exp_avg_sq"] = torch.zeros_like(parameter)
        state["step"] += 1
        beta1, beta2 = group["betas"]
        mean, square = state["exp_avg"], state["exp_avg_sq"]
        mean.mul_(beta1).add_(gradient, alpha=1 - beta1)
        square.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        step_size = group["lr"] / (1 - beta1 ** state["step"])
        root = square.sqrt().div_(math.sqrt(1 - beta2 ** state["step"])).add_(group["eps"])
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        parameter.addcdiv_(mean, root, value=-step_size)


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Matrices with weight decay; gains of norms and embedding tables without."""
    spared = {
        id(parameter)
        for module in model.modules()
        if isinstance(module, (Embedding, RMSNorm))
        for parameter in module.parameters(recurse=False)
    }
    decayed = [p for p in model.parameters() if id(p) not in spared]
    not_decayed = [p for p in model.parameters() if id(p) in spared]
    return [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": not_decayed, "weight_decay": 0.0},
    ]


def clip_gradients(parameters: Iterable[Tensor], max_norm: float) -> Tensor:
    """Scales all gradients in place so that their joint L2 norm is at most `max_norm`.

    Returns the norm before scaling, a scalar on the gradients' device; reading it is the
    caller's choice, nothing here waits for the device. Parameters without a gradient are skipped.
    """
    gradients = [p.grad for p in parameters if p.grad is not None]
    if not gradients:
        return torch.zeros(())
    wide = torch.promote_types(gradients[0].dtype, torch.float32)
    norms = torch._foreach_norm(gradients, 2, dtype=wide)
    norm = torch.stack(norms).square().sum().sqrt()
    if max_norm < math.inf:
        # the small number keeps 0 / 0 away where max_norm and norm are both tiny
        scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)
        torch._foreach_mul_(gradients, scale)
    return norm
