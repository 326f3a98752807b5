"""One update from one or more micro-batches."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from cs_lm.distributed.sharing import LossFunction, Sharing
from cs_lm.models.base import next_token_loss
from cs_lm.optim.adamw import AdamW
from cs_lm.optim.clip import clip_gradients


def autocast_context(device: torch.device, dtype: str) -> AbstractContextManager:
    """Autocast of matrix products to bfloat16; weights, sums and the optimizer stay float32."""
    if dtype == "bfloat16":
        return torch.autocast(device.type, torch.bfloat16)
    return nullcontext()


def under_autocast(loss: LossFunction, device: torch.device, dtype: str) -> LossFunction:
    """The loss function with its matrix products in that dtype."""

    def cast(model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
        with autocast_context(device, dtype):
            return loss(model, batch)

    return cast


def accumulate_gradients(
    model: nn.Module,
    batches: Sequence[Any],
    loss: LossFunction = next_token_loss,
    sharing: Sharing | None = None,
    joins: bool = True,
) -> tuple[Tensor, Tensor]:
    """Sum of the losses and their count; leaves the gradients of the sum in the parameters.

    Divide them by the count to get the gradients of the mean; it is known only at the end.
    sharing  how several processes share the update; None: one process does all of it
    joins    False: leave gradients of this process's rows, where the others are not needed
    """
    sharing = sharing or Sharing.alone(model)
    sharing.begin_update()
    return sharing.accumulate(batches, loss, joins)


def train_step(
    model: nn.Module,
    optimizer: AdamW,
    batches: Sequence[Any],
    max_norm: float,
    loss: LossFunction = next_token_loss,
    all_finite_so_far: Tensor | None = None,
    clipped_apart: Sequence[nn.Module] = (),
    sharing: Sharing | None = None,
) -> tuple[Tensor, Tensor]:
    """One update from one or more micro-batches, as if they were a single batch.

    Returns the mean loss before the update and the norm of its gradient before clipping, both
    scalars on the device: nothing here waits for the device. If one of them is not finite,
    weights and moments do not change.

    all_finite_so_far  a bool on the device; it becomes False at a step that is not finite, and
                       then no later step updates anything
    clipped_apart      parts of the model with clipping of their own; none: the model as a whole
    sharing            how several processes share the update, which has taken model and optimizer;
                       None: one process does all of it
    """
    sharing = sharing or Sharing.alone(model, optimizer)
    with sharing.computing():
        sums = accumulate_gradients(model, batches, loss, sharing)
    loss_sum, count = sharing.finish(*sums)
    count = count.clamp(min=1)
    mean_loss = loss_sum / count
    norms = [
        clip_gradients(sharing.clipped(part), max_norm, count, sharing.joint_norm)
        for part in clipped_apart or (model,)
    ]
    norm = norms[0] if len(norms) == 1 else torch.stack(norms).square().sum().sqrt()
    should_apply = mean_loss.isfinite() & norm.isfinite()
    if all_finite_so_far is not None:
        should_apply = all_finite_so_far.logical_and_(should_apply)
    sharing.update(should_apply)
    return mean_loss, norm
