"""Steps whose loss or gradient is not finite: noticed without waiting, and written out."""

import json
import math
from collections import deque
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from cs_lm.storage.atomic import atomic_write
from cs_lm.training.step import accumulate_gradients
from cs_lm.training.task import Task

# With --on_nan skip, so many steps in a row are left out before the run stops after all.
MAX_SKIPPED = 10


class NonFiniteError(Exception):
    """The run cannot go on with these weights and batches; the message says what is kept."""


class NonFiniteMonitor:
    """Which steps were not finite, known as soon as the device has said so.

    On CUDA a flag is on its way to the host while the next step is launched; elsewhere reading
    it is the waiting that each step ends with anyway.
    """

    def __init__(self):
        self._under_way: deque[tuple[int, Tensor, torch.cuda.Event | None]] = deque()
        self._num_in_a_row = 0

    def add(self, step: int, is_finite: Tensor) -> None:
        if is_finite.device.type != "cuda":
            self._under_way.append((step, is_finite, None))
            return
        flag = torch.empty((), dtype=torch.bool, pin_memory=True)
        flag.copy_(is_finite, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        self._under_way.append((step, flag, event))

    def bad_steps(self, wait: bool = False) -> Iterator[int]:
        """Those that were not finite, of the steps known by now, or of all of them.

        `are_too_many` speaks of them up to the one just given.
        """
        while self._under_way:
            step, flag, event = self._under_way[0]
            if event is not None and wait:
                event.synchronize()
            elif event is not None and not event.query():
                return
            self._under_way.popleft()
            self._num_in_a_row = 0 if flag else self._num_in_a_row + 1
            if self._num_in_a_row:
                yield step

    @property
    def are_too_many(self) -> bool:
        return self._num_in_a_row > MAX_SKIPPED


def are_finite(model: nn.Module) -> bool:
    """Whether all weights are. Waits for the device."""
    return bool(torch.stack([p.isfinite().all() for p in model.parameters()]).all())


def advice(folder: Path, on_nan: str) -> str:
    """What a user can do about the step at which the run stopped."""
    again = f"python run_clm.py --out_dir {folder} --resume --on_nan"
    leave_out = f"to leave it out: {again} skip"
    if on_nan == "skip":
        leave_out = f"it was the {MAX_SKIPPED + 1}th in a row: the weights may be past help"
    return (
        f"to do the step again: {again} stop\n{leave_out}\n"
        "or start again with a lower --lr or --max_norm in another --out_dir"
    )


def write_bad_step(path: Path, step: int, lr: float, task: Task) -> None:
    """Computes a step's micro-batches again and writes what came of each, layer by layer.

    step  counted from 0; what the step draws has to be seeded before
    The gradients that this leaves in the model are of no use.
    """
    model = task.model
    batches = []
    for facts, batch in zip(task.describe_batches(step), task.batches_of_step(step)):
        loss_sum, count = accumulate_gradients(model, [batch], task.loss)
        count = count.clamp(min=1)
        norms = {
            name: _shown(parameter.grad.norm() / count)
            for name, parameter in model.named_parameters()
            if parameter.grad is not None
        }
        batches.append({**facts, "loss_nats": _shown(loss_sum / count), "grad_norms": norms})
    norms = {name: _shown(parameter.norm()) for name, parameter in model.named_parameters()}
    content = {"step": step + 1, "lr": lr, "batches": batches, "weight_norms": norms}
    atomic_write(path, json.dumps(content, indent=1).encode("utf-8"))


def _shown(number: Tensor) -> float | str:
    """JSON has no NaN and no infinity: these become text."""
    value = number.item()
    return value if math.isfinite(value) else str(value)
