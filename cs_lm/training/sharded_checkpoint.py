"""Checkpoints in parts: each process writes a file of its own, and JSON says what is where.

    state.json      settings and counters; of each tensor its dtype, shape and parts
    shard-00002.bin what rank 2 saved: the numbers of its parts, one part after the other

Nobody needs the memory of the whole model, neither to write nor to read: `StoredTensor` reads a
part. Any number of processes can read it, whatever number has written it. No code is in it.
"""

import functools
import json
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from cs_lm.distributed.parts import Part, whole_part
from cs_lm.errors import UserError
from cs_lm.storage.atomic import SyncingFile, atomic_write
from cs_lm.storage.json_file import read_json
from cs_lm.storage.manifest import FileEntry, HashingFile

INDEX = "state.json"
FORMAT_VERSION = 1
_DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64,
                  torch.int32, torch.uint8, torch.bool)
}  # fmt: skip
_ALIGNMENT = 64  # of the first byte of a part, so that a processor reads it at once
_PIECE = 1 << 20  # numbers that are read or written at a time


def shard_name(rank: int) -> str:
    return f"shard-{rank:05d}.bin"


class _Place(NamedTuple):
    """Where a part of a tensor is: rank's file, byte offset; start and shape of the part."""

    rank: int
    offset: int
    start: list[int]
    shape: list[int]


# ---- writing ----


def write_shard(
    folder: Path,
    rank: int,
    content: dict[str, Any],
    cut: Callable[[Any], Part | None] | None = None,
) -> tuple[FileEntry, dict]:
    """Writes the parts of one rank; returns the file's entry and a table of its parts.

    content  of a checkpoint, with a `Part` for each tensor; other tensors are those of rank 0
    cut      gives the part to write of what stands there, or None
    """
    cut = cut or functools.partial(_as_part, rank=rank)
    name, table, offset = shard_name(rank), {}, 0
    with open(folder / name, "wb") as file:
        syncing = SyncingFile(file)
        hashing = HashingFile(syncing)
        for path, found in tensors_in(content):
            if (part := cut(found)) is None:
                continue
            offset += hashing.write(bytes(-offset % _ALIGNMENT))
            table[path] = {
                "dtype": str(part.tensor.dtype).removeprefix("torch."),
                "whole": list(part.whole),
                "place": _Place(rank, offset, list(part.start), list(part.tensor.shape)),
            }
            for piece in bytes_of(part.tensor):
                offset += hashing.write(piece)
        syncing.sync()
    return hashing.entry(name), table


def _as_part(found: Part | Tensor, rank: int) -> Part | None:
    if isinstance(found, Part):
        return found
    return whole_part(found) if rank == 0 else None


def bytes_of(tensor: "Tensor | StoredTensor") -> Iterator[bytes]:
    """The numbers of the tensor, a piece of it after the other."""
    if isinstance(tensor, StoredTensor):
        for part in tensor.pieces():
            yield from bytes_of(part)
        return
    flat = tensor.detach().contiguous().view(-1)
    for piece in flat.split(_PIECE):
        yield piece.cpu().view(torch.uint8).numpy().tobytes()


def write_index(folder: Path, content: dict[str, Any], tables: Sequence[dict]) -> FileEntry:
    """Writes the index; tables  those of all ranks, content  that of rank 0."""
    tensors: dict[str, dict[str, Any]] = {}
    for table in tables:
        for path, one in table.items():
            own = {"dtype": one["dtype"], "shape": one["whole"], "parts": []}
            parts = tensors.setdefault(path, own)["parts"]
            if math.prod(one["place"][3]) or not parts:
                parts.append(one["place"])
    index = {"format_version": FORMAT_VERSION, "content": encoded(content), "tensors": tensors}
    data = json.dumps(index).encode("utf-8")
    hashing = HashingFile(_Nowhere())
    hashing.write(data)
    atomic_write(folder / INDEX, data)
    return hashing.entry(INDEX)


