"""Loads weights of other programs into our models; a missing or unknown tensor is an error."""

import math
from pathlib import Path

import torch
from torch import Tensor, nn

from cs_lm.config.model import ArchitectureConfig
from cs_lm.errors import UserError
from cs_lm.interop.hf_config import Settings, read_nanogpt
from cs_lm.interop.layouts import LAYOUTS, CheckpointSpec, check_config, read_config
from cs_lm.interop.sources import NanoGPTSource, Source, nanogpt_file, open_source
from cs_lm.interop.tensor_mapping import Layout, canonical_name
from cs_lm.models.base import LanguageModel
from cs_lm.models.registry import build_model
from cs_lm.models.stats import num_parameters

SHOWN = 10  # at most this many names of a kind in a message
TABLE, HEAD = "token_embeddings.weight", "lm_head.weight"


def read_weights(path: str | Path) -> LanguageModel:
    """The model in a Hugging Face or OpenAI folder, or in one of its files; in float32.

    Memory: the weights and one more tensor; the largest tensors come first, while little memory is
    used. A `torch.save` file is read whole, and its tensors are used without a copy.
    Raises: FileNotFoundError or UserError, before any weight is loaded. Exceptions: a `torch.save`
    file, which is loaded to be checked, and a head that differs from its tied embedding.
    """
    path = Path(path)
    folder_of(path)  # raises if the path does not exist
    nanogpt = nanogpt_file(path)
    if nanogpt is None:
        spec, source = read_config(folder_of(path)), open_source(path)
    else:
        source = NanoGPTSource(nanogpt)
        spec = CheckpointSpec("gpt2", read_nanogpt(Settings(nanogpt, source.model_args)), True)
        check_config(spec.config, nanogpt)
    _check_size(spec.config, source, path)
    model = build_model(spec.config, device="meta")
    layout = LAYOUTS[spec.layout].tensors(spec.config)
    if spec.is_tied:
        layout.pop(HEAD, None)
    names: dict[str, str] = {}
    for name in source.shapes:
        plain = canonical_name(name, spec.layout)
        if plain in names:
            raise UserError(f"weights: {str(path)!r} has both {names[plain]} and {name}")
        if plain is not None:
            names[plain] = name
    may_be_there = {HEAD} if spec.is_tied else set()
    if problems := _differences(layout, model, names, source, may_be_there):
        raise UserError("\n".join([f"weights: {str(path)!r} does not fit its config", *problems]))
    for name in sorted(layout, key=lambda name: -math.prod(source.shapes[names[name]])):
        entry = layout[name]
        with source.reading(names[name]) as theirs:
            for ours, weight in zip(entry.ours, entry.to_ours(theirs, source.owns_tensors)):
                _place(model, ours, weight)
        if entry.ours == (TABLE,) and spec.is_tied:
            _tie(model, source, names.get(HEAD), path)
    model.make_tables()
    return model


def folder_of(path: Path) -> Path:
    """The folder with the settings and the tokenizer of the weights.

    Raises: FileNotFoundError if the path does not exist.
    """
    if not path.exists():
        raise FileNotFoundError(
            f"weights: got {str(path)!r}, which is not a file or folder; check the path"
        )
    return path if path.is_dir() else path.parent


def _check_size(config: ArchitectureConfig, source: Source, path: Path) -> None:
    """Raises: UserError when the settings describe a much larger model than the files hold."""
    found = sum(map(math.prod, source.shapes.values()))
    # factor 2: the files may lack a tied head; they may also hold causal masks
    if num_parameters(config) > 2 * found or config.num_layers > len(source.shapes):
        raise UserError(
            f"weights: the settings beside {str(path)!r} are those of {num_parameters(config):,} "
            f"parameters, but it holds {found:,} numbers"
        )


def _differences(
    layout: Layout,
    model: LanguageModel,
    names: dict[str, str],
    source: Source,
    may_be_there: set[str],
) -> list[str]:
    """A line for each kind of wrong tensor: missing, unexpected, other shape, not float."""
    shapes = {name: x.shape for name, x in model.named_parameters()}
    expected = {name: entry.theirs_shape(shapes[entry.ours[0]]) for name, entry in layout.items()}
    wrong_shapes = [
        f"{names[name]} {list(source.shapes[names[name]])}, need {list(shape)}"
        for name, shape in expected.items()
        if name in names and source.shapes[names[name]] != shape
    ]
    unexpected = names.keys() - expected.keys() - may_be_there
    return [
        f"{kind}: {len(found)}: {', '.join(sorted(found)[:SHOWN])}"
        + (", ..." if len(found) > SHOWN else "")
        for kind, found in (
            ("missing", expected.keys() - names.keys()),
            ("unexpected", unexpected),
            ("of another shape", wrong_shapes),
            ("not of floating point", [n for n in source.not_floats if n in names.values()]),
        )
        if found
    ]


def _place(model: nn.Module, name: str, weight: Tensor) -> None:
    path, _, kind = name.rpartition(".")
    setattr(model.get_submodule(path), kind, nn.Parameter(weight))


def _tie(model: LanguageModel, source: Source, head: str | None, path: Path) -> None:
    """Ties the head to the embedding. Raises: UserError if the file has a head that differs."""
    table = model.token_embeddings.weight
    if head is not None:
        with source.reading(head) as theirs:
            if not torch.equal(theirs.to(table.dtype), table):
                raise UserError(
                    f"weights: {head} of {str(path)!r} is not the embedding, but its settings say "
                    "that they are tied (tie_word_embeddings); correct the weights or "
                    "tie_word_embeddings"
                )
    if model.lm_head is not None:  # this architecture always has its own head
        _place(model, HEAD, table.detach().clone())
