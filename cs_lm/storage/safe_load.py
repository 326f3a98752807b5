"""Refuses files that would run code, or use more memory than their length, when loaded."""

import os
import pickletools
import zipfile
from typing import BinaryIO

from torch import Tensor

from cs_lm.errors import UserError

# The functions that a checkpoint's pickle may call, besides torch's own types.
_CALLED = {
    "collections OrderedDict",
    "torch._utils _rebuild_tensor_v2",
    "torch._utils _rebuild_parameter",
    "_codecs encode",
}


# Limit for everything besides tensor data: names, shapes and settings.
_MAX_STRUCTURE_BYTES = 64 << 20


def check_archive(path: str | os.PathLike) -> None:
    """Checks an archive before unpacking: not compressed, members fit into it, safe pickles.

    Raises: UserError, or the error of zipfile for a file that is not an archive.
    """
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
        if any(member.compress_type != zipfile.ZIP_STORED for member in members):
            raise UserError("compressed")
        if sum(member.file_size for member in members) > os.path.getsize(path):
            raise UserError("members longer than the file")
        structure = [member for member in members if member.filename.endswith("data.pkl")]
        if sum(member.file_size for member in structure) > _MAX_STRUCTURE_BYTES:
            raise UserError("more than 64 MB of data besides tensors")
        for member in structure:
            _check_names(archive.read(member))


def check_old_file(path: str | os.PathLike) -> None:
    """Checks the pickles of a file from torch before version 1.6: pickles, then tensor data.

    Raises: UserError.
    """
    with open(path, "rb") as file:
        for _ in ("magic number", "protocol", "machine", "content"):
            _check_names(file)


def _check_names(pickled: bytes | BinaryIO) -> None:
    """Refuses a pickle that calls other functions than `_CALLED` and torch's.

    torch's `weights_only` alone would allow `bytearray` of any size.
    Raises: UserError.
    """
    for operation, argument, _ in pickletools.genops(pickled):
        if operation.name == "STACK_GLOBAL":
            raise UserError("a pickle with an unsupported protocol")
        is_ours = argument in _CALLED or str(argument).startswith("torch ")
        if operation.name == "GLOBAL" and not is_ours:
            raise UserError(f"it calls {argument}")


def check_tensor(tensor: Tensor) -> None:
    """Raises: UserError for a tensor with more elements than its storage has."""
    if tensor.is_meta:
        raise UserError("a tensor without data")
    if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        raise UserError("a tensor with more elements than stored values")
