"""Which parameters get weight decay, and the optimizer of a run."""

import torch
from torch import Tensor, nn

from cs_lm.config.optim import OptimConfig
from cs_lm.models.layers import Embedding
from cs_lm.optim.adamw import AdamW


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Matrices with weight decay; embedding tables, gains and biases without.

    An embedding table that is also the head (tied) gets no weight decay.
    With muP (`ModelConfig.mup_base_width`), the learning rate of matrices is scaled by base width /
    width, and their weight decay by the inverse, so that both together decay as at the base width.
    Source: Yang et al. 2022, Tensor Programs V, table 3, Adam.
    """
    tables = {id(module.weight) for module in model.modules() if isinstance(module, Embedding)}

    def is_decayed(parameter: Tensor) -> bool:
        return parameter.dim() > 1 and id(parameter) not in tables

    decayed = [p for p in model.parameters() if is_decayed(p)]
    not_decayed = [p for p in model.parameters() if not is_decayed(p)]
    scale = getattr(getattr(model, "config", None), "mup_scale", 1.0)  # of GPT-2: none
    of_width = {} if scale == 1.0 else {"lr_scale": scale}
    return [
        {"params": decayed, "weight_decay": weight_decay / scale, **of_width},
        {"params": not_decayed, "weight_decay": 0.0},
    ]


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Each group gets it times its own "lr_scale", if it has one."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)


def names_in_groups(model: nn.Module, weight_decay: float) -> list[list[str]]:
    """The names of the parameters in each group, in the order of the optimizer's numbers."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = parameter_groups(model, weight_decay)
    return [[names[id(parameter)] for parameter in group["params"]] for group in groups]


def adamw_of(model: nn.Module, optim: OptimConfig) -> AdamW:
    """The optimizer of all the model's parameters, with these settings."""
    groups = parameter_groups(model, optim.weight_decay)
    return AdamW(groups, lr=optim.lr, betas=optim.betas, eps=optim.eps)
