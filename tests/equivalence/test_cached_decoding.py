"""Generation with the cache, in ragged batches and past the context, beside the naive way."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from cs_lm.config.model import GPT2Config, ModelConfig
from cs_lm.inference.decoding_config import DecodingConfig
from cs_lm.inference.generate import generate
from cs_lm.models.base import cast_weights, new_cache
from cs_lm.models.kv_cache import KVCache
from cs_lm.models.registry import build_model
from cs_lm.models.transformer import TransformerLM
from cs_lm.ops.fused import FAST
from cs_lm.ops.reference import CLEAR
from tests.tolerances import DEEP, close

CONTEXT, V = 11, 17


@pytest.fixture(
    params=[(CLEAR, ModelConfig), (FAST, ModelConfig), (FAST, GPT2Config)],
    ids=["clear", "fast", "gpt2"],
)
def model(request):
    ops, kind = request.param
    config = kind(12, 3, 20, V, 2, CONTEXT)
    model = build_model(config, ops, generator=torch.Generator().manual_seed(4)).double()
    for parameter in model.parameters():  # larger than at the start, that the scores differ
        if kind is GPT2Config and parameter.dim() > 1:
            parameter.data *= 10
    if kind is ModelConfig:
        model.rope.cos, model.rope.sin = model.rope.cos.double(), model.rope.sin.double()
        return model
    return model.eval()


@torch.no_grad()
def naive(model, prompt, num_tokens, slide=1):
    """No cache, no batch: the window is computed anew for every token."""
    row, start = list(prompt), max(0, len(prompt) - CONTEXT)
    for _ in range(num_tokens):
        if len(row) - start > CONTEXT:
            start = len(row) - (CONTEXT - slide + 1)
        row.append(int(model(torch.tensor([row[start:]]))[0, -1].argmax()))
    return row[len(prompt) :]


@torch.no_grad()
def test_cache_gives_the_same_scores(model, generator):
    ids = torch.randint(0, V, (2, CONTEXT), generator=generator)
    expected = model(ids)
    cache = new_cache(model, 2, CONTEXT)
    assert isinstance(cache, KVCache)
    parts = [model(ids[:, a:b], cache=cache) for a, b in [(0, 4), (4, 5), (5, 9), (9, CONTEXT)]]
    close(torch.cat(parts, 1), expected, DEEP)


@pytest.mark.parametrize("slide", [1, 4, 99])
@pytest.mark.parametrize("length", [1, 3, CONTEXT - 1, CONTEXT, CONTEXT + 7])
def test_generation_is_the_naive_one(model, length, slide, generator):
    prompt = torch.randint(0, V, (length,), generator=generator).tolist()
    config = DecodingConfig(temperature=0, max_new_tokens=2 * CONTEXT, slide=slide)
    slide = min(slide, CONTEXT)
    assert generate(model, [prompt], config) == [naive(model, prompt, 2 * CONTEXT, slide)]


def test_rows_of_a_ragged_batch_do_not_see_each_other(model, generator):
    prompts = [
        torch.randint(0, V, (length,), generator=generator).tolist()
        for length in (1, 9, 4, CONTEXT, CONTEXT + 3)
    ]
    config = DecodingConfig(temperature=0, max_new_tokens=2 * CONTEXT)
    together = generate(model, prompts, config)
    assert together == [naive(model, prompt, 2 * CONTEXT) for prompt in prompts]


class LargestNew(TorchDispatchMode):
    """Notes how many numbers the largest tensor has that an operation makes in new memory."""

    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            memory = result.untyped_storage().data_ptr()
            given = [x for x in args if isinstance(x, torch.Tensor)]
            if all(x.untyped_storage().data_ptr() != memory for x in given):
                self.numel = max(self.numel, result.numel())
        return result


@pytest.mark.parametrize("ops", [CLEAR, FAST], ids=["clear", "fast"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("batch_size", [1, 2])
@torch.no_grad()
def test_a_step_copies_nothing_of_the_cache(batch_size, dtype, ops):
    length = 60
    config = ModelConfig(12, 3, 20, V, 2, 80)
    model = cast_weights(
        TransformerLM(config, ops, generator=torch.Generator().manual_seed(4)), dtype
    )
    cache = new_cache(model, batch_size, 80)
    model(torch.ones(batch_size, length, dtype=torch.int64), cache=cache)
    with LargestNew() as largest:
        model(torch.ones(batch_size, 1, dtype=torch.int64), cache=cache)
    num_scores = batch_size * config.num_heads * (length + 1)
    assert largest.numel == num_scores < batch_size * config.d_model * length


@torch.no_grad()
def test_bfloat16_weights_give_nearly_the_same_scores(generator):
    ids = torch.randint(0, V, (2, CONTEXT), generator=generator)
    config = ModelConfig(12, 3, 20, V, 2, CONTEXT)
    model = TransformerLM(config, FAST, generator=torch.Generator().manual_seed(4))
    expected = model(ids)
    cast_weights(model, torch.bfloat16)
    assert model.rope.cos.dtype == torch.float32, "positions stay exact"
    cache = new_cache(model, 2, CONTEXT)
    scores = torch.cat([model(ids[:, t : t + 1], cache=cache) for t in range(CONTEXT)], 1)
    assert scores.dtype == torch.bfloat16
    close(scores.float(), expected, DEEP, torch.bfloat16)
