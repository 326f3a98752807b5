"""The harness names, driven as a suite would that knows nothing else, beside torch."""

import io

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tests import adapters
from tests.tolerances import DEEP, MANY_UPDATES, close

B, H, T, D, V, FF, L, CONTEXT, THETA = 2, 3, 5, 12, 17, 20, 2, 11, 10000.0
K = D // H


def attention_weights():
    return [torch.randn(D, D) / 3 for _ in range(4)]


def by_hand_attention(weights, x, positions=None):
    q, k, v = (F.linear(x, w).unflatten(-1, (H, K)).transpose(-3, -2) for w in weights[:3])
    if positions is not None:
        q, k = (by_hand_rope(z, positions) for z in (q, k))
    heads = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    return F.linear(heads.transpose(-3, -2).flatten(-2), weights[3])


def by_hand_rope(x, positions):
    angle = positions[:, None] / THETA ** (torch.arange(0, x.shape[-1], 2) / x.shape[-1])
    turn = torch.polar(torch.ones_like(angle), angle)
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * turn).flatten(-2)


def block_weights(prefix=""):
    shapes = {
        **{f"attn.{n}_proj.weight": (D, D) for n in ("q", "k", "v", "output")},
        "ln1.weight": (D,),
        "ln2.weight": (D,),
        "ffn.w1.weight": (FF, D),
        "ffn.w2.weight": (D, FF),
        "ffn.w3.weight": (FF, D),
    }
    return {prefix + name: torch.randn(shape) / 3 for name, shape in shapes.items()}


def by_hand_block(w, x, prefix=""):
    normed = F.rms_norm(x, (D,), w[prefix + "ln1.weight"], 1e-5)
    projections = [w[f"{prefix}attn.{n}_proj.weight"] for n in ("q", "k", "v", "output")]
    x = x + by_hand_attention(projections, normed, torch.arange(x.shape[-2]))
    normed = F.rms_norm(x, (D,), w[prefix + "ln2.weight"], 1e-5)
    gate = F.silu(F.linear(normed, w[prefix + "ffn.w1.weight"]))
    gated = gate * F.linear(normed, w[prefix + "ffn.w3.weight"])
    return x + F.linear(gated, w[prefix + "ffn.w2.weight"])


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("leading", [(), (B,), (B, 3)], ids=str)
def test_layers_with_any_leading_axes(leading):
    x, gain = torch.randn(*leading, T, D), torch.randn(D)
    w1, w2, w3 = torch.randn(FF, D), torch.randn(D, FF), torch.randn(FF, D)
    close(adapters.run_linear(D, FF, w1, x), F.linear(x, w1))
    close(adapters.run_rmsnorm(D, 1e-5, gain, x), F.rms_norm(x, (D,), gain, 1e-5))
    gated = F.linear(F.silu(F.linear(x, w1)) * F.linear(x, w3), w2)
    close(adapters.run_swiglu(D, FF, w1, w2, w3, x), gated, DEEP)
    ids, table = torch.randint(0, V, (*leading, T)), torch.randn(V, D)
    close(adapters.run_embedding(V, D, table, ids), F.embedding(ids, table))
    close(
        adapters.run_rope(D, THETA, CONTEXT, x, torch.arange(T)), by_hand_rope(x, torch.arange(T))
    )
    weights = attention_weights()
    close(
        adapters.run_multihead_self_attention(D, H, *weights, x),
        by_hand_attention(weights, x),
        DEEP,
    )
    block = block_weights()
    actual = adapters.run_transformer_block(D, H, FF, CONTEXT, THETA, block, x)
    close(actual, by_hand_block(block, x), DEEP)


def test_elementwise_and_losses():
    x = torch.randn(B, T, V)
    close(adapters.run_silu(x), F.silu(x))
    close(adapters.run_softmax(x + 100, 1), F.softmax(x, 1), DEEP)
    targets = torch.randint(0, V, (T,))
    for factor in (1, 1000):
        actual = adapters.run_cross_entropy(factor * x[0], targets)
        close(actual, F.cross_entropy(factor * x[0], targets))


def test_attention_mask():
    q, k, v = torch.randn(B, H, T, K), torch.randn(B, H, 7, K), torch.randn(B, H, 7, K)
    mask = torch.rand(B, H, T, 7) > 0.3
    mask[..., 0] = True
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    close(adapters.run_scaled_dot_product_attention(q, k, v, mask), expected)
    expected = F.scaled_dot_product_attention(q, k, v)
    close(adapters.run_scaled_dot_product_attention(q, k, v), expected)


def test_attention_with_positions():
    weights, x = attention_weights(), torch.randn(B, T, D)
    args = (D, H, CONTEXT, THETA, *weights, x)
    expected = by_hand_attention(weights, x, torch.arange(T))
    close(adapters.run_multihead_self_attention_with_rope(*args), expected, DEEP)
    positions = torch.tensor([3, 1, 4, 10, 5])
    expected = by_hand_attention(weights, x, positions)
    close(adapters.run_multihead_self_attention_with_rope(*args, positions), expected, DEEP)


