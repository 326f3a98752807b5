import gzip
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from cs_lm.config.model import ModelConfig
from cs_lm.data.token_store import ArrayTokens
from cs_lm.evaluation.perplexity import (
    EvalOptions,
    evaluate,
    evaluation_windows,
    gzip_bits_per_byte,
    token_byte_lengths,
)
from cs_lm.evaluation.scoring import TokenScore, score_tokens, summary
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


def test_windows_are_fixed_and_spread():
    def starts(*arguments):
        return [window.start for window in evaluation_windows(*arguments)]

    assert starts(58, 5, None) == list(range(0, 57, 5))
    assert starts(101, 5, 20) == [0, 25, 50, 75]
    assert starts(101, 5, 1) == [0]
    with pytest.raises(ValueError, match="validation: got 1 tokens, need at least 2"):
        evaluation_windows(1, 5)


@pytest.mark.parametrize("stride", [1, 2, 3, 5])
@pytest.mark.parametrize("num_tokens", [2, 5, 6, 7, 58])
def test_strided_windows_predict_every_token_once(num_tokens, stride):
    found = [
        (target, target - window.start)
        for window in evaluation_windows(num_tokens, T, None, stride)
        for target in range(window.start + 1 + window.num_old, window.end)
    ]
    assert [target for target, _ in found] == list(range(1, num_tokens))
    assert all(context >= min(target, T - stride + 1) for target, context in found)


def sliding_window(model, max_length, stride):
    """The well-known loop: windows of max_length tokens, only their new tokens count."""
    ids, total, count, previous = torch.from_numpy(IDS), 0.0, 0, 0
    for begin in range(0, len(ids), stride):
        end = min(begin + max_length, len(ids))
        targets = ids[begin:end].clone()
        targets[: len(targets) - (end - previous)] = -100
        logits = model(ids[begin : end - 1]).detach()
        total += F.cross_entropy(logits, targets[1:], ignore_index=-100, reduction="sum").item()
        count, previous = count + int((targets[1:] != -100).sum()), end
        if end == len(ids):
            break
    return total, count


@pytest.mark.parametrize("stride", [1, 2, 4, 5])
def test_stride_is_the_well_known_sliding_window(model, stride):
    options = EvalOptions(T, 3, None, stride)
    result = evaluate(model, ArrayTokens(IDS), token_byte_lengths(VOCAB), options)
    total, count = sliding_window(model, T + 1, stride)
    assert result.num_tokens == count == len(IDS) - 1 and result.num_bytes == BYTES
    assert result.loss_sum_nats == pytest.approx(total, rel=1e-5)


def test_scores_of_tokens_are_those_of_the_model(model):
    """In the context, and beyond it: each token sees at least half a context."""
    short = [int(i) for i in IDS[:8]]
    scores = score_tokens(model, short, 3)
    with torch.no_grad():
        log_probs = model(torch.tensor([short]))[0].log_softmax(-1)
    assert scores[0] == TokenScore(short[0], None, None, [])
    for t, score in enumerate(scores[1:]):
        row = log_probs[t]
        assert score.token_id == short[t + 1]
        assert score.nats == pytest.approx(-float(row[short[t + 1]]), abs=1e-5)
        assert score.rank == int((row > row[short[t + 1]]).sum())
        assert [i for i, _ in score.alternatives] == row.topk(3).indices.tolist()
    every = score_tokens(model, IDS.tolist())
    assert [score.token_id for score in every] == IDS.tolist()
    options = EvalOptions(11, 4, None, 5)
    wanted = evaluate(model, ArrayTokens(IDS), token_byte_lengths(VOCAB), options)
    total = summary(every, VOCAB)
    assert total.loss_nats == pytest.approx(wanted.loss_nats, rel=1e-5)
    assert total.bits_per_byte == pytest.approx(wanted.bits_per_byte, rel=1e-5)
    assert score_tokens(model, []) == [] and len(score_tokens(model, [3])) == 1


def test_gzip_is_gzip():
    text = b"".join(VOCAB[i] for i in IDS[1:].tolist())
    expected = 8 * len(gzip.compress(text, 9)) / len(text)
    assert gzip_bits_per_byte(ArrayTokens(IDS), VOCAB, T) == pytest.approx(expected)
    assert gzip_bits_per_byte(ArrayTokens(IDS), VOCAB, T, 20) > expected  # less text, less to learn
