import io
import os
import threading

import pytest
import torch

from cs_lm.config.model import ModelConfig
from cs_lm.data.batches import Batch
from cs_lm.models.base import next_token_loss
from cs_lm.models.transformer import TransformerLM
from cs_lm.optim.adamw import AdamW
from cs_lm.storage.manifest import read_manifest, write_manifest
from cs_lm.training import checkpoint as module
from cs_lm.training.async_checkpoint import BackgroundSaver
from cs_lm.training.checkpoint import (
    checkpoint_content,
    load_checkpoint,
    read_checkpoint,
    save_checkpoint,
)
from cs_lm.training.checkpoint_manager import CheckpointManager
from cs_lm.training.console import log_to

CONFIG = ModelConfig(12, 3, 20, 17, 2, 11)


def trained(seed, num_updates):
    model = TransformerLM(CONFIG, generator=torch.Generator().manual_seed(seed))
    optimizer = AdamW(model.parameters(), lr=1e-2)
    update(model, optimizer, num_updates)
    return model, optimizer


def update(model, optimizer, times):
    ids = torch.arange(10).reshape(2, 5)
    for _ in range(times):
        optimizer.zero_grad()
        next_token_loss(model, Batch(ids, ids))[0].backward()
        optimizer.step()


@pytest.mark.parametrize("to_file", [False, True])
def test_round_trip_goes_on_identically(tmp_path, to_file):
    model, optimizer = trained(0, 3)
    place = io.BytesIO() if to_file else tmp_path / "new" / "a.pt"
    torch.manual_seed(5)
    save_checkpoint(model, optimizer, 3, place, note="kept")
    if to_file:
        place.seek(0)
    other, other_optimizer = trained(1, 1)
    assert load_checkpoint(place, other, other_optimizer) == 3
    update(model, optimizer, 2)
    update(other, other_optimizer, 2)
    for a, b in zip(model.parameters(), other.parameters()):
        assert torch.equal(a, b)


def test_extras_and_a_load_without_optimizer(tmp_path):
    model, optimizer = trained(0, 1)
    save_checkpoint(model, optimizer, 7, tmp_path / "a.pt", config={"x": [1, 2]})
    assert read_checkpoint(tmp_path / "a.pt")["extras"] == {"config": {"x": [1, 2]}}
    other, _ = trained(1, 0)
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    assert load_checkpoint(tmp_path / "a.pt", other) == 7
    assert torch.equal(torch.rand(2), expected), "loading a model alone leaves the random state"


def test_a_failed_save_leaves_the_older_file(tmp_path, monkeypatch):
    path = tmp_path / "a.pt"
    save_checkpoint(*trained(0, 1), 1, path)
    before = path.read_bytes()

    def broken(_content, file):
        file.write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(module.torch, "save", broken)
    with pytest.raises(OSError, match="disk full"):
        save_checkpoint(*trained(0, 1), 2, path)
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["a.pt"]


