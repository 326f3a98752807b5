"""Low-rank adaptation: the start, the merged model, what is trained."""

import pytest
import torch

from cs_lm.alignment.lora import LowRankAdapter
from cs_lm.config.model import GPT2Config, ModelConfig
from cs_lm.models.layers import Linear
from cs_lm.models.registry import build_model


@pytest.fixture(params=[ModelConfig, GPT2Config])
def config(request):
    return request.param(16, 2, 24, 300, 2, 64)


def model_of(config):
    return build_model(config, generator=torch.Generator().manual_seed(3)).eval()


IDS = torch.arange(40).view(2, 20) % 300


def test_it_begins_as_the_model_and_stays_equal_to_the_merged_one(config):
    plain, model = model_of(config), model_of(config)
    adapter = LowRankAdapter(model, rank=3, alpha=6.0, seed=0)
    assert torch.equal(model(IDS), plain(IDS))
    with torch.no_grad():
        for name, parameter in adapter.named_parameters():
            parameter += 0.1 * torch.randn(
                parameter.shape, generator=torch.Generator().manual_seed(len(name))
            )
    merged = adapter.merge()
    plain.load_state_dict(adapter.state_dict())
    assert torch.equal(merged(IDS), plain(IDS))
    matrices = adapter.matrices()
    layer = model.layers[0]
    name = next(n for n, m in layer.named_modules() if isinstance(m, Linear))
    own = "0_" + name.replace(".", "_")
    base = model_of(config).get_parameter(f"layers.0.{name}.weight")
    wanted = base + 6.0 / 3 * matrices[f"b_{own}"] @ matrices[f"a_{own}"]
    torch.testing.assert_close(plain.get_parameter(f"layers.0.{name}.weight"), wanted)


def test_only_the_matrices_get_gradients_and_they_are_right(config):
    """Against the model with the low-rank path beside each product, by autograd."""
    model = model_of(config)
    adapter = LowRankAdapter(model, rank=2, alpha=4.0, seed=0)
    with torch.no_grad():
        for name, parameter in adapter.named_parameters():
            if name.startswith("b_"):
                parameter.normal_(0, 0.1, generator=torch.Generator().manual_seed(len(name)))
    adapter.train()
    model.eval()
    adapter.merge()(IDS).float().log_softmax(-1)[..., 5].sum().backward()
    assert len(list(adapter.parameters())) == 2 * sum(
        isinstance(m, Linear) for m in model.layers.modules()
    )
    assert all(p.grad is None for p in model.parameters())
    found = {name: p.grad for name, p in adapter.named_parameters()}

    beside = model_of(config)

    def with_path(layer, a, b):
        base = layer.weight.detach()

        def forward(x):
            low = x @ a.T @ b.T * 2.0
            return x @ base.T + low + (0 if layer.bias is None else layer.bias.detach())

        return forward

    leaves = {}
    for name, layer in beside.layers.named_modules():
        if isinstance(layer, Linear):
            own = name.replace(".", "_")
            pair = [adapter.matrices()[f"{x}_{own}"].clone().requires_grad_() for x in "ab"]
            leaves[f"a_{own}"], leaves[f"b_{own}"] = pair
            layer.forward = with_path(layer, *pair)
    beside(IDS).float().log_softmax(-1)[..., 5].sum().backward()
    for name, leaf in leaves.items():
        torch.testing.assert_close(found[name], leaf.grad, rtol=1e-3, atol=1e-4)