@pytest.mark.parametrize("length", [CONTEXT, T, 1])
def test_whole_model(length):
    weights = {
        "token_embeddings.weight": torch.randn(V, D),
        "ln_final.weight": torch.randn(D),
        "lm_head.weight": torch.randn(V, D),
    }
    for i in range(L):
        weights |= block_weights(f"layers.{i}.")
    ids = torch.randint(0, V, (B, length))
    x = F.embedding(ids, weights["token_embeddings.weight"])
    for i in range(L):
        x = by_hand_block(weights, x, f"layers.{i}.")
    x = F.rms_norm(x, (D,), weights["ln_final.weight"], 1e-5)
    actual = adapters.run_transformer_lm(V, CONTEXT, D, L, H, FF, THETA, weights, ids)
    close(actual, F.linear(x, weights["lm_head.weight"]), DEEP)


def test_get_batch():
    dataset = np.arange(100)
    seen = set()
    for _ in range(400):
        x, y = adapters.run_get_batch(dataset, 32, 7, "cpu")
        assert x.shape == y.shape == (32, 7) and x.dtype == y.dtype == torch.int64
        assert torch.equal(y, x + 1)
        seen |= set(x[:, 0].tolist())
    assert seen == set(range(93))
    for device in ("cuda:99", "nonsense"):
        with pytest.raises((RuntimeError, AssertionError)):
            adapters.run_get_batch(dataset, 2, 7, device)


def test_gradient_clipping():
    ours = [torch.nn.Parameter(torch.randn(5, 5)) for _ in range(6)]
    ours[-1].requires_grad_(False)
    theirs = [torch.nn.Parameter(p.detach().clone(), p.requires_grad) for p in ours]
    for group in (ours, theirs):
        torch.cat(group).sum().backward()
    adapters.run_gradient_clipping(iter(ours), 0.01)
    torch.nn.utils.clip_grad_norm_(theirs, 0.01)
    for a, b in zip(ours[:-1], theirs[:-1]):
        close(a.grad, b.grad)


def updates(optimizer_class, num_updates, model):
    torch.manual_seed(1)
    optimizer = optimizer_class(
        model.parameters(), lr=1e-3, weight_decay=0.01, betas=(0.9, 0.999), eps=1e-8
    )
    for _ in range(num_updates):
        optimizer.zero_grad()
        x = torch.rand(model.in_features)
        ((model(x) - torch.tensor([x[0] + x[1], -x[2]])) ** 2).sum().backward()
        optimizer.step()
    return optimizer


def test_adamw_equals_torch_over_a_thousand_updates():
    ours = torch.nn.Linear(3, 2)
    theirs = torch.nn.Linear(3, 2)
    theirs.load_state_dict(ours.state_dict())
    updates(adapters.get_adamw_cls(), 1000, ours)
    updates(torch.optim.AdamW, 1000, theirs)
    torch.testing.assert_close(ours.weight, theirs.weight, **MANY_UPDATES)
    torch.testing.assert_close(ours.bias, theirs.bias, **MANY_UPDATES)


def test_schedule():
    rates = [adapters.run_get_lr_cosine_schedule(it, 1.0, 0.1, 7, 21) for it in range(25)]
    assert rates[0] == 0 and rates[7] == 1.0 and rates[21:] == [0.1] * 4
    assert rates[14] == pytest.approx(0.55)
    assert rates[:8] == sorted(rates[:8]) and rates[7:] == sorted(rates[7:], reverse=True)


@pytest.mark.parametrize("as_file", [False, True], ids=["path", "file object"])
def test_checkpoint(tmp_path, as_file):
    model = torch.nn.Linear(3, 2)
    optimizer = updates(adapters.get_adamw_cls(), 10, model)
    target = io.BytesIO() if as_file else tmp_path / "model.pt"
    adapters.run_save_checkpoint(model, optimizer, 10, target)
    if as_file:
        target.seek(0)
    other = torch.nn.Linear(3, 2)
    other_optimizer = adapters.get_adamw_cls()(other.parameters(), lr=1.0)
    assert adapters.run_load_checkpoint(target, other, other_optimizer) == 10
    close(other.weight, model.weight)
    assert other_optimizer.state_dict()["param_groups"] == optimizer.state_dict()["param_groups"]
    for old, new in zip(optimizer.state.values(), other_optimizer.state.values(), strict=True):
        assert old["step"] == new["step"] == 10
        close(new["exp_avg_sq"], old["exp_avg_sq"])


def test_tokenizer(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("the cat sat on the mat the end " * 20, encoding="utf-8")
    vocab, merges = adapters.run_train_bpe(path, 280, ["<|x|>"], num_workers=1)
    tokenizer = adapters.get_tokenizer(vocab, merges, ["<|x|>"])
    assert tokenizer.decode(tokenizer.encode("the cat<|x|>")) == "the cat<|x|>"
    assert list(tokenizer.encode_iterable(["the c", "at"])) == tokenizer.encode("the cat")
