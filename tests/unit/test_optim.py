import copy
import functools
import math

import pytest
import torch
from torch._dynamo.utils import counters

from cs_lm.config.model import ModelConfig
from cs_lm.config.optim import OptimConfig
from cs_lm.models.transformer import TransformerLM
from cs_lm.optim.adamw import AdamW
from cs_lm.optim.clip import clip_gradients
from cs_lm.optim.param_groups import parameter_groups
from cs_lm.optim.schedule import learning_rate
from tests.conftest import no_compiler
from tests.tolerances import MANY_UPDATES, close


def parameters(seed=0):
    torch.manual_seed(seed)
    return [torch.nn.Parameter(torch.randn(5, 7)), torch.nn.Parameter(torch.randn(3))]


def run(optimizer, params, num_updates, seed=1):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(num_updates):
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator) * 3
        optimizer.step()


def test_equal_to_torch_with_groups():
    ours, theirs = parameters(), parameters()
    for params, optimizer_class in ((ours, AdamW), (theirs, torch.optim.AdamW)):
        groups = [
            {"params": params[:1], "weight_decay": 0.3, "lr": 3e-3},
            {"params": params[1:], "betas": (0.5, 0.7), "eps": 1e-3},
        ]
        run(optimizer_class(groups, lr=1e-2, weight_decay=0.0), params, 1000)
    for a, b in zip(ours, theirs):
        torch.testing.assert_close(a, b, **MANY_UPDATES)


def test_state_is_lazy_and_updates_are_in_place():
    params = parameters()
    optimizer = AdamW(params)
    assert not optimizer.state
    places = [p.data_ptr() for p in params]
    params[0].grad = torch.ones_like(params[0])
    before = params[1].detach().clone()
    optimizer.step()
    assert set(optimizer.state) == {params[0]}, "no gradient, no state"
    assert torch.equal(params[1], before)
    assert [p.data_ptr() for p in params] == places


def test_state_dict_round_trip_goes_on_identically():
    first, second = parameters(), parameters()
    optimizer = AdamW(first)
    run(optimizer, first, 5)
    other = AdamW(second)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))  # as from a file
    for a, b in zip(first, second):
        b.data.copy_(a)
    run(optimizer, first, 5, seed=2)
    run(other, second, 5, seed=2)
    assert all(torch.equal(a, b) for a, b in zip(first, second))


@pytest.mark.parametrize("has_compiler", [True, False])
def test_compiled_steps_are_the_same_and_compiled_once(monkeypatch, has_compiler):
    """Also where the learning rate and the corrections of the bias change from step to step."""
    compiled = functools.partial(torch.compile, backend="aot_eager")  # needs no compiler
    monkeypatch.setattr(torch, "compile", compiled if has_compiler else no_compiler)
    torch._dynamo.reset()  # what other tests compiled
    counters.clear()
    said, ours, theirs = [], parameters(), parameters()
    for params, optimizer_class in ((ours, AdamW), (theirs, torch.optim.AdamW)):
        optimizer = optimizer_class(params, weight_decay=0.3)
        if optimizer_class is AdamW:
            optimizer.compile(said.append)
        for seed in range(5):
            optimizer.param_groups[0]["lr"] = 1e-2 / (seed + 1)
            run(optimizer, params, 1, seed)
    for a, b in zip(ours, theirs):
        torch.testing.assert_close(a, b, **MANY_UPDATES)
    assert len(said) == (not has_compiler) and not counters["graph_break"]
    assert counters["stats"]["unique_graphs"] == has_compiler


def test_closure():
    params = parameters()
    optimizer = AdamW(params)

    def closure():
        optimizer.zero_grad()
        loss = sum((p**2).sum() for p in params)
        loss.backward()
        return loss

    losses = [optimizer.step(closure).item() for _ in range(3)]
    assert losses[0] > losses[1] > losses[2]


@pytest.mark.parametrize(
    "setting",
    [
        {"lr": -1.0},
        {"eps": -1.0},
        {"weight_decay": -0.1},
        {"betas": (0.9, 1.0)},
        {"betas": (0.9,)},
        {"lr": math.nan},
    ],
)
def test_bad_settings(setting):
    with pytest.raises(ValueError, match=r"AdamW: got (lr|eps|weight_decay|betas) .*, need"):
        AdamW(parameters(), **setting)


def test_norms_and_embeddings_do_not_decay():
    model = TransformerLM(ModelConfig(12, 3, 20, 17, 2, 11))
    decayed, spared = parameter_groups(model, 0.1)
    names = {id(p): name for name, p in model.named_parameters()}
    spared_names = {names[id(p)] for p in spared["params"]}
    assert decayed["weight_decay"] == 0.1 and spared["weight_decay"] == 0.0
    assert len(decayed["params"]) + len(spared["params"]) == len(names)
    assert spared_names == {n for n in names.values() if "ln" in n or "embeddings" in n}


def test_clip_is_one_norm_over_all_gradients():
    ours, theirs = parameters(), parameters()
    for group in (ours, theirs):
        for p in group:
            p.grad = p.detach().clone() * 10
    norm = clip_gradients((p for p in ours), 1.5)
    expected = torch.nn.utils.clip_grad_norm_(theirs, 1.5)
    close(norm, expected)
    for a, b in zip(ours, theirs):
        close(a.grad, b.grad)


