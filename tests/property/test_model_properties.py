"""What must hold for any tokens: no look ahead, rows apart, filters and samplers exact."""

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cs_lm.config.model import ModelConfig
from cs_lm.data.batches import sample_windows, shuffle_windows
from cs_lm.data.token_store import ArrayTokens
from cs_lm.inference.filters import top_k_logits, top_p_logits
from cs_lm.models.transformer import TransformerLM
from cs_lm.ops.fused import FAST
from cs_lm.ops.reference import CLEAR

V, CONTEXT = 17, 11
MODELS = [
    TransformerLM(
        ModelConfig(12, 3, 20, V, 2, CONTEXT), ops, generator=torch.Generator().manual_seed(0)
    )
    .double()
    .requires_grad_(False)
    for ops in (CLEAR, FAST)
]
for model in MODELS:
    model.rope.cos, model.rope.sin = model.rope.cos.double(), model.rope.sin.double()

ids = st.integers(0, V - 1)
rows = st.lists(ids, min_size=2, max_size=CONTEXT)
score_rows = st.lists(st.floats(-20, 20, width=32), min_size=1, max_size=40)


@given(rows, st.data())
@settings(max_examples=50)
def test_no_position_sees_a_later_one(row, data):
    cut = data.draw(st.integers(1, len(row) - 1))
    changed = row[:cut] + data.draw(st.lists(ids, min_size=len(row) - cut, max_size=len(row) - cut))
    for model in MODELS:
        first, second = model(torch.tensor([row]))[0, :cut], model(torch.tensor([changed]))[0, :cut]
        torch.testing.assert_close(first, second, rtol=1e-12, atol=1e-12)


@given(st.lists(st.lists(ids, min_size=5, max_size=5), min_size=2, max_size=4))
@settings(max_examples=50)
def test_rows_of_a_batch_do_not_see_each_other(batch):
    for model in MODELS:
        together = model(torch.tensor(batch))
        for row, scores in zip(batch, together):
            torch.testing.assert_close(model(torch.tensor([row]))[0], scores, rtol=1e-9, atol=1e-9)


@given(score_rows, st.floats(0.01, 1.0))
def test_top_p_keeps_the_smallest_set_that_has_the_mass(scores, p):
    scores = torch.tensor(scores, dtype=torch.float64)
    kept = top_p_logits(scores, p)
    is_kept = kept.isfinite()
    probabilities = torch.softmax(scores, -1)
    mass = probabilities[is_kept].sum().item()
    assert mass >= p - 1e-9
    assert torch.equal(kept[is_kept], scores[is_kept]), "kept scores are untouched"
    if not is_kept.all():
        assert scores[is_kept].min() >= scores[~is_kept].max(), "the likeliest ones"
    if is_kept.sum() > 1:
        assert mass - probabilities[is_kept].min().item() < p + 1e-9, "none too many"


@given(score_rows, st.integers(1, 50))
def test_top_k_keeps_k(scores, k):
    scores = torch.tensor(scores)
    is_kept = top_k_logits(scores, k).isfinite()
    assert is_kept.sum() == min(k, len(scores))
    if not is_kept.all():
        assert scores[is_kept].min() >= scores[~is_kept].max()


@given(st.integers(2, 400), st.integers(1, 12), st.integers(1, 9), st.integers(0, 2**31))
def test_epoch_sampler_covers_every_window_once(num_tokens, seq_length, batch_size, seed):
    if num_tokens <= seq_length:
        return
    tokens = ArrayTokens(np.arange(num_tokens))
    num_windows = (num_tokens - 1) // seq_length
    starts = shuffle_windows(tokens, batch_size, seq_length, seed)
    num_batches = -(-2 * num_windows // batch_size)
    drawn = np.concatenate([starts(i) for i in range(num_batches)])
    for epoch in (drawn[:num_windows], drawn[num_windows : 2 * num_windows]):
        assert sorted(epoch.tolist()) == [i * seq_length for i in range(num_windows)]
    assert drawn.max() + seq_length + 1 <= num_tokens


@given(st.integers(2, 60), st.integers(1, 12), st.integers(0, 2**31))
def test_random_sampler_reaches_every_window_and_no_other(num_tokens, seq_length, seed):
    if num_tokens <= seq_length:
        return
    starts = sample_windows(ArrayTokens(np.arange(num_tokens)), 2000, seq_length, seed)
    assert set(starts(3).tolist()) == set(range(num_tokens - seq_length))
