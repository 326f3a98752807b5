"""Exports a run's checkpoint to torch.distributed.checkpoint (DCP), and reads such an export.

Its tensors have the names that DCP users expect: model.<name>, and
optimizer.state.<name of the parameter>.exp_avg. Everything else is in cs_lm.json beside them.
DCP's `.metadata` is a pickle: it is read only after a look at what it would call.
"""

import json
import pickle
import warnings
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader

from cs_lm.config.fields import from_json
from cs_lm.config.run import RunConfig
from cs_lm.errors import Problem, UserError
from cs_lm.models.registry import build_model
from cs_lm.optim.param_groups import names_in_groups
from cs_lm.storage.atomic import atomic_write
from cs_lm.storage.json_file import read_json
from cs_lm.training.run_dir import stage_of
from cs_lm.training.sharded_checkpoint import StoredTensor, decoded, encoded, tensors_in

SIDE_FILE = "cs_lm.json"
_METADATA = "torch.distributed.checkpoint.metadata"
_CALLED = {
    _METADATA: {"Metadata", "MetadataIndex", "TensorStorageMetadata", "TensorProperties",
                "ChunkStorageMetadata", "StorageMeta", "_MEM_FORMAT_ENCODING"},
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.serialization": {"_get_layout"},
    "pathlib": {"PosixPath"},
    "pathlib._local": {"PosixPath"},  # from Python 3.13 on
}  # fmt: skip


def write_dcp(source: dict[str, Any], folder: Path) -> None:
    """Writes the tensors of the checkpoint, and the rest of it, into a new folder.

    source  of a run of cs-lm train
    Memory: DCP takes all tensors at once; those of a single file stay in it until they are written.
    """
    if stage_of(source) != "train":
        raise UserError(f"--format: dcp is for runs of cs-lm train, not of {stage_of(source)}")
    names = _names_in_optimizer(source)
    tensors = {
        _key(path, names): tensor.whole() if isinstance(tensor, StoredTensor) else tensor
        for path, tensor in tensors_in(source)
    }
    with _alone():
        dcp.save(tensors, checkpoint_id=str(folder), no_dist=True)
    keys = {path: _key(path, names) for path, _ in tensors_in(source)}
    side = {"format_version": 1, "content": encoded(source), "keys": keys}
    atomic_write(folder / SIDE_FILE, json.dumps(side).encode("utf-8"))


def read_dcp(folder: Path) -> dict[str, Any]:
    """The content of an export, with tensors that are read when they are used.

    Raises: UserError for a folder of another kind.
    """
    side = read_json(folder / SIDE_FILE, "--out_dir")
    check_metadata(folder)
    found = FileSystemReader(folder).read_metadata().state_dict_metadata
    try:
        tensors = {
            path: _ExportedTensor(folder, key, found[key].properties.dtype, found[key].size)
            for path, key in side["keys"].items()
        }
        return decoded(side["content"], tensors)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"--out_dir: cannot read {folder / SIDE_FILE} ({error})") from None


def check_metadata(folder: Path) -> None:
    """Raises: UserError if DCP's pickle calls anything but the classes that it is made of."""
    try:
        with open(folder / ".metadata", "rb") as file:
            _Careful(file).load()
    except (pickle.UnpicklingError, EOFError, AttributeError, ValueError, TypeError) as error:
        what = f"{folder / '.metadata'} is no metadata of DCP ({error})"
        raise UserError(f"--out_dir: {what}; export it again") from None


class _Careful(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        is_type = module == "torch" and (
            name == "Size" or isinstance(getattr(torch, name, None), torch.dtype)
        )
        if not is_type and name not in _CALLED.get(module, ()):
            raise pickle.UnpicklingError(f"it calls {module}.{name}")
        return super().find_class(module, name)


class _ExportedTensor(StoredTensor):
    """A tensor of an export; a part of it needs the memory of the whole."""

    def __init__(self, folder: Path, key: str, dtype: torch.dtype, shape: Sequence[int]):
        super().__init__(folder, dtype, list(shape), [])
        self._key = key

    def read(self, start: Sequence[int], shape: Sequence[int]) -> Tensor:
        whole = {self._key: torch.empty(self.shape, dtype=self.dtype)}
        try:
            with _alone():
                dcp.load(whole, checkpoint_id=self._folder, no_dist=True)
        except (OSError, RuntimeError, dcp.CheckpointException) as error:
            [reason] = str(error).strip().splitlines()[-1:] or [type(error).__name__]
            raise UserError(
                Problem(
                    "--out_dir",
                    f"{str(self._folder)!r} has lost or damaged files ({reason})",
                    fix="export it again",
                )
            ) from None
        return whole[self._key][tuple(slice(a, a + n) for a, n in zip(start, shape))]

    def pieces(self):
        yield self.whole()


def _alone() -> warnings.catch_warnings:
    """DCP warns that it works in a single process, which is meant."""
    return warnings.catch_warnings(action="ignore", category=UserWarning)


def _names_in_optimizer(source: dict[str, Any]) -> list[str]:
    """The parameter of each number in the optimizer's state."""
    config = from_json(RunConfig, source["extras"]["config"])
    model = build_model(config.model, device="meta")
    return [*chain(*names_in_groups(model, config.optim.weight_decay))]


def _key(path: str, names: Sequence[str]) -> str:
    """DCP's name for one of our paths."""
    if path.startswith("optimizer/state/"):
        _, _, number, name = path.split("/", 3)
        return f"optimizer.state.{names[int(number)]}.{name}"
    return path.replace("/", ".")
