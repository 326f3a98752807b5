"""However a block is changed: in training it computes what it computes in evaluation."""

import pytest
import torch
from torch import nn

from cs_lm.config.model import ModelConfig
from cs_lm.data.batches import Batch
from cs_lm.inference.decoding_config import DecodingConfig
from cs_lm.inference.generate import generate
from cs_lm.models.base import next_token_loss
from cs_lm.models.layers import Linear, RMSNorm, SwiGLU
from cs_lm.models.transformer import TransformerBlock, TransformerLM
from cs_lm.ops.fused import FAST
from cs_lm.ops.reference import CLEAR, cross_entropy

CONFIG = ModelConfig(
    d_model=12, num_heads=2, d_ff=20, vocab_size=17, num_layers=1, context_length=8
)


class Doubled(Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class Wrapped(nn.Module):
    """As adapters are put around a layer."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x) + x.sum(-1, keepdim=True)


class OtherFeedForward(SwiGLU):
    def forward(self, x):
        return super().forward(x) + 1


def bias(block):
    block.attn.output_proj.bias = nn.Parameter(torch.ones(12))


def bias_in_feed_forward(block):
    block.ffn.w1.bias = nn.Parameter(torch.ones(20))


def wrapped_in_feed_forward(block):
    block.ffn.w3 = Wrapped(block.ffn.w3)


def second_eps(block):
    block.ln2.eps = 1.0


def first_eps(block):
    block.ln1.eps = 1.0


def subclass(block):
    block.ffn.w1.__class__ = Doubled


def other_feed_forward(block):
    block.ffn.__class__ = OtherFeedForward


def wrapped(block):
    block.attn.q_proj = Wrapped(block.attn.q_proj)


def forward_hook(block):
    block.ffn.w2.register_forward_hook(lambda _module, _inputs, output: output + 3)


def forward_pre_hook(block):
    block.attn.register_forward_pre_hook(lambda _module, inputs: (inputs[0] * 2, *inputs[1:]))


def own_forward(block):
    block.ln1.forward = lambda x: x + 1


def other_norm(block):
    block.ln2 = nn.LayerNorm(12)


def clear_ops(block):
    block.ffn.ops = CLEAR._replace(swiglu=lambda x, *w: CLEAR.swiglu(x, *w) + 1)


CHANGES = [
    bias,
    bias_in_feed_forward,
    wrapped_in_feed_forward,
    second_eps,
    first_eps,
    subclass,
    other_feed_forward,
    wrapped,
    forward_hook,
    forward_pre_hook,
    own_forward,
    other_norm,
    clear_ops,
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_training_computes_what_evaluation_does(change, generator):
    model = TransformerLM(CONFIG, FAST, generator=generator)
    ids = torch.tensor([[1, 2, 3, 4, 5]])
    before = model(ids).detach()
    change(model.layers[0])
    training = model(ids)
    with torch.no_grad():
        evaluation = model(ids)
    torch.testing.assert_close(training.detach(), evaluation, rtol=1e-5, atol=1e-5)
    assert (training.detach() - before).abs().max() > 1e-3, "the change has an effect"


@pytest.mark.parametrize("change", ["bias", "hook", "wrapped"])
def test_a_changed_head_counts_in_the_loss_and_in_decoding(change, generator):
    model = TransformerLM(CONFIG, FAST, generator=generator)
    ids, targets = torch.tensor([[1, 2, 3]]), torch.tensor([[4, 5, 6]])
    before = next_token_loss(model, Batch(ids, targets))[0].item()
    if change == "bias":
        model.lm_head.bias = nn.Parameter(torch.arange(17.0))
    elif change == "hook":
        model.lm_head.register_forward_hook(lambda _module, _inputs, output: 2 * output)
    else:
        model.lm_head.__class__ = Doubled
    loss = next_token_loss(model, Batch(ids, targets))[0].item()
    assert loss == pytest.approx(loss_of(model(ids), targets), rel=1e-5)
    assert abs(loss - before) > 1e-3
    (new,) = generate(model, [[1, 2, 3]], DecodingConfig(max_new_tokens=1, temperature=0))
    assert new == [int(model(ids)[0, -1].argmax())]


def loss_of(logits, targets):
    return cross_entropy(logits, targets)[0].item()


def test_backward_hooks_are_called(generator):
    model = TransformerLM(CONFIG, FAST, generator=generator)
    called = []
    for module in (model.layers[0].ffn, model.layers[0].attn.k_proj):
        module.register_full_backward_hook(lambda *_: called.append(1))
    model(torch.tensor([[1, 2, 3]])).sum().backward()
    assert len(called) == 2


def test_a_block_as_it_was_made_runs_as_one(generator, monkeypatch):
    """What all of this is not to take away."""
    calls = []
    fused = TransformerBlock._fused_forward
    monkeypatch.setattr(
        TransformerBlock,
        "_fused_forward",
        lambda self, *given: calls.append(1) or fused(self, *given),
    )
    model = TransformerLM(CONFIG, FAST, generator=generator)
    second_eps(model.layers[0])  # two epsilons are no obstacle
    model(torch.tensor([[1, 2]]))
    assert calls == [1] and type(model.layers[0].ln1) is RMSNorm
