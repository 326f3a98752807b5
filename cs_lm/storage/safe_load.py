"""Refuses files that would run code or take more memory than their length when they are read."""

import os
import pickletools
import zipfile
from typing import BinaryIO

from torch import Tensor

from cs_lm.errors import UserError

# What a checkpoint calls to be read, besides torch's own types.
_CALLED = {
    "collections OrderedDict",
    "torch._utils _rebuild_tensor_v2",
    "torch._utils _rebuild_parameter",
    "_codecs encode",
}


# What is not a tensor's numbers: names, shapes and settings.
_MAX_STRUCTURE_BYTES = 64 << 20


def check_archive(path: str | os.PathLike) -> None:
    """Before anything is unpacked: the archive's members are not compressed, and fit into it.

    Raises: ValueError, or what zipfile raises for a file that is no archive.
    """
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
        if any(member.compress_type != zipfile.ZIP_STORED for member in members):
            raise UserError("compressed")
        if sum(member.file_size for member in members) > os.path.getsize(path):
            raise UserError("members longer than the file")
        structure = [member for member in members if member.filename.endswith("data.pkl")]
        if sum(member.file_size for member in structure) > _MAX_STRUCTURE_BYTES:
            raise UserError("too much besides tensors")
        for member in structure:
            _check_names(archive.read(member))


def check_old_file(path: str | os.PathLike) -> None:
    """The same for a file as torch wrote it before version 1.6: pickles, then numbers."""
    with open(path, "rb") as file:
        for _ in ("magic number", "protocol", "machine", "content"):
            _check_names(file)


def _check_names(pickled: bytes | BinaryIO) -> None:
    """What the pickle may call: not `bytearray`, of any size, which `weights_only` lets pass."""
    for operation, argument, _ in pickletools.genops(pickled):
        if operation.name == "STACK_GLOBAL":
            raise UserError("a pickle of another protocol")
        is_ours = argument in _CALLED or str(argument).startswith("torch ")
        if operation.name == "GLOBAL" and not is_ours:
            raise UserError(f"it calls {argument}")


def check_tensor(tensor: Tensor) -> None:
    """Raises: ValueError for one that takes more memory than the file has bytes for it."""
    if tensor.is_meta:
        raise UserError("a tensor without numbers")
    if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        raise UserError("a tensor with more elements than numbers")
