"""The list of other programs' weight layouts that we can read and write."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from cs_lm.config.model import ArchitectureConfig
from cs_lm.config.run import MAX_CONTEXT_LENGTH
from cs_lm.errors import Problem, UserError
from cs_lm.interop.hf_config import (
    Settings,
    read_gpt2,
    read_llama,
    read_openai,
    write_gpt2,
    write_llama,
    write_openai,
)
from cs_lm.interop.tensor_mapping import Layout, gpt2_layout, llama_layout, openai_layout

HF, OPENAI = "config.json", "hparams.json"


class ProgramLayout(NamedTuple):
    """How a program stores the weights of one of our architectures.

    tensors  returns the program's tensors for a config, and how they map to ours
    read     our config from the program's settings
    write    the program's settings from our config
    """

    architecture: str
    tensors: Callable[..., Layout]
    read: Callable[[Settings], ArchitectureConfig]
    write: Callable[..., dict[str, Any]]


# The first layout of an architecture is that of transformers, under its `model_type`.
LAYOUTS = {
    "gpt2": ProgramLayout("gpt2", gpt2_layout, read_gpt2, write_gpt2),
    "llama": ProgramLayout("transformer", llama_layout, read_llama, write_llama),
    "openai": ProgramLayout("gpt2", openai_layout, read_openai, write_openai),
}


def layout_for(config: ArchitectureConfig) -> str:
    """The name of the layout that transformers reads.

    Raises: UserError for an architecture that none of these programs has.
    """
    for name, layout in LAYOUTS.items():
        if layout.architecture == config.architecture:
            return name
    raise UserError(f"weights: no other program is known to have {config.architecture!r} models")


class CheckpointSpec(NamedTuple):
    """Layout and config of a folder's weights; `is_tied`: the head is the embedding."""

    layout: str
    config: ArchitectureConfig
    is_tied: bool


def read_config(folder: Path) -> CheckpointSpec:
    """The layout that the folder's files are in, and the config of our model for them.

    Raises: FileNotFoundError, or UserError naming a setting that our models do not support.
    """
    if (folder / HF).is_file():
        settings = Settings(folder / HF)
        kind = settings.get("model_type", str)
        known = [name for name in LAYOUTS if name != "openai"]
        if kind not in known:
            raise UserError(
                f"weights: model_type of {str(settings.path)!r} is {kind!r}; need one of "
                f"{', '.join(known)}"
            )
        is_tied = settings.get("tie_word_embeddings", bool, kind == "gpt2")
        spec = CheckpointSpec(kind, LAYOUTS[kind].read(settings), is_tied)
    elif (folder / OPENAI).is_file():
        spec = CheckpointSpec("openai", read_openai(Settings(folder / OPENAI)), True)
    else:
        raise FileNotFoundError(
            f"weights: {str(folder)!r} has no {HF} (or {OPENAI}, as OpenAI wrote it) beside the "
            "weights; name a folder that has"
        )
    check_config(spec.config, folder)
    return spec


def check_config(config: ArchitectureConfig, where: Path) -> None:
    """Raises: UserError for settings with which no model can be built."""
    problems = config.validate()
    if config.context_length > MAX_CONTEXT_LENGTH:
        need = f"at most {MAX_CONTEXT_LENGTH}"
        problems.append(Problem("--max_seq_length", f"got {config.context_length}", need))
    if problems:
        raise UserError(f"weights: the settings in {str(where)!r} do not fit: {problems[0]}")


def written_config(
    layout: str, config: ArchitectureConfig, ends: list[int], pad: int | None
) -> tuple[str, dict[str, Any]]:
    """The name and the content of the file that `read_config` reads.

    ends  ids that end a text
    pad   id of the padding token of a batch
    """
    own = LAYOUTS[layout].write(config)
    if layout == "openai":
        return OPENAI, own
    shared = {"model_type": layout, "vocab_size": config.vocab_size, "torch_dtype": "float32"}
    return HF, {**shared, **written_ids(ends, pad), **own}


def written_ids(ends: list[int], pad: int | None) -> dict[str, Any]:
    end = None if not ends else ends[0] if len(ends) == 1 else ends
    return {"bos_token_id": ends[0] if ends else None, "eos_token_id": end, "pad_token_id": pad}
