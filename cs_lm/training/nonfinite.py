"""Finds steps whose loss or gradient is NaN or infinite, and writes a report of them."""

import json
import math
import shlex
import time
from collections import deque
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from cs_lm.distributed.sharing import Sharing
from cs_lm.storage.atomic import atomic_write
from cs_lm.training.step import accumulate_gradients
from cs_lm.training.task import Task

# With --on_nan skip, the run skips at most this many steps in a row, and then stops.
MAX_SKIPPED = 10


class NonFiniteError(Exception):
    """The run cannot continue with these weights and batches; the message says what is saved."""


class NonFiniteMonitor:
    """Finds the steps that were not finite, without an extra wait for the device.

    On CUDA, the flag of a step is copied to the host while the next step is launched. On other
    devices, reading the flag waits for the end of the step, which happens anyway.
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

    def bad_steps(self, wait_s: float = 0.0) -> Iterator[int]:
        """The steps that were not finite, among those known by now or in that time.

        Raises: TimeoutError if the device has not ended its steps in a time that is not 0.
        Meanwhile `are_too_many` counts up to the step that was yielded last.
        """
        while self._under_way:
            step, flag, event = self._under_way[0]
            if event is not None and not _ends(event, wait_s):
                if wait_s:
                    raise TimeoutError(f"the device has not ended step {step + 1} in {wait_s} s")
                return
            self._under_way.popleft()
            self._num_in_a_row = 0 if flag else self._num_in_a_row + 1
            if self._num_in_a_row:
                yield step

    @property
    def are_too_many(self) -> bool:
        return self._num_in_a_row > MAX_SKIPPED


def _ends(event: torch.cuda.Event, wait_s: float) -> bool:
    if wait_s == math.inf:
        event.synchronize()
    end_s = time.monotonic() + wait_s
    while not event.query():
        if time.monotonic() >= end_s:
            return False
        time.sleep(0.001)
    return True


def are_finite(parameters: Iterable[Tensor]) -> bool:
    """Whether all weights are finite. Waits for the device."""
    return bool(torch.stack([p.isfinite().all() for p in parameters]).all())


def advice(folder: Path, on_nan: str, program: str) -> str:
    """Text for the user: how to continue after the step at which the run stopped."""
    again = f"python {program} --out_dir {shlex.quote(str(folder))} --resume --on_nan"
    hint = f"to skip it: {again} skip"
    if on_nan == "skip":
        count = f"{MAX_SKIPPED + 1}th"
        hint = f"it was the {count} bad step in a row: skipping more will probably not help"
    return (
        f"to do the step again: {again} stop\n{hint}\n"
        "or start again with a lower --lr or --max_norm in another --out_dir"
    )


def write_bad_step(
    path: Path, step: int, lr: float, task: Task, sharing: Sharing | None = None
) -> None:
    """Repeats a step's micro-batches; writes the loss and each layer's norms to a JSON file.

    step  counted from 0; the caller sets the step's random seed before
    sharing  of the model; what is written is what this process has of it, from its rows. None: all
    Overwrites the gradients in the model; they must not be used afterwards.
    """
    sharing = sharing or Sharing.alone(task.model)
    batches = []
    for facts, batch in zip(task.describe_batches(step), task.batches_of_step(step)):
        loss_sum, count = accumulate_gradients(task.model, [batch], task.loss, sharing, joins=False)
        sharing.collect_gradients()
        count = count.clamp(min=1)
        norms = {
            name: _shown(parameter.grad.norm() / count)
            for name, parameter in sharing.parameters().items()
            if parameter.grad is not None
        }
        batches.append({**facts, "loss_nats": _shown(loss_sum / count), "grad_norms": norms})
    norms = {name: _shown(parameter.norm()) for name, parameter in sharing.parameters().items()}
    content = {"step": step + 1, "lr": lr, "batches": batches, "weight_norms": norms}
    atomic_write(path, json.dumps(content, indent=1).encode("utf-8"))


def _shown(number: Tensor) -> float | str:
    """A number for JSON; NaN and infinity become text, because JSON has neither."""
    value = number.item()
    return value if math.isfinite(value) else str(value)
