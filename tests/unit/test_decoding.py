import math

import pytest
import torch

from cs_lm.config.model import ModelConfig
from cs_lm.inference.decoding_config import DecodingConfig
from cs_lm.inference.filters import (
    apply_temperature,
    repetition_penalty_logits,
    top_k_logits,
    top_p_logits,
)
from cs_lm.inference.generate import generate, generate_tokens
from cs_lm.inference.text import TextStream, generate_text
from cs_lm.models.transformer import TransformerLM
from cs_lm.tokenizer import BPETokenizer

INF = math.inf
BYTES = BPETokenizer({i: bytes([i]) for i in range(256)}, [], ["<|end|>"])


@pytest.fixture(scope="module")
def model():
    config = ModelConfig(12, 3, 20, 260, 2, 16)
    return TransformerLM(config, generator=torch.Generator().manual_seed(2))


def greedy(**changes):
    return DecodingConfig(temperature=0, **{"max_new_tokens": 12, **changes})


def test_filters_by_hand():
    scores = torch.tensor([[1.0, 3.0, 2.0, 0.0], [4.0, 0.0, 0.0, 5.0]])
    assert apply_temperature(scores, 2.0)[0].tolist() == [0.5, 1.5, 1.0, 0.0]
    assert top_k_logits(scores, 2).tolist() == [[-INF, 3.0, 2.0, -INF], [4.0, -INF, -INF, 5.0]]
    assert torch.equal(top_k_logits(scores, 99), scores)
    probabilities = torch.tensor([0.1, 0.5, 0.15, 0.25]).log()
    for p, kept in [(0.4, [1]), (0.5, [1]), (0.6, [1, 3]), (0.76, [1, 2, 3]), (1.0, [0, 1, 2, 3])]:
        assert top_p_logits(probabilities, p).isfinite().nonzero().flatten().tolist() == kept
    assert top_p_logits(probabilities, 1e-9).isfinite().sum() == 1


def test_repetition_penalty_knows_signs_and_counts_once():
    scores = torch.tensor([2.0, -2.0, 1.0, 0.0])
    seen = torch.tensor([0, 1, 0, 0, 3])
    assert repetition_penalty_logits(scores, seen, 2.0).tolist() == [1.0, -4.0, 1.0, 0.0]
    assert repetition_penalty_logits(scores, seen[:0], 2.0).tolist() == scores.tolist()
    assert scores.tolist() == [2.0, -2.0, 1.0, 0.0], "pure"


def test_repetition_window(model):
    """With a crushing penalty, the last `window` tokens never come back."""
    config = greedy(repetition_penalty=1e9, repetition_window=3, max_new_tokens=40)
    row = [5, *generate(model, [[5]], config)[0]]
    assert all(len(set(row[i : i + 4])) == 4 for i in range(len(row) - 3))


def test_seed_and_temperature(model):
    first = generate(model, [[1, 2]], DecodingConfig(seed=1))
    assert generate(model, [[1, 2]], DecodingConfig(seed=1)) == first
    assert generate(model, [[1, 2]], DecodingConfig(seed=2)) != first
    top_one = generate(model, [[1, 2]], DecodingConfig(top_k=1, seed=7))
    assert top_one == generate(model, [[1, 2]], DecodingConfig(temperature=0))


def test_sampling_follows_the_scores():
    """A model that always scores log(1..4): tokens come with probability 1/10 to 4/10."""
    config = ModelConfig(12, 3, 20, 4, 1, 8)
    model = TransformerLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model.token_embeddings.weight[:, 0] = 1.0
        model.ln_final.weight[0] = 1.0
        scale = 1 / math.sqrt(1 / 12 + 1e-5)
        model.lm_head.weight[:, 0] = torch.tensor([1.0, 2, 3, 4]).log() / scale
    rows = generate(model, [[0]] * 500, DecodingConfig(max_new_tokens=8, temperature=1.0))
    counts = torch.tensor(rows).flatten().bincount(minlength=4)
    expected = torch.tensor([400.0, 800, 1200, 1600])
    assert ((counts - expected) ** 2 / expected).sum() < 16.3  # 3 degrees of freedom, 1 in 1000


def test_stop_ids_are_not_given_out(model):
    free = generate(model, [[3]], greedy())[0]
    stop = free[5]
    assert generate(model, [[3]], greedy(), [stop])[0] == free[: free.index(stop)]


def test_finished_rows_stay_silent(model):
    finished = [False, False]
    steps = []
    for step in generate_tokens(model, [[3], [4]], greedy(max_new_tokens=5), finished):
        steps.append(step.token_ids)
        finished[1] = True
    assert all(step[0] is not None for step in steps) and len(steps) == 5
    assert [step[1] is None for step in steps] == [False, True, True, True, True]


def test_unusable_ids_are_never_chosen(model):
    """The model has 260 rows, the tokenizer 257 tokens."""
    text = generate_text(model, BYTES, ["a"], DecodingConfig(temperature=5.0, max_new_tokens=300))
    assert len(text[0]) > 0
    with torch.no_grad():
        model.lm_head.weight[257:] *= 100
    generate_text(model, BYTES, ["a"], DecodingConfig(max_new_tokens=50))
    with torch.no_grad():
        model.lm_head.weight[257:] /= 100


