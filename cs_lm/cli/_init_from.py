"""Reads the weights for a new run (--init_from) from another run or another program."""

from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from cs_lm.config.data import DataConfig
from cs_lm.config.presets import nearest_model_name
from cs_lm.config.run import RunConfig, named_run
from cs_lm.errors import UserError
from cs_lm.interop.import_weights import read_weights
from cs_lm.interop.tokenizers import read_tokenizer
from cs_lm.tokenizer import BPETokenizer
from cs_lm.training.checkpoint_manager import STATE
from cs_lm.training.run_dir import RunFolder, saved_config, stage_of


class Start(NamedTuple):
    """Weights and the tokenizer that they were trained with.

    base  default settings of the new run; only the model and special tokens come from the old one
    data  the text that the old run was trained on; None: unknown
    template  of conversations, if the old run was fine-tuned on them
    """

    base: RunConfig
    tokenizer: BPETokenizer
    weights: dict[str, Tensor]
    data: DataConfig | None = None
    template: str | None = None


def read_start(path: str | Path, flag: str = "--init_from") -> Start:
    """From a run's folder (its best model), one of its checkpoints, or a folder of weights.

    Raises: UserError or FileNotFoundError for a path that is none of these or cannot be read.
    """
    path = Path(path)
    step = path.name.rpartition("-")[2]
    if (path / STATE).is_file() and path.parent.name == "checkpoints" and step.isdecimal():
        folder, which = RunFolder(path.parent.parent), step
    else:
        folder, which = RunFolder(path), "best"
    if folder.exists():
        content = folder.read(which)
        tokenizer = folder.load_tokenizer()
        folder.check_tokenizer(content, tokenizer)
        if stage_of(content) == "reward":
            raise UserError(f"{flag}: {str(path)!r} is a reward model, need a language model")
        saved = saved_config(content)
        base = _base(saved.model_name, saved.model, tokenizer)
        template = content["extras"].get("template")
        return Start(base, tokenizer, content["model"], saved.data, template)
    if not path.exists():
        raise UserError(
            f"{flag}: got {str(path)!r}, which is not there; need the folder of a run, one of "
            "its checkpoints, or a folder with weights"
        )
    try:
        model = read_weights(path)
    except (UserError, FileNotFoundError) as error:
        what = str(error).removeprefix("weights: ")
        raise type(error)(f"{flag}: got {str(path)!r}, which is no run: {what}") from None
    tokenizer = read_tokenizer(path if path.is_dir() else path.parent)
    base = _base(nearest_model_name(model.config), model.config, tokenizer)
    return Start(base, tokenizer, model.state_dict())


def _base(model_name: str, model: Any, tokenizer: BPETokenizer) -> RunConfig:
    base = named_run(model_name)
    return replace(
        base,
        model=model,
        data=DataConfig(special_tokens=tuple(tokenizer.special_tokens)),
        seq_length=min(base.seq_length, model.context_length),
    )
