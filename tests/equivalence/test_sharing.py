"""All ways to share a model among ranks make the updates of one process."""

import pytest
import torch

from cs_lm.config.model import GPT2Config, ModelConfig
from cs_lm.config.optim import OptimConfig
from cs_lm.data.batches import Batch
from cs_lm.distributed.data_parallel import DataParallel
from cs_lm.distributed.fully_sharded import FullySharded
from cs_lm.distributed.grid import Team, grid_of
from cs_lm.distributed.model_parallel import ModelParallel
from cs_lm.distributed.pipeline import stage_layers
from cs_lm.distributed.sharded_moments import ShardedMoments
from cs_lm.distributed.sharing import Sharing
from cs_lm.models.base import next_token_loss
from cs_lm.models.registry import build_model
from cs_lm.ops.reference import IGNORE_INDEX
from cs_lm.optim.param_groups import adamw_of, names_in_groups
from cs_lm.training.step import train_step, under_autocast

pytestmark = pytest.mark.xdist_group("ranks")
CPU = torch.device("cpu")
# Tables of LARGE rows have more numbers than AdamW takes at once on a CPU, and 2 and 3 divide their
# rows. Nothing divides V.
LARGE, V = 9000, 301
SHAPE = {"context_length": 16, "d_model": 32, "num_layers": 3, "num_heads": 4, "d_ff": 40}
SHAPES = {
    "transformer": ModelConfig(vocab_size=V, **SHAPE),
    "large": ModelConfig(vocab_size=LARGE, **SHAPE),
    "gpt2": GPT2Config(vocab_size=V, **SHAPE),
}
KINDS = ("ddp", "moments", "fsdp", "fsdp recomputed", "hybrid")
# number of ranks, of which so many share weights and positions, and how the others share the rest
MODEL_PARALLEL = {
    "tensor": (2, (2, 1, 1), "ddp"), "context": (2, (1, 2, 1), "ddp"),
    "pipeline": (2, (1, 1, 2), "ddp"), "3 stages": (3, (1, 1, 3), "ddp"),
    "4 tensor": (4, (4, 1, 1), "ddp"), "tensor x context": (4, (2, 2, 1), "ddp"),
    "tensor x pipeline": (4, (2, 1, 2), "ddp"), "context x pipeline": (4, (1, 2, 2), "ddp"),
    "rows x tensor": (4, (2, 1, 1), "ddp"), "rows x context": (4, (1, 2, 1), "ddp"),
    "rows x pipeline": (4, (1, 1, 2), "ddp"), "fsdp x tensor": (4, (2, 1, 1), "fsdp"),
    "fsdp x context": (4, (1, 2, 1), "fsdp"), "moments x tensor": (4, (2, 1, 1), "moments"),
    "moments x pipeline": (4, (1, 1, 2), "moments"), "fsdp x pipeline": (4, (1, 1, 2), "fsdp"),
}  # fmt: skip
STEPS, ROWS = 3, 7
OPTIM = OptimConfig(lr=2e-3, weight_decay=0.1)


def batches_of(step):
    generator = torch.Generator().manual_seed(step)
    ids = torch.randint(V - 1, (2, ROWS, 17), generator=generator)
    targets = ids[:, :, 1:].clone()
    targets[:, 0, :9] = IGNORE_INDEX  # in the rows of one rank only
    return [Batch(one[:, :-1], two) for one, two in zip(ids, targets)]


def sharing_of(kind, ranks):
    if kind == "ddp":
        return DataParallel(ranks, 4096)
    if kind == "moments":
        return ShardedMoments(ranks, 4096)
    replicas = 2 if kind == "hybrid" else 1
    return FullySharded(ranks, CPU, replicas, recompute=kind == "fsdp recomputed")


def order_of(config):
    return names_in_groups(build_model(config, device="meta"), 0.1)


