"""FAST held to CLEAR and CLEAR to torch, entry by entry of the record, in value and gradient."""

import math

import pytest
import torch
import torch.nn.functional as F

from cs_lm.ops import fused as fast_ops
from cs_lm.ops import log_probs, tiled_attention
from cs_lm.ops import reference as ops
from cs_lm.ops.fused import FAST
from cs_lm.ops.reference import CLEAR, IGNORE_INDEX, Ops
from tests.tolerances import DEEP, close

B, H, K, T, S, D, V, FF = 2, 3, 4, 5, 7, 12, 17, 20


def normal(*shape, dtype=torch.float32, grad=True):
    values = torch.randn(*shape, generator=normal.generator, dtype=torch.float64).to(dtype)
    return values.requires_grad_(grad)


@pytest.fixture(autouse=True)
def _seed(generator):
    normal.generator = generator


def linear_inputs(dtype):
    for shape, d_out in [((B, T, D), FF), ((1, D), V), ((1, D), 1), ((D,), FF), ((B, 1, D), V)]:
        yield (normal(*shape, dtype=dtype), normal(d_out, D, dtype=dtype)), {}
        yield (*(normal(*s, dtype=dtype) for s in (shape, (d_out, D), (d_out,))),), {}


def rms_norm_inputs(dtype):
    yield (normal(B, T, D, dtype=dtype), normal(D, dtype=dtype), 1e-5), {}
    yield (normal(D, dtype=dtype), normal(D, dtype=dtype), 1e-5), {}


def layer_norm_inputs(dtype):
    for shape in ((B, T, D), (D,)):
        parameters = normal(D, dtype=dtype), normal(D, dtype=dtype)
        yield (normal(*shape, dtype=dtype), *parameters, 1e-5), {}


def gelu_inputs(dtype):
    yield (normal(B, T, FF, dtype=dtype, grad=False).mul_(3).requires_grad_(),), {}


def rope_inputs(dtype):
    angle = normal(T, K // 2, dtype=dtype, grad=False)
    yield (normal(B, H, T, K, dtype=dtype), angle.cos(), angle.sin()), {}


def swiglu_inputs(dtype):
    shapes = [(FF, D), (D, FF), (FF, D)]  # scaled as in a model: results and gradients near 1
    weights = [normal(*s, dtype=dtype, grad=False).mul_(s[1] ** -0.5) for s in shapes]
    yield (normal(B, T, D, dtype=dtype), *(w.requires_grad_() for w in weights)), {}


def attention_inputs(dtype):
    def qkv(t, s):
        return [normal(B, H, n, K, dtype=dtype) for n in (t, s, s)]

    some = torch.rand(B, 1, T, S, generator=normal.generator) > 0.4
    some[0, :, 2] = False  # a query that may attend to nothing
    yield tuple(qkv(T, S)), {}
    yield tuple(qkv(T, S)), {"causal": True}
    yield tuple(qkv(1, S)), {"causal": True}
    yield tuple(qkv(T, S)), {"mask": some}
    yield tuple(qkv(T, S)), {"mask": some[:, :, :1], "causal": True}
    yield tuple(qkv(150, 163)), {"causal": True}  # several blocks, the last one not full
    yield tuple(qkv(S, T)), {"causal": True}  # queries before the first key


def linear_cross_entropy_inputs(dtype):
    targets = torch.randint(0, V, (B, T), generator=normal.generator)
    ignored = targets.clone()
    ignored[0, 1] = ignored[1, 3] = IGNORE_INDEX
    for ids in (targets, ignored, torch.full_like(targets, IGNORE_INDEX)):
        yield (normal(B, T, D, dtype=dtype), normal(V, D, dtype=dtype), ids), {}


def linear_log_probs_inputs(dtype):
    for args, options in linear_cross_entropy_inputs(dtype):
        with torch.no_grad():
            args[1].mul_(0.5)  # the entropy's gradient sums V products, each rounded
        yield args, options
        yield args, {"temperature": 0.7}


def log_sigmoid_inputs(dtype):
    x = normal(B, T, D, dtype=dtype)
    with torch.no_grad():
        x[0, 0, :5] = torch.tensor([0.0, -1e4, 1e4, -30.0, 30.0])
    yield (x,), {}


def reference_linear_log_probs(x, weight, targets, temperature=1.0):
    distribution = torch.distributions.Categorical(logits=x @ weight.T / temperature)
    counted = targets != IGNORE_INDEX
    chosen = distribution.log_prob(targets.clamp(min=0))
    return chosen * counted, distribution.entropy() * counted


def reference_rope(x, cos, sin):
    rotated = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous()) * torch.complex(cos, sin)
    return torch.view_as_real(rotated).flatten(-2)


