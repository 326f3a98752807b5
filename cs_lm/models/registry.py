"""The architectures that a run can train, by their name in the config.

A new architecture is a config class (config/model.py), a model class, and one entry here. The
names of its tensors in other programs are an entry of interop/tensor_mapping.py.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch

from cs_lm.config.model import ArchitectureConfig
from cs_lm.models.base import FinishLayer, LanguageModel, leave_it
from cs_lm.models.gpt2 import GPT2LM
from cs_lm.models.transformer import TransformerLM
from cs_lm.models.weight_counts import WeightCounts, count_gpt2, count_transformer
from cs_lm.ops.fused import FAST
from cs_lm.ops.reference import Ops


class SavedActivations(NamedTuple):
    """Floats (4 bytes) that forward keeps for backward, counted with saved_tensors_hooks.

    For each layer and position: multiples of D, of F and of H * T. For each position: of V.
    """

    of_d_model: float
    of_d_ff: float
    of_heads_and_keys: float
    of_vocab: float


class Architecture(NamedTuple):
    """An entry of the registry.

    model              its class, which is called with the arguments of `build_model`
    count_weights      maps a config to its `WeightCounts`
    saved_activations  for the names of the ops and of the dtype of a run
    """

    model: type[LanguageModel]
    count_weights: Callable[..., WeightCounts]
    saved_activations: Mapping[tuple[str, str], SavedActivations]


ARCHITECTURES = {
    "transformer": Architecture(
        TransformerLM,
        count_transformer,
        {
            ("fast", "float32"): SavedActivations(6, 2, 0, 0),
            ("fast", "bfloat16"): SavedActivations(4, 1, 0, 0),
            ("clear", "float32"): SavedActivations(10, 5, 2, 2),
            ("clear", "bfloat16"): SavedActivations(9, 3, 1.5, 1.5),
        },
    ),
    "gpt2": Architecture(
        GPT2LM,
        count_gpt2,
        {
            ("fast", "float32"): SavedActivations(8, 2, 0, 0),
            ("fast", "bfloat16"): SavedActivations(5, 1, 0, 0),
            ("clear", "float32"): SavedActivations(10, 7, 2, 2),
            ("clear", "bfloat16"): SavedActivations(8, 3.5, 1.5, 1.5),
        },
    ),
}


def build_model(
    config: ArchitectureConfig,
    ops: Ops = FAST,
    *,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
    activation_checkpointing: bool = False,
    finish_layer: FinishLayer = leave_it,
) -> LanguageModel:
    """A model with new weights; see `TransformerLM` and `GPT2LM`."""
    model_class = ARCHITECTURES[config.architecture].model
    # an architecture that cannot be made layer by layer need not know of it
    more = {} if finish_layer is leave_it else {"finish_layer": finish_layer}
    return model_class(
        config,
        ops,
        generator=generator,
        device=device,
        activation_checkpointing=activation_checkpointing,
        **more,
    )
