"""`cs-lm convert`: a checkpoint in another form goes on as before."""

import json
import pickle
import shutil
import threading
import time

import pytest
import torch

from cs_lm.cli.commands import main as command
from cs_lm.training.checkpoint_manager import CheckpointManager
from cs_lm.training.convert import write_in_parts, write_single
from cs_lm.training.dcp import SIDE_FILE, read_dcp
from cs_lm.training.sharded_checkpoint import wholly
from tests.end_to_end.conftest import TINY, last_checkpoint, run_script, write_corpus
from tests.sameness import assert_equal


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run with a checkpoint at step 4, and one that went on to step 8."""
    folder = tmp_path_factory.mktemp("convert")
    corpus = write_corpus(folder)
    flags = [*TINY, "--corpus_path", corpus, "--device", "cpu"]
    for name, steps in (("short", 4), ("long", 8)):
        more = ["--save_interval", "4", "--max_steps", steps, "--out_dir", name]
        found = run_script(folder, *flags, *more, "--lr_min", "1e-2", "--warmup_ratio", "0")
        assert found.returncode == 0, found.stderr
    return folder


def convert(source, target, *more):
    assert command(["convert", "--out_dir", str(source), "--to", str(target), *more]) == 0
    return target


@pytest.mark.parametrize("form", (["parts", "--num_parts", "3"], ["single"], ["dcp"]))
def test_there_and_back_is_the_same_to_the_last_bit(run, tmp_path, form):
    wanted = last_checkpoint(run / "short")
    there = convert(run / "short", tmp_path / "there", "--format", *form, "--checkpoint", "last")
    if form[0] != "dcp":
        assert_equal(last_checkpoint(there), wanted)
        assert command(["verify", "--out_dir", str(there)]) == 0
    back = convert(there, tmp_path / "back", "--checkpoint", "last")
    assert_equal(last_checkpoint(back), wanted)
    again = convert(back, tmp_path / "again", "--format", "parts")
    assert_equal(last_checkpoint(again), wanted)


def test_a_run_in_parts_is_used_like_any_other(run, tmp_path, capsys):
    parts = convert(run / "short", tmp_path / "parts", "--format", "parts", "--checkpoint", "last")
    assert command(["generate", "--out_dir", str(parts), "--prompt", "A cat"]) == 0
    flags = ["--resume", "--out_dir", parts, "--max_steps", "8"]
    found = run_script(run, *flags)
    assert found.returncode == 0, found.stderr
    assert_equal(last_checkpoint(parts)["model"], last_checkpoint(run / "long")["model"])


def test_dcp_has_the_names_of_parameters(run, tmp_path):
    there = convert(run / "short", tmp_path / "x", "--format", "dcp", "--checkpoint", "last")
    wanted = last_checkpoint(run / "short")
    content = {"model.ln_final.weight": torch.empty(16),
               "optimizer.state.ln_final.weight.exp_avg": torch.empty(16)}  # fmt: skip
    torch.distributed.checkpoint.load(content, checkpoint_id=there, no_dist=True)
    assert torch.equal(content["model.ln_final.weight"], wanted["model"]["ln_final.weight"])
    moments = [state["exp_avg"] for state in wanted["optimizer"]["state"].values()]
    found = content["optimizer.state.ln_final.weight.exp_avg"]
    assert any(torch.equal(found, moment) for moment in moments)


class _Shell:
    def __reduce__(self):
        return (print, ("this code must not run",))


def test_a_metadata_file_with_code_in_it_is_refused(run, tmp_path, capsys):
    there = convert(run / "short", tmp_path / "x", "--format", "dcp", "--checkpoint", "last")
    capsys.readouterr()
    (there / ".metadata").write_bytes(pickle.dumps(_Shell()))
    argv = ["convert", "--out_dir", str(there), "--to", str(tmp_path / "y")]
    assert command(argv) == 2
    shown = capsys.readouterr()
    assert "must not run" not in shown.out + shown.err
    assert "it calls builtins.print" in shown.err and not (tmp_path / "y").exists()
    side = json.loads((there / SIDE_FILE).read_text(encoding="utf-8"))
    (there / SIDE_FILE).write_text(json.dumps({**side, "keys": 3}), encoding="utf-8")
    assert command(argv) == 2


@pytest.mark.parametrize("damage", ("missing", "cut"))
def test_a_damaged_export_leaves_nothing(run, tmp_path, capsys, damage):
    there = convert(run / "short", tmp_path / "x", "--format", "dcp")
    path = there / "__0_0.distcp"
    content = path.read_bytes()
    path.unlink()
    if damage == "cut":
        path.write_bytes(content[:1000])
    argv = ["convert", "--out_dir", str(there), "--to", str(tmp_path / "y")]
    assert command(argv) == 2
    assert "lost or damaged files" in capsys.readouterr().err
    path.write_bytes(content)
    assert command([*argv, "--checkpoint", "33"]) == 2
    assert "holds step 4" in capsys.readouterr().err
    assert not (tmp_path / "y").exists()
    assert command(argv) == 0


def test_the_newest_checkpoint_is_converted(run, tmp_path):
    assert last_checkpoint(convert(run / "long", tmp_path / "x"))["iteration"] == 8


def test_mistakes_are_named(run, tmp_path, capsys):
    (tmp_path / "file").touch()
    inside = str(run / "short" / "checkpoints" / "x")
    cases = [
        (["--to", str(tmp_path / "file")], "is there already"),
        (["--to", inside], "inside of --out_dir"),
        ([], "--to: is missing"),
        (["--to", str(run / "long")], "is there already"),
        (["--to", str(tmp_path / "x"), "--num_parts", "2"], "no effect with --format single"),
        (["--to", str(tmp_path / "x"), "--format", "parts", "--num_parts", "0"], "--num_parts"),
        (["--to", str(tmp_path / "x"), "--checkpoint", "77"], "does not exist"),
    ]
    for more, message in cases:
        assert command(["convert", "--out_dir", str(run / "short"), *more]) == 2
        assert message in capsys.readouterr().err, more
    assert not (tmp_path / "x").exists()


NUM, LARGEST = 8, 4 << 20  # tensors, and numbers of each


def _anonymous_bytes() -> int:
    with open("/proc/self/status", encoding="utf-8") as file:
        line = next(line for line in file if line.startswith("RssAnon"))
    return int(line.split()[1]) * 1024


def _most_memory(work) -> int:
    """Bytes beyond those of before, without pages of files, while the work goes on."""
    before, most, done = _anonymous_bytes(), [0], threading.Event()

    def watch():
        while not done.is_set():
            most[0] = max(most[0], _anonymous_bytes())
            time.sleep(0.001)

    thread = threading.Thread(target=watch)
    thread.start()
    work()
    done.set()
    thread.join()
    return most[0] - before


def test_memory_is_that_of_a_tensor(tmp_path):
    """Of 8 tensors of 16 MB, no more than one, and a piece of another one, is in memory."""
    try:
        _anonymous_bytes()
    except (OSError, StopIteration):
        pytest.skip("this system does not say how much memory a process has")
    content = {"format_version": 1, "iteration": 1, "optimizer": {}, "extras": {}}
    tensors = {f"x{n}": torch.arange(LARGEST, dtype=torch.float32) + n for n in range(NUM)}
    first = CheckpointManager(tmp_path / "first")
    first.save({**content, "model": tensors})
    size = 4 * LARGEST
    parts, single = CheckpointManager(tmp_path / "parts"), CheckpointManager(tmp_path / "single")

    def there():
        write_in_parts(first.read(1, lazily=True), parts, 2)

    def back():
        write_single(parts.read(1, lazily=True), single)

    for work in (there, back):
        assert _most_memory(work) < 1.2 * size + size, work.__name__
    assert_equal(wholly(single.read(1)["model"]), tensors)


def test_an_export_is_read_when_it_is_used(run, tmp_path):
    there = convert(run / "short", tmp_path / "x", "--format", "dcp", "--checkpoint", "last")
    content = read_dcp(there)
    part = content["model"]["token_embeddings.weight"].read((3, 0), (2, 16))
    wanted = last_checkpoint(run / "short")["model"]["token_embeddings.weight"]
    assert torch.equal(part, wanted[3:5])


def test_a_disk_that_fills_up_at_the_end_leaves_nothing(run, tmp_path, capsys, monkeypatch):
    def full(*_paths, **_more):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shutil, "copyfile", full)
    argv = ["convert", "--out_dir", str(run / "short"), "--to", str(tmp_path / "y")]
    assert command(argv) == 2
    assert "No space left" in capsys.readouterr().err
    assert not (tmp_path / "y").exists()