class _Nowhere:
    def write(self, data: bytes) -> int:
        return len(data)


def tensors_in(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Each tensor with its path, for example model/ln_final.weight or optimizer/state/3/exp_avg."""
    if isinstance(value, (Part, Tensor, StoredTensor)):
        yield path, value
    elif isinstance(value, (dict, list, tuple)):
        for key, each in value.items() if isinstance(value, dict) else enumerate(value):
            yield from tensors_in(each, f"{path}/{key}".lstrip("/"))


def encoded(value: Any, path: str = "") -> Any:
    """As JSON: {"tensor": path}, {"dict": [[key, value], ...]}, {"tuple": [...]}, or a value."""
    if isinstance(value, _Encoded):
        return value.value
    if isinstance(value, (Part, Tensor, StoredTensor)):
        return {"tensor": path}
    if isinstance(value, dict):
        pairs = [[k, encoded(v, f"{path}/{k}".lstrip("/"))] for k, v in value.items()]
        return {"dict": pairs}
    if isinstance(value, (list, tuple)):
        own = [encoded(v, f"{path}/{n}".lstrip("/")) for n, v in enumerate(value)]
        return {"tuple": own} if isinstance(value, tuple) else own
    return value


# Where ranks may have entries that rank 0 has not: those of the layers of another stage.
_SPREAD = (("model",), ("optimizer", "state"))


def parts_of_state(content: dict[str, Any]) -> list[Any]:
    """As JSON: what stands in the entries of which each rank may have others."""
    return [encoded(_at(content, path), "/".join(path)) for path in _SPREAD]


def united(content: dict[str, Any], of_ranks: Sequence[list[Any]]) -> dict[str, Any]:
    """The content with the entries of all ranks, in order; those of `parts_of_state`."""
    found = {**content, "optimizer": dict(content["optimizer"])}
    for number, path in enumerate(_SPREAD):
        pairs = [pair for parts in of_ranks for pair in parts[number]["dict"]]
        entries = dict(sorted(dict(pairs).items())) if path != ("model",) else dict(pairs)
        _at(found, path[:-1])[path[-1]] = {key: _Encoded(one) for key, one in entries.items()}
    return found


class _Encoded(NamedTuple):
    """A value that is JSON already."""

    value: Any


def _at(content: Any, path: Sequence[str]) -> Any:
    for key in path:
        content = content.get(key, {})
    return content


# ---- reading ----


class StoredTensor:
    """A tensor in the files of a checkpoint, which is read part by part."""

    def __init__(self, folder: Path, dtype: torch.dtype, shape: list[int], parts: list[_Place]):
        self._folder, self._parts = folder, parts
        self.dtype, self.shape = dtype, torch.Size(shape)

    def numel(self) -> int:
        return self.shape.numel()

    def is_floating_point(self) -> bool:
        return self.dtype.is_floating_point

    def read(self, start: Sequence[int], shape: Sequence[int]) -> Tensor:
        """The part of that shape that begins at `start`."""
        found = torch.empty(tuple(shape), dtype=self.dtype)
        for rank, offset, own_start, own_shape in self._parts:
            low = [max(a, b) for a, b in zip(start, own_start)]
            high = [min(a + n, b + m) for a, n, b, m in zip(start, shape, own_start, own_shape)]
            if any(a >= b for a, b in zip(low, high)):
                continue
            stored = self._mapped(rank, offset, own_shape)
            source = tuple(slice(a - s, b - s) for a, b, s in zip(low, high, own_start))
            target = tuple(slice(a - s, b - s) for a, b, s in zip(low, high, start))
            found[target] = stored[source]
        return found

    def _mapped(self, rank: int, offset: int, shape: list[int]) -> Tensor:
        num_bytes = math.prod(shape) * self.dtype.itemsize
        path = self._folder / shard_name(rank)
        data = np.memmap(path, np.uint8, "c", offset, (num_bytes,))  # read as it is needed
        return torch.from_numpy(data).view(self.dtype).view(shape)

    def pieces(self) -> Iterator[Tensor]:
        """The tensor in pieces of some rows, in order."""
        if not self.shape:
            yield self.whole()
            return
        rows = max(1, _PIECE // max(1, self.shape[1:].numel()))
        rest = self.shape[1:]
        for first in range(0, self.shape[0], rows):
            shape = (min(rows, self.shape[0] - first), *rest)
            yield self.read((first, *(0 for _ in rest)), shape)

    def whole(self) -> Tensor:
        return self.read((0,) * len(self.shape), self.shape)


def check_content(content: Any) -> None:
    """Raises: UserError or KeyError if it is not the content of a checkpoint."""
    for key, kind in (("model", dict), ("optimizer", dict), ("extras", dict), ("iteration", int)):
        if not isinstance(content[key], kind):
            raise UserError(f"{key} is not a {kind.__name__}")
    if content["iteration"] < 0:
        raise UserError("negative iteration")


def read_parts(folder: Path) -> dict[str, Any]:
    """The content of a checkpoint in parts, with a `StoredTensor` for each tensor.

    Raises: UserError for an index that does not fit its files.
    """
    if sys.byteorder != "little":
        raise UserError("checkpoints in parts need a little-endian machine")
    index = read_json(folder / INDEX, "checkpoint")
    try:
        if index["format_version"] != FORMAT_VERSION:
            raise UserError(f"format {index['format_version']}")
        tensors = {path: _stored(folder, one) for path, one in index["tensors"].items()}
        content = decoded(index["content"], tensors)
        check_content(content)
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError, OSError) as error:
        raise UserError(
            f"checkpoint: cannot read {folder / INDEX} ({error}): it is damaged or of another kind"
        ) from None
    return content


def _stored(folder: Path, one: dict[str, Any]) -> StoredTensor:
    dtype, shape = _DTYPES[one["dtype"]], one["shape"]
    parts, size = [_Place(*part) for part in one["parts"]], 0
    for rank, offset, start, part in parts:
        numbers = [*shape, *start, *part, rank, offset]
        if not all(type(n) is int and n >= 0 for n in numbers) or len(start) != len(shape):
            raise UserError("a part without a place")
        if any(a + n > most for a, n, most in zip(start, part, shape, strict=True)):
            raise UserError("a part outside its tensor")
        num_bytes = math.prod(part) * dtype.itemsize
        if offset + num_bytes > (folder / shard_name(rank)).stat().st_size:
            raise UserError("a part that is longer than its file")
        size += math.prod(part)
    if size != math.prod(shape):
        raise UserError("parts that do not make up their tensor")
    return StoredTensor(folder, dtype, shape, parts)


def decoded(value: Any, tensors: dict[str, StoredTensor]) -> Any:
    if isinstance(value, list):
        return [decoded(one, tensors) for one in value]
    if not isinstance(value, dict):
        return value
    ((kind, own),) = value.items()
    if kind == "tensor":
        return tensors[own]
    if kind == "tuple":
        return tuple(decoded(one, tensors) for one in own)
    if kind != "dict":
        raise UserError(f"an unknown kind {kind!r}")
    return {key: decoded(one, tensors) for key, one in own}


def wholly(value: Any) -> Any:
    """The value with every `StoredTensor` read."""
    if isinstance(value, StoredTensor):
        return value.whole()
    if isinstance(value, dict):
        return {key: wholly(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(wholly(one) for one in value)
    return value


def part_of(source: Tensor | StoredTensor, part: Part) -> Tensor:
    """The numbers of `source` that stand where the part is.

    Raises: UserError for a source of another shape.
    """
    if tuple(source.shape) != part.whole:
        raise UserError(f"got a shape of {tuple(source.shape)}, need {part.whole}")
    if isinstance(source, StoredTensor):
        return source.read(part.start, part.tensor.shape)
    return source[tuple(slice(a, a + n) for a, n in zip(part.start, part.tensor.shape))]
