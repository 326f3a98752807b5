"""The GPT-2 model: its shape and start, its dropout, and how a run is named after it."""

import math

import pytest
import torch

from cs_lm.config.fields import from_json, to_json, validate_all
from cs_lm.config.model import GPT2Config
from cs_lm.config.presets import GPT_SIZES
from cs_lm.config.run import RunConfig, named_run
from cs_lm.data.batches import Batch
from cs_lm.models.base import evaluating, next_token_loss
from cs_lm.models.gpt2 import GPT2LM
from cs_lm.models.stats import flops_per_token, num_parameters
from cs_lm.ops.dropout_mask import dropout_at, dropout_mask, new_state, next_pass, reseed
from cs_lm.ops.fused import FAST
from cs_lm.ops.reference import CLEAR
from cs_lm.optim.param_groups import parameter_groups
from tests.tolerances import DEEP, close

B, T = 2, 5
CONFIG = GPT2Config(
    d_model=12, num_heads=3, d_ff=20, vocab_size=17, num_layers=2, context_length=11, drop_rate=0.3
)
SIZES = {
    "gpt2-small": 124439808,
    "gpt2-medium": 354823168,
    "gpt2-large": 774030080,
    "gpt2-xl": 1557611200,
}


def model_of(config=CONFIG, seed=0, **options):
    return GPT2LM(config, generator=torch.Generator().manual_seed(seed), **options)


def ids_of(seed=1):
    return torch.randint(0, 17, (B, T), generator=torch.Generator().manual_seed(seed))


def gradients(model):
    ids = ids_of()
    for parameter in model.parameters():
        parameter.grad = None
    loss, _ = next_token_loss(model, Batch(ids, ids))
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in model.parameters())]


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("qkv_bias", [True, False])
def test_counts(tied, qkv_bias):
    config = GPT2Config(12, 3, 20, 17, 2, 11, qkv_bias=qkv_bias, tied_head=tied)
    model = GPT2LM(config, device="meta")
    assert num_parameters(config) == sum(p.numel() for p in model.parameters())
    assert ("lm_head.weight" in model.state_dict()) is not tied
    assert ("layers.0.attn.q_proj.bias" in model.state_dict()) is qkv_bias
    products = 4 * 12 * 12 + 2 * 12 * 20
    assert flops_per_token(config, T) == 6 * (2 * products + 17 * 12) + 12 * 2 * 12 * T


@pytest.mark.parametrize("name", SIZES)
def test_published_sizes(name):
    assert num_parameters(named_run(name).model) == SIZES[name]


@pytest.mark.parametrize("name", GPT_SIZES)
def test_named_runs_have_nothing_wrong(name):
    config = named_run(name)
    assert validate_all(config) == []
    assert from_json(RunConfig, to_json(config)) == config
    size = GPT_SIZES[name]
    if size.tokens_per_step:  # the paper's batch, to the next whole number of windows
        assert config.tokens_per_step == pytest.approx(size.tokens_per_step, rel=0.06)
        assert (config.optim.lr, config.seq_length) == (size.lr, 2048)
        billions = float(name[5:-1]) / (1000 if name.endswith("M") else 1)
        assert num_parameters(config.model) / 1e9 == pytest.approx(billions, rel=0.06)


def test_start(generator):
    config = GPT2Config(64, 2, 256, 128, 8, 64, tied_head=False)
    model = GPT2LM(config, generator=generator)
    state = model.state_dict()
    for name, std in (
        ("token_embeddings.weight", 0.02),
        ("position_embeddings.weight", 0.01),
        ("lm_head.weight", 0.02),
        ("layers.3.attn.q_proj.weight", 0.02),
        ("layers.3.attn.output_proj.weight", 0.02 / 4),
        ("layers.3.ffn.w2.weight", 0.02 / 4),
    ):
        assert state[name].std().item() == pytest.approx(std, rel=0.05), name
    assert (state["layers.3.ln2.weight"] == 1).all() and (state["layers.3.ln2.bias"] == 0).all()
    assert all(p.requires_grad and p.is_leaf for p in model.parameters())
    assert (state["layers.3.ffn.w1.bias"] == 0).all()


def test_start_as_torch(generator):
    config = GPT2Config(64, 2, 256, 128, 8, 64, tied_head=False, init="torch")
    model = GPT2LM(config, generator=generator)
    for layer in (model.layers[3].ffn.w1, model.layers[3].ffn.w2, model.layers[0].attn.q_proj):
        bound = layer.weight.shape[1] ** -0.5
        for weight in (layer.weight, layer.bias):
            assert bound * 0.9 < weight.abs().max() <= bound
    assert model.token_embeddings.weight.std().item() == pytest.approx(1, rel=0.05)
    assert (model.ln_final.weight == 1).all() and (model.ln_final.bias == 0).all()


def test_clear_and_fast_agree_with_dropout():
    clear, fast = model_of(ops=CLEAR), model_of(ops=FAST)
    for first, second in zip(gradients(clear), gradients(fast)):
        close(first, second, DEEP)


def test_dropout_is_off_in_evaluation():
    model = model_of()
    with evaluating(model):
        assert torch.equal(model(ids_of()), model(ids_of()))
        state = model.dropout_state.clone()
    assert not torch.equal(model(ids_of()), model(ids_of()))
    assert model.training and not torch.equal(state, model.dropout_state)


