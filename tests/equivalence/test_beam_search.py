"""Beam search beside greedy search, exhaustive search and `transformers`."""

import itertools

import pytest
import torch

from cs_lm.config.model import GPT2Config, ModelConfig
from cs_lm.inference.beam_search import beam_search, slots_for
from cs_lm.inference.decoding_config import DecodingConfig
from cs_lm.inference.generate import generate
from cs_lm.models.kv_cache import KVCache
from cs_lm.models.registry import build_model
from tests.reference.test_llama import CONFIG, llama_with_weights_of

V, END = 5, 4


def small_model(kind=ModelConfig, vocab_size=V, context=12, seed=3):
    config = kind(12, 3, 20, vocab_size, 2, context)
    model = build_model(config, generator=torch.Generator().manual_seed(seed)).eval()
    with torch.no_grad():
        model.output_embedding.mul_(12)  # clear preferences
    return model


def beams(model, prompts, stop=(END,), **settings):
    settings = {"temperature": 0.0, "max_new_tokens": 4, **settings}
    return beam_search(model, prompts, DecodingConfig(**settings), frozenset(stop))


@torch.no_grad()
def exhaustive(model, prompt, length, penalty, count):
    """The best texts of all that end at END, or have `length` tokens."""
    scored = []
    for size in range(1, length + 1):
        for ids in itertools.product(range(V), repeat=size):
            ends = ids[-1] == END
            if END in ids[:-1] or not (ends or size == length):
                continue
            log_probs = model(torch.tensor([[*prompt, *ids]]))[0].log_softmax(-1)
            total = sum(float(log_probs[len(prompt) - 1 + i, t]) for i, t in enumerate(ids))
            scored.append((total / size**penalty, list(ids[:-1] if ends else ids), ends))
    best = sorted(scored, key=lambda found: -found[0])[:count]
    return [(ids, ends) for _, ids, ends in best]


@pytest.mark.parametrize("penalty", [0.0, 1.0, 2.0, -1.0])
@pytest.mark.parametrize("kind", [ModelConfig, GPT2Config])
def test_many_beams_find_what_exhaustive_search_finds(kind, penalty):
    """125 beams hold every beginning of up to three tokens."""
    model = small_model(kind)
    found = beams(
        model, [[1, 2], [3]], num_beams=125, num_samples=6, max_new_tokens=3, length_penalty=penalty
    )
    for number, prompt in enumerate([[1, 2], [3]]):
        assert found[6 * number : 6 * number + 6] == exhaustive(model, prompt, 3, penalty, 6)


@pytest.mark.parametrize("length", [1, 3, 12, 15])
def test_one_beam_is_greedy(length):
    """Also past the context of 12 tokens."""
    model = small_model(vocab_size=17)
    prompts = [list(range(1, 1 + length)), [2]]
    config = DecodingConfig(temperature=0, max_new_tokens=20)
    found = [ids for ids, _ in beam_search(model, prompts, config, frozenset([END]))]
    assert found == generate(model, prompts, config, [END])


def test_prompts_of_a_batch_do_not_see_each_other():
    model = small_model(vocab_size=17, context=30)
    prompts = [[1], [2, 3, 4], [5, 6]]
    settings = {"num_beams": 4, "num_samples": 4, "max_new_tokens": 9}
    alone = [found for prompt in prompts for found in beams(model, [prompt], **settings)]
    assert beams(model, prompts, **settings) == alone


@pytest.mark.parametrize("penalty", [0.0, 0.6, 1.0, 2.0, -0.5])
@pytest.mark.parametrize("num_beams", [2, 3, 5])
def test_beams_are_those_of_transformers(num_beams, penalty):
    ours = build_model(CONFIG, generator=torch.Generator().manual_seed(num_beams)).eval()
    with torch.no_grad():
        ours.lm_head.weight.mul_(8)
    theirs = llama_with_weights_of(ours, bos_token_id=None, eos_token_id=7, pad_token_id=60)
    for prompt in ([1, 2, 3], [40], [9, 9, 8, 20]):
        for penalties in ({}, {"repetition_penalty": 1.5}, {"no_repeat_ngram": 2}):
            renamed = {k.replace("ngram", "ngram_size"): v for k, v in penalties.items()}
            expected = theirs.generate(
                torch.tensor([prompt]),
                attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
                max_new_tokens=10,
                num_beams=num_beams,
                num_return_sequences=num_beams,
                length_penalty=penalty,
                early_stopping="never",
                do_sample=False,
                **renamed,
            )
            found = beams(
                ours,
                [prompt],
                stop=[7],
                num_beams=num_beams,
                num_samples=num_beams,
                max_new_tokens=10,
                length_penalty=penalty,
                **penalties,
            )
            wanted = [row[len(prompt) :].tolist() for row in expected]
            wanted = [row[: row.index(7)] if 7 in row else row[:10] for row in wanted]
            assert [ids for ids, _ in found] == wanted


def test_children_stay_in_their_parents_row():
    parents = torch.tensor([[0, 0, 2, 2], [3, 1, 0, 2], [1, 1, 1, 1]])
    slots, is_copied = slots_for(parents)
    assert slots.sort(-1).values.tolist() == [[0, 1, 2, 3]] * 3
    assert slots[0].tolist() == [0, 1, 2, 3] and slots[1].tolist() == [3, 1, 0, 2]
    assert is_copied.sum(-1).tolist() == [2, 0, 3]
    assert (slots == parents)[~is_copied].all()


def test_only_rows_of_further_children_are_copied(monkeypatch):
    """A beam that has one child costs no copy of the cache."""
    copied = []
    copy_rows = KVCache.copy_rows

    def counted(cache, sources, targets):
        assert not set(sources.tolist()) & set(targets.tolist())
        copied.append(len(sources))
        copy_rows(cache, sources, targets)

    monkeypatch.setattr(KVCache, "copy_rows", counted)
    beams(small_model(vocab_size=17, context=30), [[1], [2]], num_beams=4, max_new_tokens=12)
    assert len(copied) >= 8 and max(copied[1:]) <= 6 and sum(copied) < 8 * len(copied)


def test_a_beam_that_cannot_go_on_is_not_shown():
    model = small_model()
    allowed = torch.zeros(V, dtype=torch.bool)
    allowed[[0, END]] = True
    config = DecodingConfig(temperature=0, num_beams=3, num_samples=3, max_new_tokens=2)
    found = beam_search(model, [[1]], config, frozenset([END]), allowed)
    texts = sorted(ids for ids, _ in found)
    assert texts == [[], [0], [0, 0]]