def shared(ranks, kind, shape):
    """A model and its optimizer, which sharing has taken, and this rank's rows of a batch."""
    of_rows = ranks
    if kind in MODEL_PARALLEL:
        _, sizes, inner = MODEL_PARALLEL[kind]
        grid = grid_of(ranks, *sizes)
        of_rows, config = grid.rows, SHAPES[shape]
        sharing = ModelParallel(
            sharing_of(inner, grid.data), ranks, grid, config.num_layers, order_of(config)
        )
    else:
        sharing = Sharing() if kind == "one" else sharing_of(kind, ranks)
    model = build_model(
        SHAPES[shape], generator=torch.Generator().manual_seed(1), finish_layer=sharing.finish_layer
    )
    sharing.take_model(model)
    optimizer = adamw_of(model, OPTIM)
    sharing.take(optimizer)
    rows = range(ROWS) if kind == "one" else of_rows.world(CPU).share_of(ROWS)
    model.first_row = rows.start
    return model, optimizer, sharing, slice(rows.start, rows.stop)


def updates(
    model, optimizer, sharing, rows, steps,
    keep_gradients=lambda sharing: None, loss_of=next_token_loss,
):  # fmt: skip
    """Losses and norms of these steps; the gradients of the first one go to keep_gradients."""
    found = []
    for step in steps:
        model.seed_dropout(step)
        whole = [Batch(*(x[rows] for x in batch)) for batch in batches_of(step)]
        batches = [Batch(*sharing.part_of_batch(*batch)) for batch in whole]
        loss, norm = train_step(model, optimizer, batches, 0.5, loss_of, sharing=sharing)
        if not found:
            keep_gradients(sharing)
        found.append((loss.item(), norm.item()))
        with torch.no_grad():  # an evaluation between updates
            sharing.of_whole_rows(next_token_loss)(model, whole[0])
    return found


def trained(ranks, kind, shape):
    """Losses, norms, weights and moments after some updates, each rank with its rows."""
    model, optimizer, sharing, rows = shared(ranks, kind, shape)
    sharing.begin()
    gradients = {}

    def keep(sharing):
        for name, tensor in sharing.optimized().items():
            place = sharing.place_of(tensor)
            gradients["gradient", name] = place._replace(tensor=tensor.grad.clone())

    found = updates(model, optimizer, sharing, rows, range(STEPS), keep)
    moments = {
        (number, name): value
        for number, state in sharing.saved_moments()["state"].items()
        for name, value in state.items() if name != "step"
    }  # fmt: skip
    parts = {**sharing.saved(), **moments}
    detached = {name: part._replace(tensor=part.tensor.clone()) for name, part in parts.items()}
    return found, detached, gradients, sharing.differences()


def assembled(parts_of_ranks):
    """Whole tensors from the parts of all ranks, each number of which is there once."""
    wholes, counts = {}, {}
    for parts in parts_of_ranks:
        for name, (tensor, start, shape) in parts.items():
            whole = wholes.setdefault(name, torch.zeros(shape, dtype=tensor.dtype))
            count = counts.setdefault(name, torch.zeros(shape))
            place = tuple(slice(a, a + n) for a, n in zip(start, tensor.shape))
            whole[place] = tensor
            count[place] += 1
    return wholes, counts


@pytest.fixture(scope="module")
def alone():
    """The updates of one process, by shape."""
    return {shape: trained(None, "one", shape) for shape in SHAPES}


# Each kind once; whoever changes one of them runs it with every shape and number of ranks.
CASES = [
    ("ddp", "transformer", 3), ("moments", "gpt2", 3), ("moments", "large", 2),
    ("fsdp", "gpt2", 3), ("fsdp", "large", 2), ("fsdp recomputed", "transformer", 2),
    ("hybrid", "gpt2", 4), ("3 stages", "transformer", 3), ("tensor x context", "transformer", 4),
    ("tensor x pipeline", "transformer", 4), ("context x pipeline", "transformer", 4),
    ("rows x tensor", "transformer", 4), ("fsdp x tensor", "transformer", 4),
    ("moments x pipeline", "transformer", 4), ("fsdp x pipeline", "transformer", 4),
]  # fmt: skip
QUICK = {("ddp", 3), ("moments", 3), ("fsdp", 2), ("fsdp recomputed", 2), ("3 stages", 3)}
CASES = [
    pytest.param(*case, marks=() if case[::2] in QUICK else pytest.mark.slow) for case in CASES
]