def test_dropout_follows_from_seed_and_pass():
    model = model_of()
    model.seed_dropout(7)
    first, second = model(ids_of()), model(ids_of())
    model.seed_dropout(7)
    assert torch.equal(model(ids_of()), first)
    saved = {name: value.clone() for name, value in model.state_dict().items()}
    other = model_of(seed=5)
    other.load_state_dict(saved)
    assert torch.equal(other(ids_of()), second)  # it goes on where the saved one was
    model.seed_dropout(8)
    assert not torch.equal(model(ids_of()), first)


def test_activation_checkpointing_drops_the_same():
    plain, checkpointing = model_of(), model_of(activation_checkpointing=True)
    for first, second in zip(gradients(plain), gradients(checkpointing)):
        close(first, second, DEEP)


@torch.no_grad()  # without a backward pass to compile: masks are drawn in the forward pass
@pytest.mark.slow
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_drops_the_same_without_graph_breaks(backend):
    torch._dynamo.reset()  # what other tests compiled, of other models
    plain, compiled = model_of(), model_of()
    loss = torch.compile(next_token_loss, fullgraph=True, backend=backend)
    for _ in range(2):  # the second pass draws others
        expected, _ = next_token_loss(plain, Batch(ids_of(), ids_of()))
        actual, _ = loss(compiled, Batch(ids_of(), ids_of()))
        close(actual.detach(), expected.detach(), DEEP)
    assert torch.equal(plain.dropout_state, compiled.dropout_state)


def test_draws_are_fair_and_unrelated():
    """Means within five standard deviations, and so the products of different draws."""
    size, rate = 200_000, 0.25
    keys = [next_pass(new_state(seed)) for seed in (0, 1, 1 << 40)]
    state = new_state(0)
    next_pass(state)
    keys.append(next_pass(state))
    draws = [
        dropout_mask(torch.Size((size,)), rate, key, place) for key in keys for place in range(4)
    ]
    near = 5 * math.sqrt(rate * (1 - rate) / size)
    centred = torch.stack(draws).double() - (1 - rate)
    assert centred.mean(-1).abs().max() < near
    related = centred @ centred.T / size / (rate * (1 - rate))
    related.fill_diagonal_(0)
    assert related.abs().max() < 5 / math.sqrt(size)
    neighbours = [(row[lag:] * row[: size - lag]).mean() for row in centred for lag in (1, 2, 64)]
    assert torch.stack(neighbours).abs().max() / (rate * (1 - rate)) < 5 / math.sqrt(size)


def test_dropped_numbers_are_zero_and_the_others_larger():
    key = next_pass(new_state(3))
    x = torch.full((300, 301), 2.0)
    y = dropout_at(0.25, key, 4)(x)
    assert set(y.unique().tolist()) == {0.0, (torch.tensor(2.0) / 0.75).item()}
    assert y.mean().item() == pytest.approx(2.0, rel=0.01)
    state = new_state(3)
    next_pass(state)
    reseed(state, 3)
    assert torch.equal(next_pass(state), key)


def test_large_draws_do_not_depend_on_parts(monkeypatch):
    key = next_pass(new_state(3))
    whole = dropout_mask(torch.Size((1000, 999)), 0.5, key, 1)
    monkeypatch.setattr("cs_lm.ops.dropout_mask.CACHE_NUMBERS", 4000)
    assert torch.equal(dropout_mask(torch.Size((1000, 999)), 0.5, key, 1), whole)


def test_decay_spares_tables_gains_and_biases():
    model = model_of()
    decayed, spared = (set(map(id, group["params"])) for group in parameter_groups(model, 0.1))
    for name, parameter in model.named_parameters():
        is_matrix = parameter.dim() == 2 and "embeddings" not in name
        assert (id(parameter) in decayed) is is_matrix
        assert (id(parameter) in spared) is not is_matrix


def test_sequences_beyond_the_context_are_refused():
    with pytest.raises(ValueError, match=r"got a sequence of 12 tokens, need at most .* \(11\)"):
        model_of()(torch.zeros(1, 12, dtype=torch.int64))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"drop_rate": 1.0}, "--dropout: got 1.0, need 0 to 0.99"),
        ({"drop_rate": -0.1}, "--dropout: got -0.1, need 0 to 0.99"),
        ({"num_heads": 5}, r"--num_heads: got 5, need a divisor of --d_model \(12\)"),
        ({"context_length": 0}, "--max_seq_length: got 0, need 1 or more"),
    ],
)
def test_wrong_settings(change, message):
    import dataclasses

    with pytest.raises(ValueError, match=message):
        GPT2LM(dataclasses.replace(CONFIG, **change))


@pytest.mark.parametrize("rate", [1e-4, 0.5, 0.99])
def test_the_rate_is_what_is_dropped(rate):
    key = next_pass(new_state(11))
    dropped = 1 - dropout_mask(torch.Size((2_000_000,)), rate, key, 2).double().mean().item()
    near = 5 * math.sqrt(rate * (1 - rate) / 2_000_000) + 2**-17
    assert dropped == pytest.approx(rate, abs=near)


def test_no_place_is_another_one_in_other_order():
    """The words of places may overlap; what is drawn from them must not."""
    key, size = next_pass(new_state(0)), 1 << 12
    rows = torch.stack([dropout_mask(torch.Size((size,)), 0.5, key, place) for place in range(150)])
    blocks = rows.view(150, -1, 64).sum(-1).sort(-1).values  # an order of blocks would not show
    assert len({tuple(row) for row in blocks.tolist()}) == 150