def test_clip_leaves_small_gradients_and_infinity_alone():
    params = parameters()
    params[0].grad = torch.full_like(params[0], 0.1)
    clip_gradients(params, 100.0)
    clip_gradients(params, math.inf)
    assert (params[0].grad == 0.1).all()
    assert clip_gradients([], 1.0).item() == 0.0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_clip_of_other_types(dtype):
    params = [torch.nn.Parameter(torch.zeros(1000, dtype=dtype))]
    params[0].grad = torch.full((1000,), 2.0, dtype=dtype)
    assert clip_gradients(params, 1.0).item() == pytest.approx(2 * math.sqrt(1000), rel=1e-6)
    assert params[0].grad.float().norm().item() == pytest.approx(1.0, rel=1e-2)


def test_learning_rate_at_the_stated_steps():
    optim = OptimConfig(lr=1.0, lr_min=0.1, warmup_ratio=0.1, warmfix_ratio=0.9)
    rates = [learning_rate(step, 100, optim) for step in range(120)]
    assert rates[0] == pytest.approx(0.1), "lr / w: the first update is not wasted"
    assert rates[9] == 1.0 and rates[8] < 1.0
    assert 0.99 < rates[10] < 1.0
    assert rates[49] == pytest.approx(0.55)
    assert rates[88] > 0.1 and rates[89:] == [0.1] * 31
    assert max(rates) == 1.0


def test_learning_rate_without_warm_up_or_cosine():
    flat = OptimConfig(lr=1.0, lr_min=0.5, warmup_ratio=0.0, warmfix_ratio=0.0)
    assert [learning_rate(s, 10, flat) for s in (0, 9)] == [0.5, 0.5]
    warm = OptimConfig(lr=1.0, lr_min=0.5, warmup_ratio=1.0, warmfix_ratio=1.0)
    assert [learning_rate(s, 10, warm) for s in (0, 4, 8, 9)] == [0.1, 0.5, 0.9, 1.0]
    assert learning_rate(0, 1, OptimConfig()) > 0


def test_short_runs_reach_the_highest_rate():
    for num_steps in (1, 2, 5, 10):
        for warmup in (0.0, 0.1, 0.5):
            optim = OptimConfig(lr=1.0, lr_min=0.0, warmup_ratio=warmup, warmfix_ratio=0.5)
            rates = [learning_rate(step, num_steps, optim) for step in range(num_steps)]
            if num_steps > 1:
                assert max(rates) == 1.0 and rates[0] > 0, (num_steps, warmup, rates)
    one = OptimConfig(lr=1.0, lr_min=0.0)
    assert learning_rate(0, 1, one) == 1.0


def test_an_update_that_shall_not_apply_changes_nothing_but_the_count():
    """However bad the gradients are, whether the flag may be read or not."""
    for apply in (torch.tensor(False), gate(False)):
        params = parameters()
        optimizer = AdamW(params, lr=1e-2, weight_decay=0.5)
        run(optimizer, params, 3)
        before = [p.detach().clone() for p in params]
        moments = copy.deepcopy(list(optimizer.state.values()))
        for p in params:
            p.grad = torch.full_like(p, math.nan)
        optimizer.step(should_apply=apply)
        for old, new, moment, p in zip(before, params, moments, params):
            state = optimizer.state[p]
            assert torch.equal(old, new) and state["step"] == 4
            assert torch.equal(moment["exp_avg"], state["exp_avg"])
            assert torch.equal(moment["exp_avg_sq"], state["exp_avg_sq"])


def test_an_update_behind_a_flag_is_the_update():
    plain, flagged = parameters(), parameters()
    for params, apply in ((plain, None), (flagged, gate(True))):
        optimizer = AdamW(params, lr=1e-2, weight_decay=0.5)
        generator = torch.Generator().manual_seed(1)
        for _ in range(20):
            for p in params:
                p.grad = torch.randn(p.shape, generator=generator)
            optimizer.step(should_apply=apply)
    for a, b in zip(plain, flagged):
        torch.testing.assert_close(a, b, **MANY_UPDATES)


class Gate(torch.Tensor):
    """A flag on the CPU that says it is elsewhere: the optimizer may not read it."""

    device = torch.device("meta")

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        assert function not in (torch.Tensor.item, torch.Tensor.__bool__), "it was read"
        result = super().__torch_function__(function, types, args, kwargs or {})
        return result.as_subclass(torch.Tensor) if isinstance(result, Gate) else result


def gate(value):
    return torch.tensor(value).as_subclass(Gate)


@pytest.mark.parametrize("numel", [1000, 1 << 16, 4_000_001, 40_000_000])
def test_the_norm_of_many_numbers(numel):
    """Within 1e-6, however many squares are summed."""
    parameter = torch.zeros(numel)
    parameter.grad = torch.full((numel,), 0.1)
    parameter.grad[::3] = -0.3
    exact = parameter.grad.double().square().sum().sqrt().item()
    assert abs(clip_gradients([parameter], float("inf")).item() / exact - 1) < 1e-6


def test_the_norm_of_a_gradient_that_does_not_lie_in_order():
    parameter = torch.zeros(300, 700)
    parameter.grad = torch.arange(210_000.0).view(700, 300).T
    exact = parameter.grad.double().square().sum().sqrt().item()
    assert abs(clip_gradients([parameter], float("inf")).item() / exact - 1) < 1e-6
