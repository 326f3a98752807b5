"""Checkpoints: everything a run needs to go on, in one file that is complete or not there."""

import math
import os
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import nn

from cs_lm.whole_file import writing_whole

PathOrFile = str | os.PathLike | BinaryIO
FORMAT_VERSION = 1


def save_checkpoint(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    iteration: int,
    path_or_file: PathOrFile,
    **extras: Any,
) -> None:
    """Writes model, optimizer, iteration, random state and extras (tensors and plain values).

    A path is written under a temporary name first, so that a crash leaves the older file whole.
    """
    content = {
        "format_version": FORMAT_VERSION,
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "iteration": iteration,
        "rng": _rng_state(),
        "extras": extras,
    }
    if not isinstance(path_or_file, (str, os.PathLike)):
        torch.save(content, path_or_file)
        return
    with writing_whole(path_or_file) as file:
        torch.save(content, file)


def read_checkpoint(path_or_file: PathOrFile, device: str | torch.device = "cpu") -> dict[str, Any]:
    """The content of a checkpoint; tensors and plain values only, no code is run.

    Raises: FileNotFoundError, or ValueError for a file that is not one of our checkpoints.
    """
    if isinstance(path_or_file, (str, os.PathLike)) and not Path(path_or_file).is_file():
        raise FileNotFoundError(
            f"checkpoint: got {str(path_or_file)!r}, which is not a file; check the path"
        )
    try:
        content = torch.load(path_or_file, map_location=device, weights_only=True)
        if content["format_version"] != FORMAT_VERSION:
            raise ValueError(f"format {content['format_version']}")
    except Exception as error:  # torch.load raises whatever its unpickler meets
        shown = os.fspath(path_or_file) if isinstance(path_or_file, os.PathLike) else path_or_file
        raise ValueError(
            f"checkpoint: cannot read {shown!s} ({type(error).__name__}): it is damaged or of "
            "another kind; need a file that cs_lm wrote, try the other of last.pt and best.pt"
        ) from None
    return content


def load_checkpoint(
    path_or_file: PathOrFile, model: nn.Module, optimizer: torch.optim.Optimizer | None = None
) -> int:
    """Puts a checkpoint's state into the model and optimizer; returns its iteration."""
    content = read_checkpoint(path_or_file)
    restore(content, model, optimizer)
    return content["iteration"]


def restore(
    content: dict[str, Any], model: nn.Module, optimizer: torch.optim.Optimizer | None = None
) -> None:
    """Puts what `read_checkpoint` gave into the model, the optimizer and torch's generators."""
    model.load_state_dict(content["model"])
    if optimizer is not None:
        optimizer.load_state_dict(content["optimizer"])
        _set_rng_state(content["rng"])


class CheckpointManager:
    """The checkpoints of a run: `last.pt`, and `best.pt` for the lowest validation loss."""

    def __init__(self, folder: str | Path):
        self.last_path = Path(folder) / "last.pt"
        self.best_path = Path(folder) / "best.pt"
        self._best_loss: float | None = None

    def save(self, model, optimizer, iteration: int, **extras: Any) -> None:
        save_checkpoint(model, optimizer, iteration, self.last_path, **extras)

    def save_if_best(self, valid_loss: float, model, optimizer, iteration: int, **extras) -> bool:
        """Keeps the model as `best.pt` unless an earlier one of this run is as good."""
        if not math.isfinite(valid_loss):
            return False
        if self._best_loss is None and self.best_path.is_file():
            self._best_loss = read_checkpoint(self.best_path)["extras"]["valid_loss"]
        if self._best_loss is not None and not valid_loss < self._best_loss:
            return False
        extras["valid_loss"] = valid_loss
        save_checkpoint(model, optimizer, iteration, self.best_path, **extras)
        self._best_loss = valid_loss
        return True


def _rng_state() -> dict[str, Any]:
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def _set_rng_state(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["cpu"].cpu())
    if "cuda" in state and torch.cuda.is_available():
        # a run may go on with fewer devices than it began with
        for device, device_state in zip(range(torch.cuda.device_count()), state["cuda"]):
            torch.cuda.set_rng_state(device_state.cpu(), device)
