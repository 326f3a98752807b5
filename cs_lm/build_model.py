"""The models that a run can train, by their configs."""

import torch

from cs_lm.config import GPT2Config, ModelConfig
from cs_lm.fast_ops import FAST
from cs_lm.gpt2 import GPT2LM
from cs_lm.language_model import LanguageModel
from cs_lm.model import TransformerLM
from cs_lm.ops import Ops

_CLASSES = {ModelConfig: TransformerLM, GPT2Config: GPT2LM}


def build_model(
    config: ModelConfig | GPT2Config,
    ops: Ops = FAST,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
    activation_checkpointing: bool = False,
) -> LanguageModel:
    """See `TransformerLM` and `GPT2LM`."""
    return _CLASSES[type(config)](config, ops, generator, device, activation_checkpointing)
