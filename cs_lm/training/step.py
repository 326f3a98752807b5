"""One update from one or more micro-batches."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from cs_lm.models.base import next_token_loss
from cs_lm.optim.adamw import AdamW
from cs_lm.optim.clip import clip_gradients

# (model, batch) -> the sum of the losses in the batch, and how many they are
LossFunction = Callable[[Any, Any], tuple[Tensor, Tensor]]


def autocast_context(device: torch.device, dtype: str) -> AbstractContextManager:
    """Matrix products in bfloat16 where asked; weights, sums and the optimizer stay float32."""
    if dtype == "bfloat16":
        return torch.autocast(device.type, torch.bfloat16)
    return nullcontext()


def under_autocast(loss: LossFunction, device: torch.device, dtype: str) -> LossFunction:
    """The loss with its matrix products in that dtype."""

    def cast(model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
        with autocast_context(device, dtype):
            return loss(model, batch)

    return cast


def accumulate_gradients(
    model: nn.Module, batches: Sequence[Any], loss: LossFunction = next_token_loss
) -> tuple[Tensor, Tensor]:
    """Leaves in the parameters the gradients of the summed loss; returns the sum and the count.

    The gradients of the mean are these divided by the count, which is known at the end only.
    """
    for parameter in model.parameters():
        parameter.grad = None
    sums, counts = [], []
    for batch in batches:
        loss_sum, count = loss(model, batch)
        loss_sum.backward()
        sums.append(loss_sum.detach())
        counts.append(count)
    return torch.stack(sums).sum(), torch.stack(counts).sum()


def train_step(
    model: nn.Module,
    optimizer: AdamW,
    batches: Sequence[Any],
    max_norm: float,
    loss: LossFunction = next_token_loss,
    all_finite_so_far: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """One update from one or more micro-batches, as if they were a single batch.

    Returns the mean loss before the update and the norm of its gradient before clipping, both
    scalars on the device: nothing here waits for the device. Where one of them is not finite,
    weights and moments stay as they are.

    all_finite_so_far  a bool on the device that becomes False then; as long as it is False,
                       nothing is updated
    """
    loss_sum, count = accumulate_gradients(model, batches, loss)
    count = count.clamp(min=1)
    mean_loss = loss_sum / count
    norm = clip_gradients(model.parameters(), max_norm, divide_by=count)
    should_apply = mean_loss.isfinite() & norm.isfinite()
    if all_finite_so_far is not None:
        should_apply = all_finite_so_far.logical_and_(should_apply)
    optimizer.step(should_apply=should_apply)
    return mean_loss, norm
