import gzip
import math

import numpy as np
import pytest
import torch

from cs_lm.config.model import ModelConfig
from cs_lm.data.token_store import ArrayTokens
from cs_lm.evaluation.perplexity import (
    EvalOptions,
    evaluate,
    evaluation_starts,
    gzip_bits_per_byte,
    token_byte_lengths,
)
from cs_lm.models.transformer import TransformerLM

V, T = 17, 5
VOCAB = {i: b"x" * (1 + i % 3) for i in range(V)}
IDS = np.random.default_rng(0).integers(0, V, 58)
BYTES = sum(len(VOCAB[i]) for i in IDS[1:].tolist())


@pytest.fixture
def model(generator):
    return TransformerLM(ModelConfig(12, 3, 20, V, 2, 11), generator=generator)


def score(model, batch_size=4, max_tokens=None, seq_length=T):
    lengths = token_byte_lengths(VOCAB)
    return evaluate(
        model, ArrayTokens(IDS), lengths, EvalOptions(seq_length, batch_size, max_tokens)
    )


def test_uniform_scores_by_hand(model):
    with torch.no_grad():
        model.lm_head.weight.zero_()
    result = score(model)
    assert result.num_tokens == len(IDS) - 1 and result.num_bytes == BYTES
    assert result.loss_nats == pytest.approx(math.log(V), rel=1e-6)
    assert result.perplexity == pytest.approx(V, rel=1e-5)
    assert result.bits_per_byte == pytest.approx(math.log2(V) * 57 / BYTES, rel=1e-6)


@pytest.mark.parametrize("max_tokens", [None, 20])
def test_same_number_for_any_batch_size(model, max_tokens):
    results = [score(model, batch_size, max_tokens) for batch_size in (1, 3, 12, 100)]
    assert len({(r.num_tokens, r.num_bytes) for r in results}) == 1
    for result in results:
        assert result.loss_nats == pytest.approx(results[0].loss_nats, rel=1e-6)


def test_equals_one_window_at_a_time(model):
    total = 0.0
    for start in range(0, 57, T):
        row = torch.from_numpy(IDS[start : start + T + 1])
        scores = torch.log_softmax(model(row[:-1]).detach(), -1)
        total -= scores.gather(-1, row[1:, None]).sum().item()
    assert score(model).loss_sum_nats == pytest.approx(total, rel=1e-5)


@pytest.mark.parametrize("training", [True, False])
def test_mode_is_restored_and_nothing_learns(model, training):
    model.train(training)
    score(model)
    assert model.training is training
    assert all(p.grad is None for p in model.parameters())


def test_starts_are_fixed_and_spread():
    assert evaluation_starts(58, 5, None) == list(range(0, 57, 5))
    assert evaluation_starts(101, 5, 20) == [0, 25, 50, 75]
    assert evaluation_starts(101, 5, 1) == [0]
    with pytest.raises(ValueError, match="validation: got 1 tokens, need at least 2"):
        evaluation_starts(1, 5, None)


def test_gzip_is_gzip():
    text = b"".join(VOCAB[i] for i in IDS[1:].tolist())
    expected = 8 * len(gzip.compress(text, 9)) / len(text)
    assert gzip_bits_per_byte(ArrayTokens(IDS), VOCAB, T) == pytest.approx(expected)
    assert gzip_bits_per_byte(ArrayTokens(IDS), VOCAB, T, 20) > expected  # less text, less to learn
