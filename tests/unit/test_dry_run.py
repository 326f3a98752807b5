"""What a dry run says of memory, beside what a forward pass keeps."""

import pytest
import torch

from cs_lm.config.model import GPT2Config, ModelConfig
from cs_lm.config.run import RunConfig
from cs_lm.data.batches import Batch
from cs_lm.models.base import LanguageModel, next_token_loss
from cs_lm.models.registry import build_model
from cs_lm.models.stats import num_parameters
from cs_lm.ops.fused import OPS
from cs_lm.training.estimate import memory_bytes
from cs_lm.training.step import autocast_context

B, T = 3, 64
MODELS = {
    "transformer": ModelConfig(64, 4, 160, 300, 3, T),
    "gpt2-small": GPT2Config(64, 4, 160, 300, 3, T, drop_rate=0.0),
    "gpt2 with dropout": GPT2Config(64, 4, 160, 300, 3, T, drop_rate=0.1),
}
MODEL = MODELS["transformer"]


def kept_bytes(model: LanguageModel, dtype: str) -> int:
    """Memory of all that autograd keeps after a forward pass, the weights left out."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def keep(tensor):
        memory = tensor.untyped_storage()
        if memory.data_ptr() not in weights:
            kept[memory.data_ptr()] = memory  # held, so that no other takes its place
        return tensor

    ids = torch.zeros(B, T, dtype=torch.int64)
    counted = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    with counted, autocast_context(torch.device("cpu"), dtype):
        next_token_loss(model, Batch(ids, ids))
    return sum(memory.nbytes() for memory in kept.values())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("ops", OPS)
@pytest.mark.parametrize("name", MODELS)
def test_memory_is_what_a_forward_pass_keeps(name, ops, dtype):
    model = MODELS[name]
    config = RunConfig(model, seq_length=T, batch_size=B, ops=ops, dtype=dtype)
    estimate = memory_bytes(config) - 16 * num_parameters(model)
    counted = kept_bytes(build_model(model, OPS[ops]), dtype)
    head = 8 * model.vocab_size * model.d_model  # the head's gradient, kept by the fast loss
    assert estimate == pytest.approx(counted, abs=0.15 * counted + head)


def test_activation_checkpointing_is_in_the_estimate():
    plain = memory_bytes(RunConfig(MODEL, seq_length=T, batch_size=B))
    checkpointing = RunConfig(MODEL, seq_length=T, batch_size=B, activation_checkpointing=True)
    assert memory_bytes(checkpointing) < plain