@pytest.mark.parametrize(("kind", "shape", "size"), CASES)
def test_updates_are_those_of_one_process(pools, alone, kind, shape, size):
    wanted, own, own_gradients, _ = alone[shape]
    found = pools[size].run(trained, kind, shape)
    for of_rank, _, _, differing in found:
        assert differing == []
        for (loss, norm), (other_loss, other_norm) in zip(of_rank, wanted):
            assert loss == pytest.approx(other_loss, rel=1e-6, abs=1e-6)
            assert norm == pytest.approx(other_norm, rel=1e-5)
    if kind == "ddp":
        wholes, counts = assembled([found[0][1]])
    else:
        wholes, counts = assembled([parts for _, parts, _, _ in found])
    assert wholes.keys() == own.keys()
    for name, whole in wholes.items():
        assert (counts[name] == 1).all(), name
        error = (whole - own[name].tensor).abs().max()
        assert error <= 1e-3, (name, error)  # Adam turns rounding near 0 into signs
        if whole.numel() > 1 << 18 and not isinstance(name, tuple):
            first = build_model(SHAPES[shape], generator=torch.Generator().manual_seed(1))
            moved = (whole - first.state_dict()[name]).abs().amax()
            assert moved > 1e-3, f"{name} has not moved"
    gradients, _ = assembled([gradients for _, _, gradients, _ in found])
    assert gradients.keys() == own_gradients.keys()
    for name, gradient in gradients.items():
        assert (gradient - own_gradients[name].tensor).abs().max() <= 1e-6, name


def differing(ranks, kind):
    """The names that are told when one bit of rank 1 is another one."""
    model, _, sharing, _ = shared(ranks, kind, "transformer")
    sharing.begin()
    assert sharing.differences() == []
    if ranks.rank == 1:
        model.ln_final.weight.data.view(torch.int32)[3] ^= 1
    return sharing.differences()


@pytest.mark.parametrize("kind", ("ddp", "tensor"))
def test_a_bit_that_differs_is_found(pools, kind):
    assert pools[2].run(differing, kind) == [["ln_final.weight"]] * 2


@pytest.mark.parametrize("size", (1, 2, 3, 5, 6))
def test_each_stage_has_a_layer(size):
    stages = [stage_layers(6, Team(None, rank, size)) for rank in range(size)]
    assert [n for stage in stages for n in stage] == list(range(6))
    assert all(len(stage) >= 6 // size for stage in stages)


def mixed(ranks, kind):
    """Losses and norms of updates with bfloat16 products, and the dtypes of what a rank keeps."""
    model, optimizer, sharing, rows = shared(ranks, kind, "transformer")
    sharing.begin()
    rounded = under_autocast(next_token_loss, CPU, "bfloat16")
    found = updates(model, optimizer, sharing, rows, range(STEPS), loss_of=rounded)
    tensors = sharing.optimized().values()
    return found, {str(x.dtype) for x in tensors} | {str(x.grad.dtype) for x in tensors}


@pytest.mark.parametrize("kind", ("ddp", "fsdp", "tensor", "pipeline"))
def test_mixed_precision_computes_in_bfloat16_and_sums_in_float32(pools, alone, kind):
    wanted, dtypes = mixed(None, "one")
    for found, own in pools[2].run(mixed, kind):
        assert own == dtypes == {"torch.float32"}
        if kind != "tensor":  # its ranks round their parts of a sum
            assert found[0][0] == pytest.approx(wanted[0][0], rel=1e-6)
        for one, other, exact in zip(found, wanted, alone["transformer"][0]):
            assert one == pytest.approx(other, rel=2e-3)
            assert one[0] != exact[0]  # the products are rounded
