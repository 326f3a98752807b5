"""One update from one or more micro-batches."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from cs_lm.models.base import LanguageModel, next_token_loss
from cs_lm.ops.reference import IGNORE_INDEX
from cs_lm.optim.adamw import AdamW
from cs_lm.optim.clip import clip_gradients

Batch = tuple[Tensor, Tensor]
LossFunction = Callable[[LanguageModel, Tensor, Tensor], tuple[Tensor, Tensor]]


def autocast(device: torch.device, dtype: str) -> AbstractContextManager:
    """Matrix products in bfloat16 where asked; weights, sums and the optimizer stay float32."""
    if dtype == "bfloat16":
        return torch.autocast(device.type, torch.bfloat16)
    return nullcontext()


def gradients_of(
    model: LanguageModel,
    batches: list[Batch],
    loss_function: LossFunction = next_token_loss,
    precision: AbstractContextManager | None = None,
) -> Tensor:
    """Leaves in the parameters the gradients of the micro-batches' mean loss, which it returns."""
    num_targets = sum((y != IGNORE_INDEX).sum() for _, y in batches).clamp(min=1)
    for parameter in model.parameters():
        parameter.grad = None
    loss = torch.zeros((), device=model.head_weight.device)
    for x, y in batches:
        with precision or nullcontext():
            loss_sum, _ = loss_function(model, x, y)
        share = loss_sum / num_targets
        share.backward()
        loss += share.detach()
    return loss


def train_step(
    model: LanguageModel,
    optimizer: AdamW,
    batches: list[Batch],
    max_norm: float,
    loss_function: LossFunction = next_token_loss,
    precision: AbstractContextManager | None = None,
    sound: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """One update from one or more micro-batches, as if they were a single batch.

    Returns the mean loss [nats per token] before the update and the gradient norm before
    clipping, both scalars on the device: nothing here waits for the device. Where one of them is
    not finite, weights and moments stay as they are.

    sound  a bool on the device that becomes False then, and as long as it is, nothing is updated
    """
    loss = gradients_of(model, batches, loss_function, precision)
    norm = clip_gradients(model.parameters(), max_norm)
    is_finite = loss.isfinite() & norm.isfinite()
    if sound is not None:
        is_finite = sound.logical_and_(is_finite)
    optimizer.step(apply=is_finite)
    return loss, norm
