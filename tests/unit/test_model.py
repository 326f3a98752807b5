import pytest
import torch

from cs_lm.config.model import ModelConfig
from cs_lm.data.batches import Batch
from cs_lm.models.base import next_token_loss
from cs_lm.models.init import linear_std, truncated_normal_
from cs_lm.models.kv_cache import KVCache
from cs_lm.models.layers import (
    Embedding,
    Factory,
    Linear,
    MultiHeadSelfAttention,
    RMSNorm,
    RoPE,
    SwiGLU,
)
from cs_lm.models.stats import flops_per_token, num_parameters
from cs_lm.models.transformer import TransformerLM
from cs_lm.ops.reference import inverse_frequencies
from tests.tolerances import DEEP, close

CONFIG = ModelConfig(12, 3, 20, 17, 2, 11, 10000.0)
B, T = 2, 5


@pytest.fixture
def model(generator):
    return TransformerLM(CONFIG, generator=generator)


def test_state_dict_keys(model):
    expected = {"token_embeddings.weight", "ln_final.weight", "lm_head.weight"}
    for i in range(CONFIG.num_layers):
        expected |= {f"layers.{i}.attn.{n}_proj.weight" for n in ("q", "k", "v", "output")}
        expected |= {f"layers.{i}.ffn.w{n}.weight" for n in (1, 2, 3)}
        expected |= {f"layers.{i}.ln{n}.weight" for n in (1, 2)}
    assert set(model.state_dict()) == expected
    assert model.lm_head.weight.shape == (17, 12)


def test_rope_tables_exist_once(model):
    tables = [m for m in model.modules() if isinstance(m, RoPE)]
    assert len(tables) == 1 and tables[0].cos.shape == (11, 2)


def test_counts_match_the_model(model):
    assert num_parameters(CONFIG) == sum(p.numel() for p in model.parameters())


def test_flops_match_what_torch_counts(model):
    """Matrix products of one forward and backward pass; the causal half is counted too."""
    from torch.utils.flop_counter import FlopCounterMode

    from cs_lm.ops.reference import CLEAR

    clear = TransformerLM(CONFIG, CLEAR)
    ids = torch.zeros(B, T, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter:
        next_token_loss(clear, Batch(ids, ids))[0].backward()
    assert counter.get_total_flops() == flops_per_token(CONFIG, T) * B * T


def test_any_leading_axes(model, generator):
    ids = torch.randint(0, 17, (B, 3, T), generator=generator)
    scores = model(ids)
    assert scores.shape == (B, 3, T, 17)
    close(model(ids[1, 2]), scores[1, 2], DEEP)


def test_positions_may_be_given(model, generator):
    ids = torch.randint(0, 17, (B, T), generator=generator)
    close(model(ids, torch.arange(T)), model(ids))
    close(model(ids, torch.arange(T) + 6), model(ids), DEEP)  # rotary: distances alone count
    reversed_positions = model(ids, torch.arange(T).flip(0))
    assert (reversed_positions - model(ids)).abs().max() > 1e-3


def test_sequence_longer_than_the_context(model):
    with pytest.raises(ValueError, match=r"got a sequence of 12 tokens, need at most .* \(11\)"):
        model(torch.zeros(1, 12, dtype=torch.int64))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"num_heads": 5}, r"--num_heads: got 5, need a divisor of --d_model \(12\)"),
        ({"num_heads": 4}, r"--num_heads: got 4, which makes the head size 3, need an even one"),
        ({"num_layers": 0}, "--num_layers: got 0, need 1 or more"),
        ({"rope_theta": -1.0}, "--theta: got -1.0, need a number above 0"),
    ],
)
def test_impossible_shapes(changes, message):
    import dataclasses

    with pytest.raises(ValueError, match=message):
        TransformerLM(dataclasses.replace(CONFIG, **changes))


def test_layers_refuse_impossible_shapes():
    with pytest.raises(ValueError, match="need num_heads to divide d_model"):
        MultiHeadSelfAttention(12, 5)
    with pytest.raises(ValueError, match="got head size 3, need an even one"):
        inverse_frequencies(10.0, 3)


def test_initialisation(generator):
    weight = truncated_normal_(torch.empty(400, 500), 0.5, generator)
    assert weight.abs().max() <= 1.5 and weight.abs().max() > 1.4
    assert abs(weight.mean()) < 0.005
    assert abs(weight.std() / 0.5 - 0.9866) < 0.005  # a normal cut at 3 std keeps 98.66 % of it
    linear = Linear(300, 500, factory=Factory(torch.Generator().manual_seed(0)))
    again = Linear(300, 500, factory=Factory(torch.Generator().manual_seed(0)))
    assert torch.equal(linear.weight, again.weight)
    assert linear.weight.std().item() == pytest.approx(linear_std(300, 500) * 0.9866, rel=0.01)
    assert Embedding(
        50, 40, factory=Factory(torch.Generator())
    ).weight.std().item() == pytest.approx(0.9866, rel=0.1)
    assert torch.equal(RMSNorm(7).weight, torch.ones(7))


def test_initial_weights_follow_from_the_generator_alone():
    first = TransformerLM(CONFIG, generator=torch.Generator().manual_seed(3)).state_dict()
    torch.manual_seed(99)
    second = TransformerLM(CONFIG, generator=torch.Generator().manual_seed(3)).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_shapes_on_the_meta_device():
    """A model of any size can be laid out without memory: nothing reads a value."""
    large = ModelConfig(4096, 32, 14336, 128_000, 4, 8192)
    model = TransformerLM(large, device="meta")
    ids = torch.zeros(2, 4096, dtype=torch.int64, device="meta")
    assert model(ids).shape == (2, 4096, 128_000)
    loss_sum, count = next_token_loss(model, Batch(ids, ids))
    assert loss_sum.shape == count.shape == ()


def test_no_graph_breaks():
    from torch._dynamo.utils import counters

    model = TransformerLM(CONFIG)
    ids = torch.zeros(B, T, dtype=torch.int64)
    torch._dynamo.reset()  # what other tests compiled, of other models
    counters.clear()
    compiled = torch.compile(next_token_loss, backend="aot_eager", fullgraph=True)
    loss_sum, _ = compiled(model, Batch(ids, ids))
    loss_sum.backward()
    close(loss_sum.detach(), next_token_loss(model, Batch(ids, ids))[0].detach(), DEEP)
    assert not counters["graph_break"]


def test_cache_capacity():
    cache = KVCache((1, 1, 3, 4, 2), torch.float32, "cpu")
    keys = torch.zeros(1, 3, 4, 2)
    cache.extend(0, keys, keys)
    cache.advance(4)
    with pytest.raises(ValueError, match="KVCache: got 5 positions, need at most"):
        cache.extend(0, keys[:, :, :1], keys[:, :, :1])


def test_swiglu_shapes():
    assert [tuple(p.shape) for p in SwiGLU(12, 20).parameters()] == [(20, 12), (12, 20), (20, 12)]
