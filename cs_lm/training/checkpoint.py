"""Checkpoint files: everything that a run needs to resume.

A file is written completely or not at all. Reading it runs no code from the file.
"""

import copy
import os
from collections.abc import Iterable, Iterator, Sequence, Set
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor, nn

from cs_lm.distributed.parts import Part
from cs_lm.distributed.sharing import Sharing
from cs_lm.errors import UserError
from cs_lm.storage.atomic import atomic_open
from cs_lm.storage.safe_load import check_archive, check_tensor
from cs_lm.training.sharded_checkpoint import check_content, part_of

PathOrFile = str | os.PathLike | BinaryIO
FORMAT_VERSION = 1


def checkpoint_content(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    iteration: int,
    sharing: Sharing | None = None,
    **extras: Any,
) -> dict[str, Any]:
    """State dicts of model and optimizer, iteration, and extras (tensors and plain values).

    The tensors are those of the model and optimizer, not copies.
    sharing  if processes save parts: the tensors are the parts of this process
    """
    in_parts = sharing is not None and sharing.saves_parts
    return {
        "format_version": FORMAT_VERSION,
        "model": sharing.saved() if in_parts else model.state_dict(),
        "optimizer": sharing.saved_moments() if in_parts else optimizer.state_dict(),
        "iteration": iteration,
        "extras": extras,
    }


def copied(content: Any) -> Any:
    """A deep copy of the content on the CPU, which later updates do not change."""
    if isinstance(content, Tensor):
        return content.detach().to("cpu", copy=True)
    if isinstance(content, Part):
        return content._replace(tensor=copied(content.tensor))
    if isinstance(content, dict):
        return {key: copied(value) for key, value in content.items()}
    if isinstance(content, (list, tuple)):
        return type(content)(copied(value) for value in content)
    return copy.copy(content)


def save_checkpoint(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    iteration: int,
    path_or_file: PathOrFile,
    **extras: Any,
) -> None:
    """Writes the result of `checkpoint_content`.

    A path is written under a temporary name first, so a crash leaves the older file unchanged.
    """
    content = checkpoint_content(model, optimizer, iteration, **extras)
    if not isinstance(path_or_file, (str, os.PathLike)):
        torch.save(content, path_or_file)
        return
    with atomic_open(path_or_file) as file:
        torch.save(content, file)


def read_checkpoint(
    path_or_file: PathOrFile, device: str | torch.device = "cpu", mapped: bool = False
) -> dict[str, Any]:
    """The content of a checkpoint: tensors and plain values only; no code from the file is run.

    mapped  leave the numbers in the file until they are used
    Memory: at most the file's length, whatever tensor sizes the file declares.
    Raises: FileNotFoundError, or UserError for a file that is not one of our checkpoints.
    """
    if isinstance(path_or_file, (str, os.PathLike)) and not Path(path_or_file).is_file():
        raise FileNotFoundError(
            f"checkpoint: got {str(path_or_file)!r}, which is not a file; check the path"
        )
    try:
        if isinstance(path_or_file, (str, os.PathLike)):  # a file object is not checked
            check_archive(path_or_file)
        content = torch.load(path_or_file, map_location=device, weights_only=True, mmap=mapped)
        _check_content(content)
    except Exception as error:  # the unpickler of torch.load can raise any exception
        shown = os.fspath(path_or_file) if isinstance(path_or_file, os.PathLike) else path_or_file
        raise UserError(
            f"checkpoint: cannot read {shown!s} ({type(error).__name__}): it is damaged or of "
            "another kind; need a file that cs_lm wrote"
        ) from None
    return content


def load_checkpoint(
    path_or_file: PathOrFile, model: nn.Module, optimizer: torch.optim.Optimizer | None = None
) -> int:
    """Loads a checkpoint into the model and optimizer; returns its iteration."""
    content = read_checkpoint(path_or_file)
    restore(content, model, optimizer)
    return content["iteration"]