def reference_attention(q, k, v, mask=None, causal=False):
    allowed = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool)
    if causal:
        allowed = allowed.tril(k.shape[-2] - q.shape[-2])
    if mask is not None:
        allowed = allowed & mask
    attended = F.scaled_dot_product_attention(q, k, v, attn_mask=allowed)
    return torch.where(allowed.any(-1, keepdim=True), attended, 0.0)


def reference_linear_cross_entropy(x, weight, targets):
    scores = (x @ weight.T).flatten(0, -2)
    loss = F.cross_entropy(scores, targets.flatten(), reduction="sum", ignore_index=IGNORE_INDEX)
    return loss, (targets != IGNORE_INDEX).sum()


INPUTS = {
    "linear": linear_inputs,
    "rms_norm": rms_norm_inputs,
    "layer_norm": layer_norm_inputs,
    "gelu": gelu_inputs,
    "rope": rope_inputs,
    "swiglu": swiglu_inputs,
    "attention": attention_inputs,
    "linear_cross_entropy": linear_cross_entropy_inputs,
    "linear_log_probs": linear_log_probs_inputs,
    "log_sigmoid": log_sigmoid_inputs,
}
REFERENCES = {
    "linear": F.linear,
    "rms_norm": lambda x, w, eps: F.rms_norm(x, (x.shape[-1],), w, eps),
    "layer_norm": lambda x, w, b, eps: F.layer_norm(x, (x.shape[-1],), w, b, eps),
    "gelu": lambda x: F.gelu(x, approximate="tanh"),
    "rope": reference_rope,
    "swiglu": lambda x, w1, w2, w3: F.linear(F.silu(F.linear(x, w1)) * F.linear(x, w3), w2),
    "attention": reference_attention,
    "linear_cross_entropy": reference_linear_cross_entropy,
    "linear_log_probs": reference_linear_log_probs,
    "log_sigmoid": F.logsigmoid,
}


def results(operation, args, options):
    """Outputs, and the gradients of a fixed random projection of those that have one."""
    leaves = [a.detach().clone() if torch.is_tensor(a) else a for a in args]
    for leaf, arg in zip(leaves, args):
        if torch.is_tensor(arg) and arg.requires_grad:
            leaf.requires_grad_()
    outputs = operation(*leaves, **options)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    generator = torch.Generator().manual_seed(5)
    projected = [
        (o * torch.randn(o.shape, generator=generator).to(o.dtype)).sum()
        for o in outputs
        if o.requires_grad
    ]
    torch.stack(projected).sum().backward()
    return [o.detach() for o in outputs], [
        leaf.grad for leaf in leaves if torch.is_tensor(leaf) and leaf.requires_grad
    ]


