"""Each call that writes fails once, or is the last one of its process; nothing is lost."""

import os
import re
import sys

import pytest
import torch

from cs_lm.config.fields import replace
from cs_lm.optim.adamw import AdamW
from cs_lm.storage.atomic import SyncingFile
from cs_lm.training.checkpoint import checkpoint_content
from cs_lm.training.checkpoint_manager import CheckpointManager
from cs_lm.training.metrics_log import read_metrics
from cs_lm.training.run_dir import RunFolder
from cs_lm.training.trainer import NOT_SAVED
from tests.faults.failing_disk import IO_ERROR, NO_SPACE, FailingDisk
from tests.faults.tiny_run import CONFIG, assert_same_run, prepared, trainer_of


@pytest.fixture(autouse=True)
def settling_often(monkeypatch):
    """A large checkpoint waits for the disk while it is written; so do these small ones."""
    monkeypatch.setattr(SyncingFile, "_WAITING_BYTES", 700)


def content(step):
    """A model that tells its step."""
    model = torch.nn.Linear(3, 2, bias=False)
    torch.nn.init.constant_(model.weight, step)
    return checkpoint_content(model, AdamW(model.parameters()), step)


def with_three_saved(folder):
    """The third save removes the first checkpoint, and there is a best one."""
    manager = CheckpointManager(folder)
    for step in (1, 2):
        manager.save(content(step))
    manager.save_best(1, 5.0)
    return manager


def save_a_third(manager):
    manager.save(content(3))
    manager.save_best(3, 4.0)


def check(manager, may_be):
    """All that has a name verifies, and the newest is one of these."""
    for kind in ("step", "best"):
        for step in manager.steps(kind):
            assert manager.read(step, kind)["model"]["weight"][0, 0] == step
    assert manager.steps()[0] in may_be
    assert manager.best().loss in (5.0, 4.0)
    later = CheckpointManager(manager.folder)
    later.discard_after(later.steps()[0])
    later.save(content(4))
    assert later.steps()[0] == 4
    assert not list(manager.folder.glob("*.writing"))


def num_calls(tmp_path):
    manager = with_three_saved(tmp_path / "counted")
    with FailingDisk(lambda _: None).entered() as disk:
        save_a_third(manager)
    assert manager.steps() == [3, 2] and manager.steps("best") == [3]
    assert disk.num_calls > 20
    return disk.num_calls


@pytest.mark.parametrize("number", [NO_SPACE, IO_ERROR], ids=["ENOSPC", "EIO"])
def test_each_call_fails_once(tmp_path, number):
    for failing in range(1, num_calls(tmp_path) + 1):
        manager = with_three_saved(tmp_path / str(failing))
        with FailingDisk(lambda n, failing=failing: number if n == failing else None).entered():
            try:
                save_a_third(manager)
                is_saved = True
            except OSError as error:
                assert error.errno == number
                is_saved = False
        check(manager, {3} if is_saved else {2, 3})


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="ends a fork of this process")
def test_each_call_is_the_last_one(tmp_path):
    """As power would end it: no exception, nothing is cleared away."""
    for last in range(1, num_calls(tmp_path) + 1):
        manager = with_three_saved(tmp_path / str(last))
        child = os.fork()
        if child == 0:
            with FailingDisk(lambda n, last=last: os._exit(7) if n == last else None).entered():
                save_a_third(manager)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
        check(manager, {2, 3})


@pytest.mark.parametrize("number", [NO_SPACE, IO_ERROR], ids=["ENOSPC", "EIO"])
def test_a_run_outlives_a_disk_that_fails_for_a_while(work, number, capsys):
    """And its log and checkpoints are in the end those of a run whose disk did not."""
    config = replace(CONFIG, {"max_steps": 30})
    data = prepared(work, config)
    assert trainer_of(work / "quiet", data, config).fit() == 0
    trainer = trainer_of(work / "run", data, config)

    def fails(_):
        return number if 10 <= trainer.step < 20 else None

    with FailingDisk(fails).entered():
        assert trainer.fit() == 0
    shown = capsys.readouterr().out
    assert "WARNING: cannot save step 12" in shown and "will retry" in shown
    # the save of step 9 may still be under way when the disk begins to fail
    assert re.search(r"the checkpoint of step [69] is kept", shown)
    assert "metrics.jsonl' cannot be written" in shown
    assert_same_run(work / "quiet", work / "run")
    steps = [r["step"] for r in read_metrics(work / "run/metrics.jsonl") if r["kind"] == "train"]
    assert steps == list(range(1, 31))


def test_a_disk_that_stays_full_is_said_and_the_run_can_go_on(work, capsys, monkeypatch):
    monkeypatch.setattr("cs_lm.training.async_checkpoint.SAVE_AGAIN_S", (0, 0))
    config = replace(CONFIG, {"max_steps": 12})
    data = prepared(work, config)
    assert trainer_of(work / "quiet", data, config).fit() == 0
    trainer = trainer_of(work / "run", data, config)
    with FailingDisk(lambda _: NO_SPACE if trainer.step >= 8 else None).entered():
        assert trainer.fit() == NOT_SAVED
    shown = capsys.readouterr().out
    assert re.search(r"could not be saved; the checkpoint of step [36] is kept; free disk", shown)
    assert RunFolder(work / "run").verify() == []
    assert trainer_of(work / "run", data, config).fit() == 0
    assert_same_run(work / "quiet", work / "run")


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such limit")
def test_a_real_limit_of_the_system(work):
    """Files may not grow beyond a size: what torch's own writer meets is told as it is."""
    import resource

    manager = with_three_saved(work)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (600, before[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            manager.save(content(3))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    check(manager, {2})