def restore(
    content: dict[str, Any],
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
    keep_settings: bool = False,
) -> None:
    """Loads the content that `read_checkpoint` returned into the model and the optimizer.

    keep_settings  keep the optimizer's present learning rate, weight decay and so on
    Raises: UserError for the state of another model; nothing is changed then.
    """
    _check_shapes(content["model"], model)
    if optimizer is not None:
        _check_moments(content["optimizer"], optimizer)
    model.load_state_dict(content["model"])
    if optimizer is not None:
        groups = [{**group, "params": None} for group in optimizer.param_groups]
        optimizer.load_state_dict(content["optimizer"])
        for group, before in zip(optimizer.param_groups, groups if keep_settings else ()):
            group.update(before, params=group["params"])


def restore_parts(content: dict[str, Any], sharing: Sharing) -> None:
    """Loads what this process holds of the model and the optimizer; settings stay.

    content  with tensors, or `StoredTensor`s, of which only the needed parts are read
    Raises: UserError for the state of another model.
    """
    held, optimizer = sharing.held(), sharing.optimizer
    _check_names(held.keys() - content["model"].keys(), set())
    _check_sharded_moments(content["optimizer"], sharing)
    for name, part in held.items():
        part.tensor.copy_(part_of(content["model"][name], part))
    for number, parameter in sharing.numbered().items():
        state = content["optimizer"]["state"].get(number)
        if not state:
            continue
        place = sharing.place_of(parameter)
        optimizer.state[parameter] = {
            name: value
            if isinstance(value, (int, float))
            else part_of(value, place).to(parameter.device, copy=True)
            for name, value in state.items()
        }


# ---- checks ----


def _check_content(content: Any) -> None:
    if content["format_version"] != FORMAT_VERSION:
        raise UserError(f"format {content['format_version']}")
    check_content(content)
    for tensor in _tensors(content):
        check_tensor(tensor)


def _tensors(content: Any) -> Iterator[Tensor]:
    if isinstance(content, Tensor):
        yield content
    elif isinstance(content, (dict, list, tuple)):
        for value in content.values() if isinstance(content, dict) else content:
            yield from _tensors(value)


def _check_shapes(state: dict[str, Any], model: nn.Module) -> None:
    own = model.state_dict()
    shapes = [
        name
        for name in state.keys() & own.keys()
        if getattr(state[name], "shape", None) != getattr(own[name], "shape", None)
    ]
    _check_names(state.keys(), own.keys(), shapes)


def _check_names(found: Set[str], own: Set[str], shapes: Sequence[str] = ()) -> None:
    wrong = [*sorted(map(str, found ^ own)), *shapes]
    if wrong:
        raise UserError(
            f"checkpoint: {wrong[0]!r} and {len(wrong) - 1} other weights do not fit the model; "
            "was it saved by a model of another shape?"
        )


def _check_moments(state: dict[str, Any], optimizer: torch.optim.Optimizer) -> None:
    """Checks the optimizer's state; only our AdamW declares the names that it must have."""
    own = optimizer.param_groups
    shapes = [p.shape for group in own for p in group["params"]]
    try:
        numbers = [i for group in state["param_groups"] for i in group["params"]]
    except (KeyError, TypeError):
        numbers = []
    _check_states(state, optimizer, [len(g["params"]) for g in own], zip(numbers, shapes))


def _check_sharded_moments(state: dict[str, Any], sharing: Sharing) -> None:
    shapes = ((n, sharing.place_of(p).whole) for n, p in sharing.numbered().items())
    _check_states(state, sharing.optimizer, sharing.group_sizes(), shapes)


def _check_states(
    state: dict[str, Any],
    optimizer: torch.optim.Optimizer,
    group_sizes: Sequence[int],
    shapes: Iterable[tuple[int, Sequence[int]]],
) -> None:
    """shapes  of the whole parameters, by number"""
    try:
        if [len(group["params"]) for group in state["param_groups"]] != list(group_sizes):
            raise UserError("other groups of parameters")
        for number, wanted in shapes:
            found = state["state"].get(number, {})
            names = getattr(optimizer, "state_names", found.keys())
            if found and found.keys() != set(names):
                raise UserError(f"it has {sorted(found)}")
            for name, value in found.items():
                shape = getattr(value, "shape", ())
                if not len(shape) and not isinstance(value, (int, float, Tensor)):
                    raise UserError(f"{name} is {value!r}")
                if len(shape) and tuple(shape) != tuple(wanted):
                    raise UserError(f"{name} of another shape")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"checkpoint: the optimizer's state does not fit ({error}); was it saved by a model of "
            "another shape?"
        ) from None
