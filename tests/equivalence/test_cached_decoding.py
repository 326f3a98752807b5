"""Generation with the cache, in ragged batches and past the context, beside the naive way."""

import pytest
import torch

from cs_lm.config import ModelConfig
from cs_lm.decoding import DecodingConfig, generate
from cs_lm.fast_ops import FAST
from cs_lm.kv_cache import KVCache
from cs_lm.model import TransformerLM, new_cache
from cs_lm.ops import CLEAR
from tests.tolerances import DEEP, close

CONTEXT, V = 11, 17


@pytest.fixture(params=[CLEAR, FAST], ids=["clear", "fast"])
def model(request):
    config = ModelConfig(12, 3, 20, V, 2, CONTEXT)
    model = TransformerLM(config, request.param, torch.Generator().manual_seed(4)).double()
    model.rope.cos, model.rope.sin = model.rope.cos.double(), model.rope.sin.double()
    return model


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
