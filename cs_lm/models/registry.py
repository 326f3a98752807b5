"""The models that a run can train, by their configs."""

import torch

from cs_lm.config.run import GPT2Config, ModelConfig
from cs_lm.models.base import LanguageModel
from cs_lm.models.gpt2 import GPT2LM
from cs_lm.models.transformer import TransformerLM
from cs_lm.ops.fused import FAST
from cs_lm.ops.reference import Ops

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
