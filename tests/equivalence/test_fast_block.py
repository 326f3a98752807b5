"""The block as one operation, held to the block of separate ones."""

import pytest
import torch

from cs_lm.config.model import ModelConfig
from cs_lm.data.batches import Batch
from cs_lm.models.base import next_token_loss
from cs_lm.models.layers import Factory
from cs_lm.models.transformer import TransformerBlock, TransformerLM
from cs_lm.ops import tiled_attention
from cs_lm.ops.fused import FAST
from cs_lm.ops.fused_block import transformer_block
from cs_lm.ops.reference import CLEAR
from tests.tolerances import DEEP, close

B, T, D, H, F = 2, 5, 12, 3, 20
CONFIG = ModelConfig(D, H, F, 17, 2, 150)


def results(block, x, rotation, precision):
    """Output of the block, and the gradients of a fixed projection by input and weights."""
    x = x.detach().requires_grad_()
    block.zero_grad()
    with precision:
        output = block(x, rotation)
    generator = torch.Generator().manual_seed(5)
    weights = torch.randn(output.shape, generator=generator, dtype=torch.float64)
    (output * weights.to(output.dtype)).sum().backward()
    return [output.detach(), x.grad, *(p.grad for p in block.parameters())]


def block_and_rotation(ops, num_tokens, dtype):
    block = TransformerBlock(CONFIG, ops, factory=Factory(torch.Generator().manual_seed(3))).to(
        dtype
    )
    angle = torch.randn(num_tokens, D // H // 2, generator=torch.Generator().manual_seed(4))
    return block, (angle.cos().to(dtype), angle.sin().to(dtype))


@pytest.mark.parametrize("num_tokens", [T, 1, 150])  # 150: several tiles, the last one not full
@pytest.mark.parametrize("leading", [(), (B,), (B, 3)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_as_one_is_clear(dtype, leading, num_tokens, generator):
    x = torch.randn(*leading, num_tokens, D, generator=generator, dtype=torch.float64).to(dtype)
    found = []
    for ops in (FAST, CLEAR):
        block, rotation = block_and_rotation(ops, num_tokens, dtype)
        assert block.fused == (ops is FAST)
        found.append(results(block, x, rotation, torch.autocast("cpu", enabled=False)))
    for actual, expected in zip(*found, strict=True):
        close(actual, expected, DEEP)


def test_bfloat16_products(generator):
    """Under autocast: what the separate operations give, in the same precisions."""
    x = torch.randn(B, T, D, generator=generator)
    found = []
    for fused in (True, False):
        block, rotation = block_and_rotation(FAST, T, torch.float32)
        block.fused = fused
        found.append(results(block, x, rotation, torch.autocast("cpu", torch.bfloat16)))
    for actual, expected in zip(*found, strict=True):
        assert actual.dtype == expected.dtype == torch.float32
        close(actual, expected, DEEP, torch.bfloat16)


def test_gradients_are_the_numeric_ones(generator):
    block, rotation = block_and_rotation(FAST, T, torch.float64)
    x = torch.randn(B, T, D, generator=generator, dtype=torch.float64, requires_grad=True)
    gains = [(torch.rand(D, generator=generator).double() + 0.5).requires_grad_() for _ in "12"]
    layers = block.attn.q_proj, block.attn.k_proj, block.attn.v_proj, block.attn.output_proj
    layers += block.ffn.w1, block.ffn.w2, block.ffn.w3

    def operation(x, *parameters):
        return transformer_block(x, *rotation, H, (1e-5, 1e-5), parameters[:2], parameters[2:])

    inputs = (x, *gains, *(layer.weight for layer in layers))
    assert torch.autograd.gradcheck(operation, inputs, fast_mode=True)


@pytest.mark.parametrize("what", ["token_positions", "mask"])
def test_what_it_cannot_do_goes_the_plain_way(what, generator):
    """A mask, or positions of their own for each row, with gradients: not ignored."""
    ids = torch.randint(0, 17, (B, T), generator=generator)
    options = {
        "token_positions": torch.stack((torch.arange(T), 3 * torch.arange(T))),
        "mask": torch.rand(B, T, T, generator=generator) > 0.3,
    }
    scores = []
    for ops in (FAST, CLEAR):
        model = TransformerLM(CONFIG, ops, generator=torch.Generator().manual_seed(0))
        scores.append(model(ids, **{what: options[what]}).detach())
        assert (model(ids).detach() - scores[-1]).abs().max() > 1e-3
    close(*scores, DEEP)


@pytest.mark.parametrize("leading", [(B,), (5,)], ids=str)
def test_many_small_tiles_and_parts_are_as_good(leading, small_tiles, generator):
    x = torch.randn(*leading, 23, D, generator=generator, dtype=torch.float64)
    found = []
    for ops in (FAST, CLEAR):
        block, rotation = block_and_rotation(ops, 23, torch.float64)
        found.append(results(block, x, rotation, torch.autocast("cpu", enabled=False)))
    for actual, expected in zip(*found, strict=True):
        close(actual, expected, DEEP)


def test_the_model_trains_with_it(monkeypatch, generator):
    calls = []
    forward = tiled_attention.attention_forward
    monkeypatch.setattr(
        "cs_lm.ops.fused_block.attention_forward", lambda *a: calls.append(1) or forward(*a)
    )
    ids = torch.randint(0, 17, (B, T), generator=generator)
    next_token_loss(TransformerLM(CONFIG), Batch(ids, ids))
    assert len(calls) == CONFIG.num_layers
