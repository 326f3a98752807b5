"""The filters of sampling, one by one and in their order, beside those of `transformers`."""

import math
import random

import pytest
import torch

from cs_lm.inference import filters
from cs_lm.inference.decoding_config import DecodingConfig
from cs_lm.inference.sampling import History, filtered, penalised

B, V = 3, 23
NUM_SETTINGS = 1500


def random_settings(rng: random.Random) -> dict:
    """Some of the filters, each with a random strength."""
    choices = {
        "repetition_penalty": lambda: rng.choice([0.5, 1.2, 3.0]),
        "no_repeat_ngram": lambda: rng.randint(1, 4),
        "temperature": lambda: rng.choice([0.3, 0.8, 1.7]),
        "top_k": lambda: rng.randint(1, V + 5),
        "top_p": lambda: rng.uniform(0.05, 1.0),
        "min_p": lambda: rng.uniform(0.001, 1.0),
        "typical_p": lambda: rng.uniform(0.05, 0.99),
    }
    return {name: make() for name, make in choices.items() if rng.random() < 0.5}


def processors_of(settings: dict, banned: list[int]):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    config = transformers.GenerationConfig(
        do_sample=True,
        temperature=settings.get("temperature", 1.0),
        repetition_penalty=settings.get("repetition_penalty", 1.0),
        no_repeat_ngram_size=settings.get("no_repeat_ngram", 0),
        top_k=settings.get("top_k", 0),
        top_p=settings.get("top_p", 1.0),
        min_p=settings.get("min_p"),
        typical_p=settings.get("typical_p", 1.0),
        suppress_tokens=banned or None,
    )
    shell = transformers.generation.GenerationMixin()
    shell.config = transformers.LlamaConfig(vocab_size=V, num_hidden_layers=1)
    return shell._get_logits_processor(config, input_ids_seq_length=1, device="cpu")


def test_random_settings_leave_what_transformers_leaves():
    """Which filters there are, how strong and in which order: the same logits are left."""
    rng, generator = random.Random(7), torch.Generator().manual_seed(7)
    for _ in range(NUM_SETTINGS):
        settings = random_settings(rng)
        # n-grams and banned tokens together can leave nothing
        num_banned = 0 if "no_repeat_ngram" in settings else rng.choice([0, 5])
        banned = rng.sample(range(V), num_banned)
        logits = 3 * torch.randn(B, V, generator=generator, dtype=torch.float64)
        ids = torch.randint(0, rng.choice([3, V]), (B, rng.randint(1, 12)), generator=generator)
        expected = processors_of(settings, banned)(ids, logits.clone())
        allowed = torch.ones(V, dtype=torch.bool)
        allowed[banned] = False
        config = DecodingConfig(**({"temperature": 1.0} | settings))
        history = History(ids, torch.zeros(B, dtype=torch.int64), 1)
        left, places = filtered(penalised(logits, history, config, allowed), config)
        if places is not None:
            left = torch.full_like(logits, -math.inf).scatter(-1, places, left)
        torch.testing.assert_close(left, expected, msg=lambda m, s=settings: f"{s}: {m}")


@pytest.mark.parametrize("seed", range(20))
def test_each_filter_is_the_one_of_transformers(seed):
    process = pytest.importorskip(
        "transformers.generation.logits_process", reason="transformers is not installed"
    )
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(B, V, generator=generator, dtype=torch.float64)
    logits[:, 3] = -math.inf
    share = float(torch.rand((), generator=generator).clamp(0.05, 0.95))
    ids = torch.randint(0, 4, (B, 9), generator=generator)
    no_padding = torch.zeros(B, dtype=torch.int64)
    for actual, peer in [
        (filters.min_p_logits(logits, share), process.MinPLogitsWarper(share)),
        (filters.typical_logits(logits, share), process.TypicalLogitsWarper(share)),
        (filters.top_p_logits(logits, share), process.TopPLogitsWarper(share)),
        (filters.top_k_logits(logits, 1 + seed), process.TopKLogitsWarper(1 + seed)),
        (
            filters.no_repeat_ngram_logits(logits, ids, 1 + seed % 4, no_padding),
            process.NoRepeatNGramLogitsProcessor(1 + seed % 4),
        ),
    ]:
        torch.testing.assert_close(actual, peer(ids, logits.clone()))