def assert_same(first, second, args, options, dtype):
    (outputs, gradients), (expected, expected_gradients) = (
        results(operation, args, options) for operation in (first, second)
    )
    for actual, wanted in zip(outputs + gradients, expected + expected_gradients, strict=True):
        close(actual, wanted.to(actual.dtype), DEEP, dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", Ops._fields)
def test_fast_is_clear(name, dtype):
    for args, options in INPUTS[name](dtype):
        assert_same(getattr(FAST, name), getattr(CLEAR, name), args, options, dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", Ops._fields)
@torch.no_grad()
def test_fast_is_clear_without_gradients(name, dtype):
    """As in generation, where some operations take another way."""
    for args, options in INPUTS[name](dtype):
        actual, wanted = (
            getattr(FAST, name)(*args, **options),
            getattr(CLEAR, name)(*args, **options),
        )
        if not isinstance(actual, tuple):
            actual, wanted = (actual,), (wanted,)
        for one, other in zip(actual, wanted, strict=True):
            close(one, other.to(one.dtype), DEEP, dtype)
            assert one.is_contiguous() or name == "attention"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("name", Ops._fields)
def test_clear_is_torch(name, dtype):
    for args, options in INPUTS[name](dtype):
        assert_same(getattr(CLEAR, name), REFERENCES[name], args, options, dtype)


@pytest.mark.parametrize("name", [n for n in Ops._fields if getattr(FAST, n) != getattr(CLEAR, n)])
def test_hand_derived_gradients_are_the_numeric_ones(name):
    for args, options in INPUTS[name](torch.float64):
        if args[0].numel() > 1000:
            continue  # gradcheck is quadratic

        def outputs(*leaves, name=name, options=options):
            found = getattr(FAST, name)(*leaves, **options)
            found = found if isinstance(found, tuple) else (found,)
            return tuple(each for each in found if each.requires_grad)

        assert torch.autograd.gradcheck(outputs, args)


@pytest.mark.parametrize(
    "name", ["attention", "swiglu", "linear_cross_entropy", "linear_log_probs"]
)
def test_many_small_tiles_and_parts_are_as_good(name, small_tiles):
    for args, options in INPUTS[name](torch.float64):
        assert_same(getattr(FAST, name), getattr(CLEAR, name), args, options, torch.float64)


def test_tiles_skip_what_the_mask_leaves_out():
    """Texts of 64 tokens side by side: a sixteenth of all scores, in each batch entry alike."""
    texts = torch.arange(1024) // 64
    mask = (texts.unsqueeze(-1) == texts).expand(2, H, -1, -1)
    q, k, v = (normal(2, H, 1024, K) for _ in range(3))
    heads = next(tiled_attention._head_blocks(q, k))

    def num_scores(mask):
        tiles = tiled_attention._tiles(q, k, True, mask, heads)
        return sum(
            (rows.stop - rows.start) * (keys.stop - keys.start)
            for rows, of_rows in tiles
            for keys, _ in of_rows
        )

    assert num_scores(mask) <= num_scores(None) / 4
    assert_same(FAST.attention, CLEAR.attention, (q, k, v), {"mask": mask, "causal": True}, q.dtype)


def test_blocks_of_scores_do_not_change_the_loss(monkeypatch):
    (args, _), *_ = linear_cross_entropy_inputs(torch.float64)
    for module in (fast_ops, log_probs):  # blocks of three rows, the last of one
        monkeypatch.setattr(module, "BLOCK_LOGITS", 3 * V)
    for name in ("linear_cross_entropy", "linear_log_probs"):
        assert_same(getattr(FAST, name), getattr(CLEAR, name), args, {}, torch.float64)


@pytest.mark.parametrize("record", [FAST, CLEAR])
def test_log_probs_of_impossible_tokens(record):
    """A logit of -inf: log-probability -inf, and nothing added to the entropy."""
    x = torch.tensor([[0.5, 1.0]], dtype=torch.float64).expand(3, 2)
    weight = torch.tensor([[1.0, 2.0], [-math.inf, 1.0], [3.0, 1.0]], dtype=torch.float64)
    chosen, entropy = record.linear_log_probs(x, weight, torch.tensor([0, 1, 2]))
    assert chosen[1] == -math.inf
    possible = record.linear_log_probs(x, weight[[0, 2]], torch.tensor([0, 0, 1]))
    close(chosen[[0, 2]], possible[0][[0, 2]])
    close(entropy, possible[1])


def test_entropy_of_impossible_tokens_has_a_gradient():
    logits = torch.tensor([[0.5, -math.inf, 1.0]], requires_grad=True)
    chosen, entropy = ops.token_log_probs(logits, torch.tensor([2]))
    (chosen + entropy).backward()
    assert logits.grad.isfinite().all() and logits.grad[0, 1] == 0


@pytest.mark.parametrize("operation", ["softmax", "log_softmax"])
def test_softmax_is_torch(operation):
    x = normal(B, V, T, grad=False)
    for dim in (0, 1, -1):
        close(getattr(ops, operation)(x, dim), getattr(torch, operation)(x, dim))
    large = torch.tensor([1e4, 1e4 - 1, -1e4, -math.inf])
    close(getattr(ops, operation)(large), getattr(torch, operation)(large, -1))


def test_silu_is_torch():
    x = normal(B, T, D, grad=False)
    close(ops.silu(x), F.silu(x))
