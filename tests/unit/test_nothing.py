"""Zero rows, zero targets, zero keys: every operation gives what of them there is."""

import pytest
import torch

from cs_lm.config.model import GPT2Config, ModelConfig
from cs_lm.data.batches import Batch
from cs_lm.models.base import next_token_loss
from cs_lm.models.registry import build_model
from cs_lm.ops import reference as ops
from cs_lm.ops.fused import OPS

D, F, V, H, K = 6, 10, 17, 2, 4
EMPTY = [(0,), (0, 3), (2, 0), (0, 0)]


def weights(*shape):
    return torch.randn(*shape, requires_grad=True)


def ids(*shape):
    return torch.zeros(shape, dtype=torch.int64)


# Each gives inputs for a leading shape, and the shape of what comes out.
ROW_OPERATIONS = {
    "linear": lambda o, s: (ops.linear(weights(*s, D), weights(F, D)), (*s, F)),
    "linear with bias": lambda o, s: (
        ops.linear(weights(*s, D), weights(F, D), weights(F)),
        (*s, F),
    ),
    "embedding": lambda o, s: (ops.embedding(ids(*s), weights(V, D)), (*s, D)),
    "softmax": lambda o, s: (ops.softmax(weights(*s, D)), (*s, D)),
    "log_softmax": lambda o, s: (ops.log_softmax(weights(*s, D)), (*s, D)),
    "cross_entropy": lambda o, s: (ops.cross_entropy(weights(*s, V), ids(*s))[0], ()),
    "rms_norm": lambda o, s: (o.rms_norm(weights(*s, D), weights(D), 1e-5), (*s, D)),
    "layer_norm": lambda o, s: (
        o.layer_norm(weights(*s, D), weights(D), weights(D), 1e-5),
        (*s, D),
    ),
    "gelu": lambda o, s: (o.gelu(weights(*s, D)), (*s, D)),
    "swiglu": lambda o, s: (
        o.swiglu(weights(*s, D), weights(F, D), weights(D, F), weights(F, D)),
        (*s, D),
    ),
    "linear_cross_entropy": lambda o, s: (
        o.linear_cross_entropy(weights(*s, D), weights(V, D), ids(*s))[0],
        (),
    ),
    "linear_log_probs": lambda o, s: (
        torch.stack(o.linear_log_probs(weights(*s, D), weights(V, D), ids(*s)), -1),
        (*s, 2),
    ),
    "log_sigmoid": lambda o, s: (o.log_sigmoid(weights(*s, D)), (*s, D)),
}


@pytest.mark.parametrize("ops_name", OPS)
@pytest.mark.parametrize("shape", EMPTY, ids=str)
@pytest.mark.parametrize("name", ROW_OPERATIONS)
def test_no_rows(name, shape, ops_name):
    result, expected = ROW_OPERATIONS[name](OPS[ops_name], shape)
    assert tuple(result.shape) == expected and not result.sum()
    result.sum().backward()
    with torch.no_grad():
        assert tuple(ROW_OPERATIONS[name](OPS[ops_name], shape)[0].shape) == expected


@pytest.mark.parametrize("ops_name", OPS)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("sizes", [(0, 5, 5), (2, 0, 0), (2, 0, 3), (2, 3, 0), (0, 0, 0)], ids=str)
def test_attention_of_nothing(sizes, causal, ops_name):
    """Queries without any key give zeros, as those do that may attend to none."""
    batch, num_queries, num_keys = sizes
    q = weights(batch, H, num_queries, K)
    k, v = (weights(batch, H, num_keys, K) for _ in range(2))
    result = OPS[ops_name].attention(q, k, v, causal=causal)
    assert result.shape == q.shape and not result.any()
    result.sum().backward()
    assert q.grad.shape == q.shape and not q.grad.any()


@pytest.mark.parametrize("ops_name", OPS)
@pytest.mark.parametrize("shape", [(0, 5), (2, 0), (0, 0)], ids=str)
@pytest.mark.parametrize("kind", [ModelConfig, GPT2Config])
def test_models_of_nothing(kind, shape, ops_name):
    config = kind(d_model=8, num_heads=2, d_ff=12, vocab_size=V, num_layers=2, context_length=8)
    model = build_model(config, OPS[ops_name], generator=torch.Generator().manual_seed(0))
    loss_sum, num_counted = next_token_loss(model, Batch(ids(*shape), ids(*shape)))
    assert loss_sum == 0 and num_counted == 0
    loss_sum.backward()
    assert model(ids(*shape)).shape == (*shape, V)


@pytest.mark.parametrize("ops_name", OPS)
def test_only_ignored_targets(ops_name):
    x, weight = weights(3, D), weights(V, D)
    ignored = torch.full((3,), ops.IGNORE_INDEX)
    loss_sum, num_counted = OPS[ops_name].linear_cross_entropy(x, weight, ignored)
    loss_sum.backward()
    assert loss_sum == 0 and num_counted == 0 and not x.grad.any() and not weight.grad.any()


@pytest.mark.parametrize("ops_name", OPS)
def test_gelu_in_bfloat16_is_exact_to_rounding(ops_name):
    x = torch.linspace(-4, -1, 1001).bfloat16()
    exact = torch.nn.functional.gelu(x.double(), approximate="tanh")
    relative = (OPS[ops_name].gelu(x).double() - exact) / exact
    assert relative.abs().max() < 2**-8  # half a unit in the last of 8 bits
