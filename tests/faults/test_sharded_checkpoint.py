"""Checkpoints in parts: written by some ranks, read by others, damaged, and never half there."""

import json
import os
import re
import shutil

import pytest
import torch

from cs_lm.distributed.parts import Part, row_part
from cs_lm.errors import UserError
from cs_lm.training.checkpoint import checkpoint_content, restore_parts
from cs_lm.training.checkpoint_manager import CheckpointManager
from cs_lm.training.sharded_checkpoint import INDEX, StoredTensor, read_parts, shard_name
from tests.equivalence.test_sharing import shared, updates
from tests.sameness import assert_equal

pytestmark = pytest.mark.xdist_group("ranks")
# how many ranks, and how they share
MANY = {
    "gpt2": {"2 x 2 hybrid": (4, "hybrid"), "3 moments": (3, "moments"), "2 ddp": (2, "ddp")},
    "transformer": {
        "3 fsdp": (3, "fsdp"), "2 x 2 tensor x pipeline": (4, "tensor x pipeline"),
        "2 x 2 fsdp x tensor": (4, "fsdp x tensor"),
    },
}  # fmt: skip


def save(ranks, kind, shape, folder, steps):
    """Updates, then a checkpoint by all ranks."""
    model, optimizer, sharing, rows = shared(ranks, kind, shape)
    sharing.begin()
    updates(model, optimizer, sharing, rows, range(steps))
    extras = {"config": {"betas": (0.9, 0.95)}, "of_first": torch.arange(3)}
    content = checkpoint_content(model, optimizer, steps, sharing, **extras)
    manager = CheckpointManager(folder)
    if sharing.saves_parts:
        manager.save_parts(content, ranks.branch())
    elif ranks is None or ranks.is_first:
        manager.save(content)
    return tuple(updates(model, optimizer, sharing, rows, range(steps, steps + 3)))


def go_on(ranks, kind, shape, folder, steps):
    """Losses and norms of the updates after the checkpoint."""
    model, optimizer, sharing, rows = shared(ranks, kind, shape)
    content = CheckpointManager(folder).read(steps, lazily=ranks is not None)
    restore_parts(content, sharing)
    sharing.begin()
    return tuple(updates(model, optimizer, sharing, rows, range(steps, steps + 3)))


@pytest.mark.slow
@pytest.mark.parametrize("shape", MANY)
def test_any_number_of_ranks_and_any_way_to_share_goes_on(pools, tmp_path, shape):
    """The same losses and norms, whoever saved; each kind reads what another one has saved."""
    wanted, many = save(None, "one", shape, tmp_path / "one", 3), MANY[shape]
    for name, (size, kind) in many.items():
        assert len(set(pools[size].run(save, kind, shape, tmp_path / name, 3))) == 1
    kinds = ["one", *many]
    for number, saved in enumerate(kinds):
        found = {"one": go_on(None, "one", shape, tmp_path / saved, 3)}
        for name in (kinds * 2)[number + 1 : number + 2]:
            if name != "one":
                size, kind = many[name]
                (found[name],) = set(pools[size].run(go_on, kind, shape, tmp_path / saved, 3))
        for name, steps in found.items():
            for one, other in zip(steps, wanted):
                assert one == pytest.approx(other, rel=1e-5), (saved, name)


