"""Writes our weights in the layouts of other programs."""

import errno
import math
import os
import shutil
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from cs_lm.config.model import GPT2Config
from cs_lm.errors import UserError, missing_package
from cs_lm.interop.layouts import LAYOUTS, layout_for, written_config
from cs_lm.interop.sources import ADDED_TOKENS
from cs_lm.interop.tensor_mapping import Layout, TensorMapping
from cs_lm.interop.tokenizers import end_ids, pad_token, write_tokenizer
from cs_lm.models.base import LanguageModel
from cs_lm.models.stats import FLOAT_BYTES
from cs_lm.storage.atomic import atomic_write, fsync_directory
from cs_lm.storage.json_file import write_json
from cs_lm.tokenizer import BPETokenizer

FORMATS = ("safetensors", "pytorch", "tensorflow")
_STEMS = {"safetensors": ("model", ".safetensors"), "pytorch": ("pytorch_model", ".bin")}


def write_weights(
    model: LanguageModel,
    tokenizer: BPETokenizer,
    folder: str | Path,
    file_format: str = "safetensors",
    shard_bytes: int | None = None,
) -> None:
    """Writes a new folder that transformers, or OpenAI's TensorFlow code, can read.

    file_format  one of FORMATS
    shard_bytes  maximum size of a file, unless one tensor is larger; several files get an index
    Memory: a copy of the weights of one file at a time.
    Raises: UserError for a folder that is not empty, or a model that the format cannot hold.
    """
    folder = Path(os.path.abspath(folder))
    is_empty = folder.is_dir() and not any(folder.iterdir())
    is_there = UserError(f"--to: {str(folder)!r} exists already; name a new folder")
    if os.path.lexists(folder) and not is_empty:
        raise is_there
    layout = layout_for(model.config)
    if file_format == "tensorflow":
        layout = "openai"
        _check_openai(model)
    folder.parent.mkdir(parents=True, exist_ok=True)
    writing = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        if file_format == "tensorflow":
            _write_tensorflow(model, writing / "model.ckpt")
        else:
            _write_files(model, layout, writing, file_format, shard_bytes)
        _write_settings(model, layout, tokenizer, writing)
        writing.chmod(0o777 & ~_umask())
        fsync_directory(writing)
        try:
            if is_empty:
                folder.rmdir()  # Windows cannot rename onto an existing folder
            os.replace(writing, folder)
        except OSError as error:  # another process made the folder first
            if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
                raise is_there from None
            raise
        fsync_directory(folder.parent)
    except BaseException:
        shutil.rmtree(writing, ignore_errors=True)
        raise


def _check_openai(model: LanguageModel) -> None:
    config = model.config
    if config.architecture != LAYOUTS["openai"].architecture or not config.tied_head:
        raise UserError(
            "--format: tensorflow holds only a GPT-2 whose head is the embedding; use safetensors"
        )
    for name, needed in (("d_ff", 4 * config.d_model), ("norm_eps", GPT2Config.norm_eps)):
        if getattr(config, name) != needed:
            raise UserError(
                f"--format: tensorflow has no place for {name}, which means {needed} there; this "
                f"run has {getattr(config, name)}; use safetensors"
            )


def _weights(model: LanguageModel, entries: Layout) -> dict[str, Tensor]:
    """Our weights that the entries name, with zeros for biases that our model does not have."""
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    for name in (ours for entry in entries.values() for ours in entry.ours):
        if name not in weights:
            matrix = weights[f"{name.removesuffix('bias')}weight"]
            weights[name] = matrix.new_zeros(len(matrix))
    return weights


def _theirs(weights: dict[str, Tensor], entry: TensorMapping) -> Tensor:
    """Their tensor, as a contiguous copy."""
    parts = [weights[name].float().cpu() for name in entry.ours]
    return entry.to_theirs(parts).clone(memory_format=torch.contiguous_format)


def _write_files(
    model: LanguageModel, layout: str, folder: Path, file_format: str, shard_bytes: int | None
) -> None:
    entries = LAYOUTS[layout].tensors(model.config)
    stem, suffix = _STEMS[file_format]
    weights = _weights(model, entries)
    sizes = {
        name: FLOAT_BYTES * sum(weights[ours].numel() for ours in entry.ours)
        for name, entry in entries.items()
    }
    shards = _shards(sizes, shard_bytes)
    is_one = len(shards) == 1
    file_of = {}
    for number, names in enumerate(shards, start=1):
        part = "" if is_one else f"-{number:05d}-of-{len(shards):05d}"
        path = folder / f"{stem}{part}{suffix}"
        tensors = {_full_name(layout, name): _theirs(weights, entries[name]) for name in names}
        file_of.update(dict.fromkeys(tensors, path.name))
        _save(tensors, path, file_format)
    if not is_one:
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": file_of}
        write_json(folder / f"{stem}{suffix}.index.json", index)


def _shards(sizes: dict[str, int], shard_bytes: int | None) -> list[list[str]]:
    """The tensor names of each file, in the order of the layout."""
    shards: list[list[str]] = [[]]
    room = limit = math.inf if shard_bytes is None else shard_bytes
    for name, size in sizes.items():
        if size > room and shards[-1]:
            shards.append([])
            room = limit
        shards[-1].append(name)
        room -= size
    return shards


def _umask() -> int:
    """The permission bits that `mkdir` would remove; `mkdtemp` removes more."""
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _full_name(layout: str, name: str) -> str:
    has_prefix = layout == "gpt2" and name != "lm_head.weight"
    return f"transformer.{name}" if has_prefix else name


def _save(tensors: dict[str, Tensor], path: Path, file_format: str) -> None:
    if file_format == "pytorch":
        torch.save(tensors, path)
    else:
        try:
            from safetensors.torch import save_file
        except ImportError:
            raise UserError(missing_package("--format", "safetensors", "weights")) from None
        save_file(tensors, path, metadata={"format": "pt"})
    path.chmod(0o666 & ~_umask())  # safetensors gives access to the owner only
    with open(path, "rb+") as file:
        os.fsync(file.fileno())


def _write_tensorflow(model: LanguageModel, prefix: Path) -> None:
    try:
        import tensorflow as tf
    except ImportError:
        raise UserError(missing_package("--format", "tensorflow", "tensorflow")) from None
    layout = LAYOUTS["openai"].tensors(model.config)
    weights = _weights(model, layout)
    tensors = [_theirs(weights, entry).numpy() for entry in layout.values()]
    tf.raw_ops.SaveV2(
        prefix=str(prefix),
        tensor_names=list(layout),
        shape_and_slices=[""] * len(layout),
        tensors=tensors,
    )
    atomic_write(prefix.with_name("checkpoint"), b'model_checkpoint_path: "model.ckpt"\n')


def _write_settings(
    model: LanguageModel, layout: str, tokenizer: BPETokenizer, folder: Path
) -> None:
    config = model.config
    pad = pad_token(tokenizer, config.vocab_size)
    ids = end_ids(tokenizer), None if pad is None else pad[1]
    name, content = written_config(layout, config, *ids)
    write_json(folder / name, content)
    if layout == "openai":
        tokenizer.save(folder / "encoder.json", folder / "vocab.bpe")
        special = {text: tokenizer.id_of[text.encode("utf-8")] for text in tokenizer.special_tokens}
        write_json(folder / ADDED_TOKENS, special)
    else:
        write_tokenizer(tokenizer, config.vocab_size, config.context_length, folder)
