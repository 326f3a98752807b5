import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from cs_lm.ops import fused
from cs_lm.ops import reference as ops
from cs_lm.ops.fused import FAST
from cs_lm.ops.reference import CLEAR, IGNORE_INDEX
from tests.tolerances import ROUNDING, close

B, T, V = 2, 5, 17


def test_softmax_of_nothing_allowed_is_zero():
    x = torch.full((2, 3), -math.inf, requires_grad=True)
    result = ops.softmax(x)
    assert result.tolist() == [[0.0] * 3] * 2
    result.sum().backward()
    assert not x.grad.isnan().any()


@pytest.mark.parametrize("shift", [0.0, 1e4, -1e4])
def test_cross_entropy_is_exact_for_large_scores(shift):
    """log(2) and log(4), to the last bits of float32, wherever the scores stand."""
    logits = torch.full((2, 4), shift)
    logits[0, 2:] = -math.inf
    loss_sum, count = ops.cross_entropy(logits, torch.tensor([0, 3]))
    assert count.item() == 2
    assert loss_sum.item() == pytest.approx(math.log(2) + math.log(4), rel=2e-7)


def test_cross_entropy_of_an_impossible_target():
    logits = torch.tensor([[0.0, -math.inf]], requires_grad=True)
    loss_sum, _ = ops.cross_entropy(logits, torch.tensor([1]))
    assert loss_sum.item() == math.inf
    loss_sum, _ = ops.cross_entropy(logits, torch.tensor([0]))
    loss_sum.backward()
    assert loss_sum.item() == 0.0 and logits.grad.tolist() == [[0.0, 0.0]]


def test_cross_entropy_counts_what_is_not_ignored():
    logits = torch.randn(B, T, V)
    targets = torch.full((B, T), IGNORE_INDEX)
    loss_sum, count = ops.cross_entropy(logits, targets)
    assert (loss_sum.item(), count.item()) == (0.0, 0)
    targets[1, 2] = 3
    loss_sum, count = ops.cross_entropy(logits, targets)
    assert count.item() == 1
    close(loss_sum, -torch.log_softmax(logits, -1)[1, 2, 3])
    assert ops.cross_entropy(logits, torch.full((B, T), 7), ignore_index=7)[1].item() == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_scores_give_a_float32_loss(dtype):
    logits, targets = torch.randn(B, T, V).to(dtype), torch.randint(0, V, (B, T))
    loss_sum, _ = ops.cross_entropy(logits, targets)
    assert loss_sum.dtype == torch.float32
    close(loss_sum, ops.cross_entropy(logits.float(), targets)[0])
    assert ops.log_softmax(logits).dtype == torch.float32


@pytest.mark.parametrize("operation", [CLEAR.linear_cross_entropy, FAST.linear_cross_entropy])
@pytest.mark.parametrize("bad", [-1, V, 10**6])
def test_target_out_of_range(operation, bad):
    targets = torch.zeros(B, T, dtype=torch.int64)
    targets[1, 4] = bad
    with pytest.raises(ValueError, match=rf"got target {bad}, need an id in \[0, {V}\)"):
        operation(torch.randn(B, T, 3), torch.randn(V, 3), targets)
    with pytest.raises(ValueError, match=r"got targets of shape \(2, 4\), need \(2, 5\)"):
        operation(torch.randn(B, T, 3), torch.randn(V, 3), targets[:, :4])


def test_rms_norm_computes_in_float32():
    x = torch.full((4096,), 300.0, dtype=torch.float16)  # its square overflows float16
    result = ops.rms_norm(x, torch.ones(4096, dtype=torch.float16), 1e-5)
    assert result.dtype == torch.float16
    close(result, torch.ones(4096, dtype=torch.float16), {torch.float16: ROUNDING[torch.bfloat16]})
    x = torch.randn(3, 64).bfloat16()
    wide = ops.rms_norm(x.float(), torch.ones(64), 1e-5)
    assert torch.equal(ops.rms_norm(x, torch.ones(64).bfloat16(), 1e-5), wide.bfloat16())


def test_rope_keeps_length_and_depends_on_distance_alone():
    from cs_lm.models.layers import RoPE

    rope = RoPE(ops.inverse_frequencies(10_000.0, 8), 64)
    q, k = torch.randn(8), torch.randn(8)

    def product(m, n):
        return rope(q[None], torch.tensor([m]))[0] @ rope(k[None], torch.tensor([n]))[0]

    close(rope(q[None], torch.tensor([5])).norm(), q.norm())
    close(product(3, 10), product(40, 47), {torch.float32: {"rtol": 1e-4, "atol": 1e-5}})
    assert torch.equal(rope(q[None], torch.tensor([0]))[0], q)


def test_embedding_out_of_range():
    with pytest.raises(IndexError):
        ops.embedding(torch.tensor([V]), torch.randn(V, 3))


class LargestTensor(TorchDispatchMode):
    """Notes the size of the largest tensor that any operation gives while entered."""

    numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for each in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(each, torch.Tensor):
                self.numel = max(self.numel, each.numel())
        return result


@pytest.mark.parametrize("name, holds_all", [("clear", True), ("fast", False)])
def test_cross_entropy_never_holds_all_logits(name, holds_all, monkeypatch):
    """Neither forward nor backward; `python -m benchmarks.memory` has the megabytes."""
    num_rows, vocab_size, width = 64, 512, 8
    monkeypatch.setattr(fused, "BLOCK_LOGITS", 4 * vocab_size)  # blocks of four rows
    x, weight = torch.randn(num_rows, width), torch.randn(vocab_size, width)
    targets = torch.randint(0, vocab_size, (num_rows,))
    with LargestTensor() as largest:
        loss_sum, _ = fused.OPS[name].linear_cross_entropy(
            x.requires_grad_(), weight.requires_grad_(), targets
        )
        loss_sum.backward()
    assert (largest.numel >= num_rows * vocab_size) == holds_all
    assert holds_all or largest.numel == max(4, width) * vocab_size


def test_an_ignored_row_of_impossible_scores_leaves_no_nan():
    logits = torch.zeros(2, 3)
    logits[0] = -math.inf
    logits.requires_grad_()
    loss_sum, count = ops.cross_entropy(logits, torch.tensor([IGNORE_INDEX, 1]))
    loss_sum.backward()
    assert loss_sum.item() == pytest.approx(math.log(3)) and count.item() == 1
    assert not logits.grad.isnan().any() and logits.grad[0].eq(0).all()
