"""Writes a checkpoint in another form, tensor by tensor: nobody needs the memory of all of it.

A source is what `CheckpointManager.read(..., lazily=True)` gives. Each function writes a complete
checkpoint, or nothing.
"""

import functools
import hashlib
import os
import struct
import zipfile
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from cs_lm.distributed.parts import Part, rows_of
from cs_lm.storage.manifest import FileEntry
from cs_lm.training.checkpoint_manager import STATE, CheckpointManager
from cs_lm.training.sharded_checkpoint import (
    StoredTensor,
    bytes_of,
    part_of,
    tensors_in,
    write_index,
    write_shard,
)


def write_single(source: dict[str, Any], manager: CheckpointManager) -> None:
    """Writes `state.pt`: first room for all numbers, then one tensor after the other.

    Memory: a piece of a tensor.
    """

    def write(folder: Path) -> list[FileEntry]:
        path = folder / STATE
        with torch.serialization.skip_data():
            torch.save(_with_room(source), path)
        with zipfile.ZipFile(path) as archive:
            members = {one.filename.partition("/")[2]: one for one in archive.infolist()}
        with open(path, "r+b") as file:
            for number, (_, tensor) in enumerate(tensors_in(source)):
                file.seek(_start_of(file, members[f"data/{number}"].header_offset))
                for piece in bytes_of(tensor):
                    file.write(piece)
            file.flush()
            os.fsync(file.fileno())
        with open(path, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        return [FileEntry(STATE, path.stat().st_size, digest)]

    manager.save_files(source["iteration"], write)


def _start_of(file: BinaryIO, header: int) -> int:
    """Where the bytes of an archive's member begin; header  offset of what stands before them"""
    file.seek(header + 26)  # the lengths of its name and of what follows the name
    lengths = struct.unpack("<HH", file.read(4))
    return header + 30 + sum(lengths)


def _with_room(value: Any) -> Any:
    """The value with tensors of the same shapes that use no memory."""
    if isinstance(value, (Tensor, StoredTensor)):
        return torch.empty(value.shape, dtype=value.dtype)  # never touched
    if isinstance(value, dict):
        return {key: _with_room(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_with_room(one) for one in value)
    return value


def write_in_parts(source: dict[str, Any], manager: CheckpointManager, num_parts: int) -> None:
    """Writes the files that so many ranks would write, each with its rows of every tensor.

    Memory: one part of a tensor.
    """

    def write(folder: Path) -> list[FileEntry]:
        written = []
        for rank in range(num_parts):
            cut = functools.partial(_rows, rank=rank, num_parts=num_parts)
            written.append(write_shard(folder, rank, source, cut))
        index = write_index(folder, source, [table for _, table in written])
        return [index, *(entry for entry, _ in written)]

    manager.save_files(source["iteration"], write)


def _rows(tensor: Tensor | StoredTensor, rank: int, num_parts: int) -> Part | None:
    if not tensor.shape:
        return Part(part_of(tensor, Part(torch.empty(()), (), ())), (), ()) if rank == 0 else None
    rows = rows_of(tensor.shape[0], rank, num_parts)
    rest = tuple(tensor.shape[1:])
    room = torch.empty((len(rows), *rest), dtype=tensor.dtype, device="meta")
    part = Part(room, (rows.start, *(0 for _ in rest)), tuple(tensor.shape))
    return part._replace(tensor=part_of(tensor, part))