def test_bad_prompts_and_settings(model):
    with pytest.raises(ValueError, match="got an empty prompt, need at least one token"):
        generate(model, [[1], []], greedy())
    with pytest.raises(ValueError, match="got token id 260, need 0 to 259"):
        generate(model, [[260]], greedy())
    with pytest.raises(ValueError, match=r"--top_p: got 1.5, need above 0, at most 1"):
        generate(model, [[1]], greedy(top_p=1.5))
    for name, value in [
        ("top_k", 0),
        ("temperature", -1.0),
        ("max_new_tokens", 0),
        ("slide", 0),
        ("repetition_penalty", 0.0),
        ("stop", ("",)),
        ("seed", -1),
        ("repetition_window", 0),
        ("temperature", 1e-30),
        ("seed", 1 << 63),
    ]:
        assert f"--{name}: got" in str(DecodingConfig(**{name: value}).validate()[0])


def shown(tokens, stop=()):
    stream = TextStream(BYTES.vocab, stop)
    pieces = [stream.push(token) for token in tokens]
    return [*pieces, stream.close()], stream.stopped


def test_stream_never_shows_half_a_character():
    pieces, _ = shown("é🙂x".encode())
    assert pieces == ["", "é", "", "", "", "🙂", "x", ""]
    assert shown(b"\xf0\x9f")[0] == ["", "", "\ufffd"]
    assert shown(b"\xffa")[0] == ["\ufffd", "a", ""]


def test_stop_strings():
    assert shown(b"ab12c", ["12"]) == (["a", "b", "", "", "", ""], True)
    assert shown(b"1112", ["12"]) == (["", "1", "1", "", ""], True), "12 found in 1,1,1,2"
    assert shown(b"ab1", ["12"]) == (["a", "b", "", "1"], False)
    assert shown(b"abcX", ["bcX", "c"]) == (["a", "", "b", "", ""], True)
    assert shown(b"abc", ["abc", "b"])[0] == ["", "a", "", ""], "b is complete before abc"
    whole = TextStream({0: b"abc"}, ["abc", "b"])
    assert whole.push(0) == "a", "however the text is cut into tokens"
    assert shown("né!".encode(), ["é"])[0] == ["n", "", "", "", ""]


def test_stop_strings_end_a_row_of_a_batch(model):
    free = generate_text(model, BYTES, ["ab", "x"], greedy())
    config = greedy(stop=(free[0][4:6],))
    stopped = generate_text(model, BYTES, ["ab", "x"], config)
    assert stopped[0] == free[0][: free[0].index(free[0][4:6])]
    pieces = {0: "", 1: ""}
    texts = generate_text(
        model,
        BYTES,
        ["ab", "x"],
        config,
        lambda row, text: pieces.__setitem__(row, pieces[row] + text),
    )
    assert [pieces[0], pieces[1]] == texts


def test_special_token_ends_the_text(model):
    with torch.no_grad():
        saved = model.lm_head.weight.clone()
        model.lm_head.weight[:] = 0
        model.lm_head.weight[256] = model.ln_final(model.token_embeddings.weight[97])
    assert generate_text(model, BYTES, ["a"], greedy()) == [""]
    with torch.no_grad():
        model.lm_head.weight.copy_(saved)


def test_settings_without_effect_are_refused():
    for settings, message in [
        ({"temperature": 0.0, "top_k": 3}, "--top_k: has no effect at --temperature 0"),
        ({"temperature": 0.0, "top_p": 0.5}, "--top_p: has no effect at --temperature 0"),
        ({"repetition_window": 3}, "--repetition_window: has no effect without --repetition_pen"),
    ]:
        assert message in str(DecodingConfig(**settings).validate()[0])


def chat_model(generator):
    """A model that writes <|assistant|> after every token, whatever stands before."""
    tokenizer = BPETokenizer(
        {i: bytes([i]) for i in range(256)}, [], ["<|assistant|>", "<|endoftext|>"]
    )
    config = ModelConfig(16, 2, 24, 258, 1, 32)
    model = TransformerLM(config, generator=generator)
    with torch.no_grad():
        model.lm_head.weight.zero_()
        model.lm_head.bias = torch.nn.Parameter(torch.zeros(258))
        model.lm_head.bias[256] = 1.0
    return model, tokenizer


def test_only_the_end_of_text_ends_a_text_unless_others_are_asked(generator):
    model, tokenizer = chat_model(generator)
    assert tokenizer.end_tokens == ["<|endoftext|>"]
    assert BPETokenizer(tokenizer.vocab, [], ["<|a|>", "<|b|>"]).end_tokens == ["<|a|>"]
    assert BPETokenizer(tokenizer.vocab, []).end_tokens == []
    settings = {"temperature": 0.0, "max_new_tokens": 3}
    free = generate_text(model, tokenizer, ["a"], DecodingConfig(**settings))
    assert free == ["<|assistant|>" * 3]
    asked = DecodingConfig(**settings, stop_token=("<|assistant|>",))
    assert generate_text(model, tokenizer, ["a"], asked) == [""]
    with pytest.raises(
        ValueError, match=r"--stop_token: got 'x', need special tokens of the model"
    ):
        generate_text(model, tokenizer, ["a"], DecodingConfig(stop_token=("x",)))


def test_samples_of_a_prompt_draw_each_their_own(model):
    config = DecodingConfig(max_new_tokens=12, temperature=1.0, num_samples=3, seed=5)
    texts = generate_text(model, BYTES, ["ab", "cd"], config)
    assert len(texts) == 6 and len(set(texts)) == 6
    one = DecodingConfig(max_new_tokens=12, temperature=1.0, seed=5)
    assert generate_text(model, BYTES, ["ab"], one) == texts[:1]
    problems = [str(p) for p in DecodingConfig(temperature=0.0, num_samples=2).validate()]
    assert "--num_samples: all samples are the same at --temperature 0" in problems[0]