@pytest.fixture(scope="module")
def saved_once(pools, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    pools[3].run(save, "fsdp", "transformer", folder, 2)
    return folder


@pytest.fixture
def saved(saved_once, tmp_path):
    """A folder with a checkpoint in parts, of 3 ranks, at step 2."""
    shutil.copytree(saved_once, tmp_path, dirs_exist_ok=True)
    return tmp_path


def test_each_number_is_there_once_and_reads_as_a_whole_or_in_parts(saved):
    manager = CheckpointManager(saved)
    whole, lazily = manager.read(2), manager.read(2, lazily=True)
    sizes = [os.path.getsize(manager.path(2) / shard_name(rank)) for rank in range(3)]
    numbers = sum(x.numel() for x in whole["model"].values())
    gaps = 64 * 3 * 3 * len(whole["model"])
    assert 3 * 4 * numbers < sum(sizes) < 3 * 4 * numbers + gaps
    assert max(sizes) <= 1.2 * 3 * 4 * numbers / 3
    assert whole["extras"]["config"] == {"betas": (0.9, 0.95)}
    assert torch.equal(whole["extras"]["of_first"], torch.arange(3))
    table = lazily["model"]["token_embeddings.weight"]
    assert isinstance(table, StoredTensor)
    part = table.read((99, 3), (4, 5))  # over the border of two files
    assert torch.equal(part, whole["model"]["token_embeddings.weight"][99:103, 3:8])


def test_a_flipped_bit_is_found_and_its_file_is_named(saved):
    manager = CheckpointManager(saved)
    for name in (INDEX, *map(shard_name, range(3))):
        path = manager.path(2) / name
        content = path.read_bytes()
        middle = len(content) // 2
        path.write_bytes(content[:middle] + bytes([content[middle] ^ 4]) + content[middle + 1 :])
        with pytest.raises(UserError, match=name):
            manager.read(2)
        path.unlink()
        with pytest.raises(UserError, match=name):
            manager.read(2)
        path.write_bytes(content)
    assert manager.read(2)["iteration"] == 2


def _change(index, kind):
    table = index["tensors"]["model/token_embeddings.weight"]
    if kind == "outside":
        table["parts"][0][2][0] = 300
    elif kind == "beyond the file":
        table["parts"][0][1] = 1 << 40
    elif kind == "huge":
        table["shape"] = [1 << 40, 32]
    elif kind == "negative":
        table["parts"][0][3][0] = -1
    elif kind == "dtype":
        table["dtype"] = "Storage"
    elif kind == "kind":
        index["content"] = {"module": "os"}
    elif kind == "version":
        index["format_version"] = 99
    elif kind == "rank":
        table["parts"][0][0] = "../../x"
    else:  # the name of what is missing
        pairs = index["content"]["dict"]
        index["content"]["dict"] = [pair for pair in pairs if pair[0] != kind]


@pytest.mark.parametrize(
    "kind",
    ("outside", "beyond the file", "huge", "negative", "dtype", "kind", "version", "rank",
     "model", "optimizer", "extras", "iteration"),
)  # fmt: skip
def test_an_index_that_does_not_fit_is_refused(saved, kind):
    folder = CheckpointManager(saved).path(2)
    index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
    _change(index, kind)
    (folder / INDEX).write_text(json.dumps(index), encoding="utf-8")
    with pytest.raises(UserError, match="state.json"):
        read_parts(folder)


def failing_save(ranks, folder, error):
    """One rank cannot write at step 5, and then nobody has saved; step 7 is saved by all.

    error  None: that rank is at another step
    """
    manager, messages = CheckpointManager(folder), []
    branch = ranks.branch()
    for step in (5, 7):
        whole = torch.arange(10.0) + step
        part = row_part(whole, ranks.rank, ranks.size)
        number = step
        if step == 5 and ranks.rank == 1:
            if error is None:
                number = 6
            else:
                part = Part(Broken(error), part.start, part.whole)
        try:
            manager.save_parts(
                {"iteration": number, "format_version": 1, "model": {"x": part}, "extras": {},
                 "optimizer": {}}, branch,
            )  # fmt: skip
        except OSError as failed:
            messages.append(str(failed))
    return messages


class Broken:
    """A tensor whose file cannot be written."""

    dtype, shape = torch.float32, (4,)

    def __init__(self, error):
        self.error = error

    def detach(self):
        raise self.error


@pytest.mark.parametrize(
    ("error", "shown"),
    [(OSError(28, "No space left on device"), "rank 1: .*No space"),
     (ValueError("a surprise"), "rank 1: a surprise"),
     (None, "the ranks are at different steps: 5, 6, 5")],
    ids=("disk", "surprise", "step"),
)  # fmt: skip
def test_a_rank_that_cannot_write_leaves_the_older_checkpoint(pools, saved, error, shown):
    for messages in pools[3].run(failing_save, saved, error):
        assert len(messages) == 1 and re.search(shown, messages[0])
    manager = CheckpointManager(saved)
    assert manager.steps() == [7, 2]
    assert torch.equal(manager.read(7)["model"]["x"], torch.arange(10.0) + 7)
    assert {path.name for path in saved.iterdir()} == {"step-00000002", "step-00000007"}


def preparing(ranks, fails):
    """What each rank gets from `first_alone`, in which rank 0 fails."""
    try:
        with ranks.first_alone():
            if fails and ranks.is_first:
                raise UserError("the text is empty")
    except UserError as error:
        return str(error)
    return "prepared"


def test_no_rank_waits_for_a_first_one_that_has_failed(pools):
    first, *others = pools[3].run(preparing, True)
    assert first == "the text is empty"
    assert all("rank 0 (" in one and "could not prepare" in one for one in others)
    assert pools[3].run(preparing, False) == ["prepared"] * 3


def test_a_best_one_in_parts_is_kept_and_read(saved):
    manager = CheckpointManager(saved)
    assert manager.save_best(2, 1.5, {"data": "x"})
    assert_equal(manager.read(2, "best")["model"], manager.read(2)["model"])
    assert manager.best().loss == 1.5
