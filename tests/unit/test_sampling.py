"""The filters that `transformers` lacks, the draw, log-probabilities, samples and best-of."""

import math

import pytest
import torch

from cs_lm.config.model import ModelConfig
from cs_lm.inference.decoding_config import DecodingConfig
from cs_lm.inference.filters import count_penalty_logits, no_repeat_ngram_logits
from cs_lm.inference.generate import generate, generate_samples
from cs_lm.inference.sampling import (
    NOT_A_NUMBER,
    NOTHING_ALLOWED,
    History,
    NotANumberError,
    draw,
    sample_tokens,
    token_logprobs,
    uniform_draws,
)
from cs_lm.inference.text import complete
from cs_lm.models.transformer import TransformerLM
from cs_lm.tokenizer import BPETokenizer

INF, V = math.inf, 17
BYTES = BPETokenizer({i: bytes([i]) for i in range(256)}, [], ["<|end|>"])


@pytest.fixture(scope="module")
def model():
    config = ModelConfig(12, 3, 20, 260, 2, 32)
    model = TransformerLM(config, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        model.lm_head.weight *= 8  # a clear preference
    return model


def test_count_penalties_by_hand():
    """Token 0 occurs three times, token 2 once, token 1 never."""
    ids = torch.tensor([[0, 2, 0, 0]])
    assert count_penalty_logits(torch.zeros(1, 3), ids, 0.5, 0.25).tolist() == [[-1.75, 0, -0.75]]
    assert count_penalty_logits(torch.ones(1, 3), ids[:, :0], 0.5, 0.25).tolist() == [[1, 1, 1]]


def test_count_penalties_look_at_the_sample_alone(model):
    prompt = [5, 6, 7]
    free = generate(model, [prompt], DecodingConfig(temperature=0, max_new_tokens=1))[0]
    config = DecodingConfig(temperature=0, max_new_tokens=30, presence_penalty=1e6)
    row = generate(model, [[*prompt, *free]], config)[0]
    assert len(set(row)) == 30, "no token twice"
    assert free[0] in generate(model, [[free[0]]], config)[0], "but one of the prompt once"


def test_ngrams_do_not_see_padding():
    """Row 1 is [4]: three columns of padding repeat it, and are no bigram (4, 4)."""
    ids = torch.tensor([[1, 2, 9, 1], [4, 4, 4, 4]])
    left = no_repeat_ngram_logits(torch.zeros(2, 10), ids, 2, torch.tensor([0, 3]))
    assert (left == -INF).nonzero().tolist() == [[0, 2]]
    assert no_repeat_ngram_logits(torch.zeros(2, 10), ids, 9, torch.tensor([0, 3])).eq(0).all()


def test_no_ngram_comes_twice(model):
    config = DecodingConfig(temperature=0, max_new_tokens=60, no_repeat_ngram=2)
    for row in generate(model, [[1, 2], [3]], config):
        pairs = list(zip(row, row[1:]))
        assert len(set(pairs)) == len(pairs)


def test_draw_takes_each_place_with_its_probability():
    """The cumulative probabilities are 0.1, 0.1, 0.6, 1: place 1 has none."""
    logits = torch.tensor([0.1, 0.0, 0.5, 0.4]).log()
    for uniform, place in [(0.0, 0), (0.0999, 0), (0.1001, 2), (0.5999, 2), (0.6001, 3)]:
        assert draw(logits, torch.tensor(uniform, dtype=torch.float64)) == place
    largest = torch.tensor(1 - 2**-53, dtype=torch.float64)
    assert draw(logits, largest) == 3 and draw(torch.zeros(50_257), largest) == 50_256
    assert draw(torch.tensor([0.0, -INF]), largest) == 0
    many = torch.rand(40_000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    counts = draw(logits.expand(40_000, 4), many).bincount(minlength=4)
    assert (counts / 40_000 - logits.exp()).abs().max() < 0.01


def test_draws_follow_from_seed_and_row():
    draws = uniform_draws(3, [0, 1, 2], 40)
    assert torch.equal(uniform_draws(3, [2], 25)[0], draws[2, :25])
    assert draws.unique().numel() == 120 and not torch.equal(uniform_draws(4, [0], 40)[0], draws[0])


def test_a_row_is_the_same_whatever_its_neighbours_are(model):
    config = DecodingConfig(max_new_tokens=20, temperature=1.3, top_p=0.9, seed=8)
    together = generate(model, [[1], [2, 3, 4], [5, 6]], config)
    assert generate(model, [[1]], config) == together[:1]
    assert generate(model, [[1], [9, 9]], config)[0] == together[0]
    assert generate(model, [[9] * 7, [2, 3, 4]], config)[1] == together[1]


def test_samples_are_rows_of_their_own(model):
    """Read once, and copied: the same as a prompt given several times."""
    config = DecodingConfig(max_new_tokens=20, temperature=1.0, num_samples=3, seed=4)
    one = DecodingConfig(max_new_tokens=20, temperature=1.0, seed=4)
    prompts = [[1, 2, 3], [7]]
    assert generate(model, prompts, config) == generate(
        model, [p for p in prompts for _ in range(3)], one
    )


def test_logprobs_are_those_of_the_model(model):
    config = DecodingConfig(max_new_tokens=6, temperature=0.5, top_k=3, num_alternatives=2)
    (sample,) = generate_samples(model, [[1, 2]], config)
    ids = torch.tensor([[1, 2, *sample.token_ids]])
    with torch.no_grad():
        expected = model(ids)[0].log_softmax(-1)
    for i, token_id in enumerate(sample.token_ids):
        assert sample.logprobs[i] == pytest.approx(float(expected[1 + i, token_id]), abs=1e-4)
        best = expected[1 + i].topk(2)
        assert [i for i, _ in sample.alternatives[i]] == best.indices.tolist()
        assert [p for _, p in sample.alternatives[i]] == pytest.approx(
            best.values.tolist(), abs=1e-4
        )
    (plain,) = generate_samples(model, [[1, 2]], DecodingConfig(max_new_tokens=2))
    assert plain.logprobs == plain.alternatives == []
    assert token_logprobs(torch.zeros(1, 4), torch.tensor([2]), 9).top.shape == (1, 4)


def test_best_of_keeps_the_most_likely_samples(model):
    settings = {"max_new_tokens": 8, "temperature": 1.0, "seed": 1}
    every = generate_samples(
        model, [[1, 2], [3]], DecodingConfig(**settings, num_samples=5, num_alternatives=0)
    )
    best = generate_samples(
        model, [[1, 2], [3]], DecodingConfig(**settings, num_samples=2, best_of=5)
    )
    for prompt in range(2):
        group = sorted(every[5 * prompt : 5 * prompt + 5], key=lambda s: -s.mean_logprob)
        assert [s.token_ids for s in best[2 * prompt : 2 * prompt + 2]] == [
            s.token_ids for s in group[:2]
        ]


def test_nothing_allowed_and_no_numbers():
    logits = torch.zeros(4, V)
    logits[1] = -INF
    logits[2, 5] = math.nan
    logits[3, 2] = INF
    history = History(torch.zeros(4, 1, dtype=torch.int64), torch.zeros(4, dtype=torch.int64), 1)
    for settings in ({"temperature": 0.0}, {}, {"top_k": 3}, {"top_p": 0.5}, {"typical_p": 0.5}):
        found = sample_tokens(logits, history, DecodingConfig(**settings), torch.full((4,), 0.5))
        assert found[0] >= 0
        assert found[1:].tolist() == [NOTHING_ALLOWED, NOT_A_NUMBER, NOT_A_NUMBER], settings


def test_a_row_without_a_token_left_ends(model):
    """Four allowed tokens make sixteen pairs; then a new pair would be needed."""
    allowed = torch.zeros(260, dtype=torch.bool)
    allowed[:4] = True
    config = DecodingConfig(max_new_tokens=50, temperature=1.0, no_repeat_ngram=1)
    (sample,) = generate_samples(model, [[9]], config, allowed=allowed)
    assert sorted(sample.token_ids) == [0, 1, 2, 3] and sample.stopped


def test_logits_that_are_not_numbers_are_an_error(model):
    with torch.no_grad():
        saved = model.ln_final.weight.clone()
        model.ln_final.weight[0] = math.nan
    for settings in ({}, {"temperature": 0.0}, {"temperature": 0.0, "num_beams": 2}):
        with pytest.raises(NotANumberError, match="are not numbers"):
            generate(model, [[1]], DecodingConfig(**settings))
    with torch.no_grad():
        model.ln_final.weight.copy_(saved)


def test_allowed_characters(model):
    config = DecodingConfig(
        max_new_tokens=9, temperature=3.0, allowed_characters="0123 ", num_samples=9
    )
    samples = complete(model, BYTES, ["a"], config)
    assert {c for found in samples for c in found.text} == set("0123 ")
    for found in samples:
        assert found.finish_reason == ("stop" if len(found.sample.token_ids) < 9 else "length")
    with pytest.raises(ValueError, match="--allowed_characters: got 'é', need characters of which"):
        complete(model, BYTES, ["a"], DecodingConfig(allowed_characters="é"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"min_p": 0.0}, "--min_p: got 0.0, need above 0, at most 1"),
        ({"typical_p": 1.5}, "--typical_p: got 1.5"),
        ({"no_repeat_ngram": 0}, "--no_repeat_ngram: got 0, need 1 or more"),
        ({"frequency_penalty": INF}, "--frequency_penalty: got inf, need a finite number"),
        ({"presence_penalty": math.nan}, "--presence_penalty: got nan"),
        ({"allowed_characters": ""}, "--allowed_characters: got , need at least one character"),
        ({"num_beams": 2}, "--num_beams: got 2, need --temperature 0 with it"),
        ({"length_penalty": 2.0}, "--length_penalty: has no effect without --num_beams"),
        ({"temperature": 0.0, "min_p": 0.1}, "--min_p: has no effect at --temperature 0"),
        ({"temperature": 0.0, "best_of": 3}, "--best_of: all samples are the same"),
        ({"num_samples": 3, "best_of": 2}, r"--best_of: got 2, need at least --num_samples \(3\)"),
        (
            {"temperature": 0.0, "num_beams": 2, "num_samples": 3},
            r"--num_samples: got 3, need at most --num_beams \(2\)",
        ),
        (
            {"temperature": 0.0, "num_beams": 2, "num_alternatives": 1},
            "--num_alternatives: has no effect with --num_beams",
        ),
        ({"num_alternatives": -1}, "--num_alternatives: got -1, need 0 or more"),
    ],
)
def test_settings_that_cannot_be(model, settings, message):
    with pytest.raises(ValueError, match=message):
        generate(model, [[1]], DecodingConfig(**settings))
