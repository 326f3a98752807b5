"""The functions of an assignment's suite about many machines, against torch on one process."""

import os

import pytest
import torch
from torch import nn

from tests import adapters
from tests.tolerances import DEEP, close

pytestmark = pytest.mark.xdist_group("ranks")
NUM_ROWS, STEPS = 6, 4


class Toy(nn.Module):
    """Has a tied weight, a frozen one and a buffer."""

    def __init__(self, seed, bias=True):
        super().__init__()
        torch.manual_seed(seed)
        self.first, self.last = nn.Linear(5, 7, bias=bias), nn.Linear(7, 5, bias=False)
        self.last.weight = nn.Parameter(self.last.weight)
        self.again = nn.Linear(5, 7, bias=bias)
        self.again.weight = self.first.weight
        self.frozen = nn.Parameter(torch.tensor([2.0]), requires_grad=False)
        self.register_buffer("shift", torch.randn(5))

    def forward(self, x):
        x = self.last(self.first(x).relu()) + self.shift
        return self.last(self.again(x).relu()) * self.frozen


def data():
    generator = torch.Generator().manual_seed(3)
    return torch.randn(2, STEPS, NUM_ROWS, 5, generator=generator)


def loss_of(model, x, y):
    return (model(x) - y).square().mean()


def learn(model, optimizer, rows=slice(None), after_backward=lambda: None):
    """Makes the updates of all steps; the learning rate of each group falls."""
    for number, (x, y) in enumerate(zip(*data())):
        optimizer.zero_grad()
        for group in optimizer.param_groups:
            group["lr"] *= 1 - 0.1 * number
        loss_of(model, x[rows], y[rows]).backward()
        after_backward()
        optimizer.step()


def replicated(ranks):
    model = adapters.get_ddp(Toy(seed=ranks.rank))  # rank 0's weights count
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    own = slice(ranks.rank * NUM_ROWS // ranks.size, (ranks.rank + 1) * NUM_ROWS // ranks.size)
    learn(model, optimizer, own, lambda: adapters.ddp_on_after_backward(model, optimizer))
    return model.module.state_dict()


def test_ddp_learns_like_one_process(pools):
    model = Toy(seed=0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    learn(model, optimizer)
    for pool in (pools[2], pools[3]):
        for found in pool.run(replicated):
            for name, wanted in model.state_dict().items():
                close(found[name], wanted, DEEP)


def sharded(ranks, compute_dtype):
    """In another dtype the layers have no bias, which would stay float32."""
    model = adapters.get_fsdp(Toy(ranks.rank, bias=compute_dtype is None), compute_dtype)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    own = slice(ranks.rank * NUM_ROWS // ranks.size, (ranks.rank + 1) * NUM_ROWS // ranks.size)
    learn(model, optimizer, own, lambda: adapters.fsdp_on_after_backward(model, optimizer))
    shapes = {name: (p.shape, p.dtype, p.grad.shape, p.grad.dtype)
              for name, p in model.module.named_parameters() if p.grad is not None}  # fmt: skip
    return adapters.fsdp_gather_full_params(model), shapes


@pytest.mark.parametrize("compute_dtype", (None, torch.bfloat16))
def test_fsdp_learns_like_one_process(pools, compute_dtype):
    """Each rank has its rows of the linear layers' weights, in float32, and all of the rest."""
    model = Toy(seed=0, bias=compute_dtype is None)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    learn(model, optimizer)
    for pool in (pools[2], pools[3]):
        found = pool.run(sharded, compute_dtype)
        for whole, shapes in found:
            for name, wanted in model.named_parameters(remove_duplicate=False):
                close(whole[name], wanted.detach(), DEEP, compute_dtype)
            for shape, dtype, grad_shape, grad_dtype in shapes.values():
                assert shape == grad_shape and dtype == grad_dtype == torch.float32
        rows = [shapes["first.weight"][0][0] for _, shapes in found]
        assert sum(rows) == 7 and max(rows) == -(-7 // pool.size)
        if compute_dtype is None:
            assert all(shapes["first.bias"][0] == (7,) for _, shapes in found)


def shared_updates(ranks):
    model = Toy(seed=0)
    halves = [p for p in model.parameters() if p.requires_grad]
    optimizer = adapters.get_sharded_optimizer(
        halves[:2], torch.optim.AdamW, lr=0.1, weight_decay=0.1
    )
    optimizer.add_param_group({"params": halves[2:], "lr": 0.05})
    learn(model, optimizer)
    held = sum(len(state) for state in optimizer._own.state.values()) if optimizer._own else 0
    return model.state_dict(), held


def test_the_sharded_optimizer_makes_the_updates_of_the_whole_one(pools):
    model = Toy(seed=0)
    halves = [p for p in model.parameters() if p.requires_grad]
    groups = [{"params": halves[:2]}, {"params": halves[2:], "lr": 0.05}]
    optimizer = torch.optim.AdamW(groups, lr=0.1, weight_decay=0.1)
    learn(model, optimizer)
    whole = sum(len(state) for state in optimizer.state.values())
    for pool in (pools[2], pools[3]):
        found = pool.run(shared_updates)
        assert sum(held for _, held in found) == whole
        for weights, held in found:
            assert held < whole
            for name, wanted in model.state_dict().items():
                torch.testing.assert_close(weights[name], wanted, rtol=1e-7, atol=0)


@pytest.mark.parametrize("is_causal", (False, True))
def test_attention_saves_one_log_sum_exp_a_row(is_causal):
    check_attention(adapters.get_flashattention_autograd_function_pytorch(), is_causal)


@pytest.mark.parametrize("is_causal", (False, True))
def test_attention_in_triton(is_causal):
    pytest.importorskip("triton", reason="needs triton, which torch for CUDA brings")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("needs CUDA, or TRITON_INTERPRET=1")
    function = adapters.get_flashattention_autograd_function_triton()
    check_attention(function, is_causal, device)


def check_attention(function, is_causal, device="cpu"):
    generator = torch.Generator().manual_seed(1)
    q, k, v, grad = (torch.randn(2, 96, 16, generator=generator).to(device) for _ in range(4))
    leaves = [x.requires_grad_() for x in (q, k, v)]
    output = function.apply(*leaves, is_causal)
    saved = [x for x in output.grad_fn.saved_tensors if x.shape == (2, 96)]
    scores = q @ k.mT / 4
    if is_causal:
        scores = scores.masked_fill(torch.ones(96, 96, device=device).triu(1).bool(), -torch.inf)
    assert len(saved) == 1
    close(saved[0], scores.logsumexp(-1), DEEP)
    wanted = scores.softmax(-1) @ v
    close(output, wanted, DEEP)
    found = torch.autograd.grad(output, leaves, grad)
    for one, other in zip(found, torch.autograd.grad(wanted, leaves, grad)):
        close(one, other, DEEP)
