"""Several ranks give the gradients of one process."""

import pytest
import torch

from cs_lm.config.model import GPT2Config, ModelConfig
from cs_lm.data.batches import Batch
from cs_lm.distributed.data_parallel import DataParallel, GradientSum
from cs_lm.models.base import next_token_loss
from cs_lm.models.registry import build_model
from cs_lm.ops.reference import IGNORE_INDEX
from cs_lm.optim.adamw import AdamW
from cs_lm.training.step import accumulate_gradients, train_step
from tests.tolerances import DEEP, close

pytestmark = pytest.mark.xdist_group("ranks")
SHAPES = {
    "transformer": ModelConfig(
        vocab_size=101, context_length=16, d_model=24, num_layers=2, num_heads=3, d_ff=40
    ),
    "gpt2": GPT2Config(
        vocab_size=101, context_length=16, d_model=24, num_layers=2, num_heads=3, d_ff=40
    ),
}


def model_of(name):
    return build_model(SHAPES[name], generator=torch.Generator().manual_seed(1))


def batches_of(num_rows, num_batches=2):
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(101, (num_batches, num_rows, 17), generator=generator)
    targets = ids[:, :, 1:].clone()
    targets[:, 0, :9] = IGNORE_INDEX  # in the rows of one rank only
    return [Batch(one[:, :-1], two) for one, two in zip(ids, targets)]


def gradients(ranks, name, num_rows, bucket_bytes):
    """What a rank has after a backward pass over its rows of each batch, and a sum over ranks."""
    model = model_of(name)
    sharing = DataParallel(ranks, bucket_bytes)
    sharing.take_model(model)
    rows = ranks.world(torch.device("cpu")).share_of(num_rows)
    model.first_row = rows.start
    own = [Batch(*(x[rows] for x in batch)) for batch in batches_of(num_rows)]
    total = sharing.finish(*accumulate_gradients(model, own, sharing=sharing))
    gradients = {name: p.grad for name, p in model.named_parameters()}
    return torch.stack([x.double() for x in total]), gradients


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("bucket_bytes", (1, 4096, 1 << 30))
def test_gradients_are_those_of_one_process(pools, name, bucket_bytes):
    model, num_rows = model_of(name), 7
    sums = accumulate_gradients(model, batches_of(num_rows))
    for pool in (pools[2], pools[3]):
        found = pool.run(gradients, name, num_rows, bucket_bytes)
        for total, of_rank in found:
            assert total.tolist() == pytest.approx([x.item() for x in sums], rel=1e-6)
            for key, parameter in model.named_parameters():
                close(of_rank[key], parameter.grad, DEEP)
                assert torch.equal(of_rank[key], found[0][1][key])


def step_of(ranks, model, optimizer, batches, loss=next_token_loss):
    sharing = shared(ranks, model, optimizer)
    found = train_step(model, optimizer, batches, 1.0, loss, sharing=sharing)
    return found, sharing.differences()


def shared(ranks, model, optimizer):
    sharing = DataParallel(ranks)
    sharing.take_model(model)
    sharing.take(optimizer)
    sharing.begin()
    return sharing


def rows_of(ranks, model, num_rows):
    rows = ranks.world(torch.device("cpu")).share_of(num_rows)
    model.first_row = rows.start
    return [Batch(*(x[rows] for x in batch)) for batch in batches_of(num_rows)]


def one_bad_rank(ranks):
    """An update whose loss is not a number at rank 1 only."""
    model = model_of("transformer")
    optimizer = AdamW(model.parameters())

    def loss(model, batch):
        loss_sum, count = next_token_loss(model, batch)
        return loss_sum * (float("nan") if ranks.rank == 1 else 1.0), count

    before = [p.detach().clone() for p in model.parameters()]
    found, differing = step_of(ranks, model, optimizer, rows_of(ranks, model, 4), loss)
    changed = any(not torch.equal(p, old) for p, old in zip(model.parameters(), before))
    return [x.isfinite().item() for x in found], changed, differing


def test_a_number_that_is_not_finite_at_one_rank_stops_the_update_at_all(pools):
    for found in pools[2].run(one_bad_rank):
        assert found == ([False, False], False, [])


def other_weights(ranks):
    """Ranks begin with different weights; then one bit of one rank's moment flips."""
    model = build_model(
        SHAPES["transformer"], generator=torch.Generator().manual_seed(1 + ranks.rank)
    )
    optimizer = AdamW(model.parameters())
    _, equal = step_of(ranks, model, optimizer, rows_of(ranks, model, 5))
    sharing = shared(ranks, model, optimizer)
    if ranks.rank == 1:
        moment = optimizer.state[model.ln_final.weight]["exp_avg"]
        moment.view(torch.int32)[3] ^= 1
    return equal, sharing.differences()


def test_ranks_begin_with_equal_weights_and_one_bit_that_differs_is_found(pools):
    for pool in (pools[2], pools[3]):
        assert pool.run(other_weights) == [([], ["exp_avg of ln_final.weight"])] * pool.size


def partly_frozen(ranks):
    """Only rank 0 uses a parameter, no rank another one; one is frozen, one is tied."""
    used, unused, frozen, tied = (torch.nn.Parameter(torch.full((3,), 2.0)) for _ in range(4))
    frozen.requires_grad_(False)
    sharing = GradientSum([used, unused, frozen, tied, tied])
    sharing.begin_backward(is_last=True)
    loss = (tied * (frozen + tied)).sum() * (1 + ranks.rank)
    if ranks.is_first:
        loss = loss + used.sum()
    loss.backward()
    sharing.finish()
    return [None if p.grad is None else p.grad.tolist() for p in (used, unused, frozen, tied)]


def test_parameters_without_a_gradient_and_tied_ones(pools):
    for pool in (pools[2], pools[3]):
        total = sum(range(1, pool.size + 1))
        assert pool.run(partly_frozen) == [[[1.0] * 3, None, None, [6.0 * total] * 3]] * pool.size


def own_fault(ranks):
    """A fault of rank 1's own code, and one of its memory, beside ranks that are there."""
    messages = []
    if ranks.rank == 1:
        for error in (RuntimeError("shapes do not fit"), torch.OutOfMemoryError("no memory")):
            try:
                with ranks.communicating():
                    raise error
            except RuntimeError as found:
                messages.append(found is error)
    ranks.texts("all are there")
    return messages


def test_a_fault_of_ones_own_is_not_told_as_a_lost_rank(pools):
    assert pools[2].run(own_fault) == [[], [True, True]]
