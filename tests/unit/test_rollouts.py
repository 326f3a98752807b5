"""Rollouts: rows that have ended leave the batch, and change nothing for the others."""

import pytest
import torch

from cs_lm.alignment.rollouts import draw_answers
from cs_lm.config.model import GPT2Config, ModelConfig
from cs_lm.inference.sampling import uniform_draws
from cs_lm.models.registry import build_model

SHAPE = {"vocab_size": 7, "context_length": 40, "d_model": 16, "num_layers": 2, "num_heads": 2}
NUM, NEW, END, NO_END = 24, 20, 3, 1 << 20


@pytest.mark.parametrize("config", [ModelConfig(d_ff=24, **SHAPE), GPT2Config(d_ff=24, **SHAPE)])
def test_rows_that_leave_the_batch_change_nothing(config):
    """Of 7 tokens one is the end: half of the rows leave after some tokens, and again."""
    model = build_model(config, generator=torch.Generator().manual_seed(0)).eval()
    prompts = [[1 + n % 2] * (1 + n % 5) for n in range(NUM)]
    uniform = uniform_draws(5, range(NUM), NEW)
    whole = draw_answers(model, prompts, NO_END, uniform)
    found = draw_answers(model, prompts, END, uniform)
    lengths = set()
    for number, prompt in enumerate(prompts):
        ids = whole.token_ids[number, len(prompt) : len(prompt) + NEW].tolist()
        count = ids.index(END) + 1 if END in ids else NEW
        lengths.add(count)
        first = len(prompt)
        assert found.token_ids[number, first : first + count].tolist() == ids[:count]
        assert found.ended[number] == (END in ids) and found.lengths[number] == count
        place = slice(first - 1, first - 1 + count)
        wanted = whole.log_probs[number, place]
        torch.testing.assert_close(found.log_probs[number, place], wanted, rtol=1e-4, atol=1e-5)
    assert len(lengths) > 5 and min(lengths) <= 4