def test_unreadable_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="is not a file; check the path"):
        read_checkpoint(tmp_path / "no.pt")
    save_checkpoint(*trained(0, 1), 1, tmp_path / "a.pt")
    content = (tmp_path / "a.pt").read_bytes()
    (tmp_path / "cut.pt").write_bytes(content[: len(content) // 2])
    (tmp_path / "text.pt").write_text("hello", encoding="utf-8")
    torch.save({"format_version": 99}, tmp_path / "newer.pt")
    torch.save({"f": print}, tmp_path / "code.pt")
    for name in ("cut", "text", "newer", "code"):
        with pytest.raises(ValueError, match=rf"cannot read .*{name}.pt .*need a file that cs_lm"):
            read_checkpoint(tmp_path / f"{name}.pt")


def test_best_is_never_overwritten_by_a_worse_one(tmp_path):
    manager = CheckpointManager(tmp_path)
    model, optimizer = trained(0, 1)

    def validate(step, loss):
        manager.save(checkpoint_content(model, optimizer, step))
        return manager.save_best(step, loss)

    assert validate(1, 2.0)
    assert not validate(2, 2.5) and not validate(3, float("nan")) and not validate(4, 2.0)
    manager = CheckpointManager(tmp_path)
    assert not validate(5, 2.1)
    assert manager.steps("best") == [1] and manager.best().loss == 2.0
    assert validate(6, 1.9)
    assert manager.steps("best") == [6] and manager.read(6, "best")["iteration"] == 6
    assert manager.steps() == [6, 5]


def test_background_saver_saves_the_state_of_its_moment(tmp_path):
    """The weights change while they are being written; what is written does not."""
    model, optimizer = trained(0, 2)
    before = [p.detach().clone() for p in model.parameters()]
    moment = next(iter(optimizer.state.values()))["exp_avg"].clone()
    manager = CheckpointManager(tmp_path)
    saver = BackgroundSaver(manager)
    may_write = threading.Event()
    save = manager.save
    manager.save = lambda content: (may_write.wait(), save(content))
    saver.save(checkpoint_content(model, optimizer, 2))
    update(model, optimizer, 3)
    saver.save_best(2, 1.5, {})
    assert saver.is_saving(0.01) and manager.best() is None
    may_write.set()
    saver.wait()
    assert saver.saved_step == 2 and manager.best().step == 2 and not saver.is_saving(0)
    content = manager.read(2)
    for a, b in zip(before, content["model"].values()):
        assert torch.equal(a, b)
    assert torch.equal(moment, content["optimizer"]["state"][0]["exp_avg"])
    assert content["optimizer"]["state"][0]["step"] == 2


def test_a_best_one_that_is_damaged_or_of_a_course_that_was_left(tmp_path):
    """Neither may stand in the way of a best one to come."""
    manager = CheckpointManager(tmp_path)
    for step, loss in ((1, 3.0), (2, 2.0), (3, 1.0)):
        manager.save(checkpoint_content(*trained(0, 1), step))
        manager.save_best(step, loss)
    manager.discard_after(2)
    assert manager.steps("best") == [] and manager.steps() == [2]
    assert manager.save_best(2, 2.0)
    content = bytearray((tmp_path / "best-00000002" / "state.pt").read_bytes())
    content[50] ^= 1
    (tmp_path / "best-00000002" / "state.pt").unlink()
    (tmp_path / "best-00000002" / "state.pt").write_bytes(content)
    manager.discard_after(2)
    assert manager.best() is None and manager.read_newest()["iteration"] == 2
    manager.save_best(2, 2.0)
    files, facts = read_manifest(tmp_path / "best-00000002")
    del facts["valid_loss"]
    write_manifest(tmp_path / "best-00000002", files, facts)
    assert manager.best() is None


def test_a_step_that_is_named_must_verify(tmp_path):
    manager = CheckpointManager(tmp_path)
    for step in (1, 2):
        manager.save(checkpoint_content(*trained(0, 1), step))
    (tmp_path / "step-00000002" / "state.pt").write_bytes(b"short")
    with pytest.raises(ValueError, match=r"step-00000002' does not verify: .*5 bytes, not"):
        manager.read(2)
    with pytest.raises(
        FileNotFoundError, match="does not exist; checkpoints exist for steps: 2, 1"
    ):
        manager.read(3)
    said = []
    with log_to(said.append):
        assert manager.read_newest()["iteration"] == 1
    assert len(said) == 1 and said[0].startswith("WARNING: SKIPPED checkpoint: ")
    (tmp_path / "step-00000001" / "state.pt").unlink()
    with pytest.raises(ValueError, match="none of the 2 .* verifies; restore one from a copy"):
        manager.read_newest()


def test_what_is_newer_is_set_aside_and_what_a_crash_left_goes(tmp_path):
    manager = CheckpointManager(tmp_path)
    for step in (1, 2):
        manager.save(checkpoint_content(*trained(0, 1), step))
    (tmp_path / "step-00000003.writing").mkdir()
    (tmp_path / "best-00000003.writing").mkdir()
    (tmp_path / "my_notes").mkdir()
    manager.discard_after(1)
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"step-00000001", "step-00000002.aside", "my_notes"}
