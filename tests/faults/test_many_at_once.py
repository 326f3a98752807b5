"""Processes that start at the same time on one data/: each ends as it would have alone."""

import os
import subprocess
import sys
import threading
import time

import pytest
import torch

from cs_lm.cli.commands import main as command
from cs_lm.data import cache
from cs_lm.storage import lock as locks
from cs_lm.storage.lock import acquire, wait_for
from cs_lm.training.console import log_to
from cs_lm.training.run_dir import RunFolder
from tests.end_to_end.conftest import ROOT, TINY, laid_over, write_corpus
from tests.faults.tiny_run import CONFIG, prepared, train

# Two vocabularies, and another text under the same name.
RUNS = [
    ("a", "x/train.txt", "300"),
    ("b", "x/train.txt", "300"),
    ("c", "x/train.txt", "280"),
    ("d", "y/train.txt", "300"),
]


def start(folder, out_dir, corpus, vocab_size):
    argv = [
        *TINY,
        "--corpus_path",
        corpus,
        "--vocab_size",
        vocab_size,
        "--max_steps",
        "4",
        "--out_dir",
        out_dir,
        "--chunk_size",
        "300",
    ]
    return subprocess.Popen(
        [sys.executable, ROOT / "run_clm.py", *laid_over(argv)],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )


def weights(folder, out_dir):
    return RunFolder(folder / out_dir).read("last")["model"]


@pytest.mark.slow
def test_four_first_starts_at_once(tmp_path):
    for folder in ("together", "alone"):
        for name in ("x", "y"):
            (tmp_path / folder / name).mkdir(parents=True)
            path = write_corpus(tmp_path / folder / name)
            path.rename(path.with_name("train.txt"))
        with open(tmp_path / folder / "y" / "train.txt", "a", encoding="utf-8") as file:
            file.write("The end of y.\n")
    together = [start(tmp_path / "together", *run) for run in RUNS]
    for process in together:
        shown, _ = process.communicate(timeout=120)
        assert process.returncode == 0, shown
    for run in RUNS[1:]:  # b is a with nobody beside it
        process = start(tmp_path / "alone", *run)
        shown, _ = process.communicate(timeout=120)
        assert process.returncode == 0, shown
    for out_dir, *_ in RUNS:
        expected = weights(tmp_path / "alone", "b" if out_dir == "a" else out_dir)
        actual = weights(tmp_path / "together", out_dir)
        assert all(torch.equal(expected[name], actual[name]) for name in expected), out_dir
    made = sorted(path.name for path in (tmp_path / "together" / "data").iterdir())
    assert [name.split("-")[0] for name in made if not name.startswith(".")] == [
        *["train_chunks"] * 3,
        *["train_tokenizer"] * 3,
    ]
    assert not [name for name in made if name.endswith(".writing")]


def test_whoever_waits_says_so_and_finds_what_was_made(tmp_path):
    path, said, made = tmp_path / "thing", [], []

    def make(_is_alone):
        time.sleep(0.8)
        made.append(threading.current_thread().name)
        path.write_text("made", encoding="utf-8")

    def find():
        return path.read_text(encoding="utf-8") if path.exists() else None

    found = []
    threads = [
        threading.Thread(target=lambda: found.append(cache.find_or_make(path, find, make)[0]))
        for _ in range(4)
    ]
    with log_to(said.append):
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=30)
    assert found == ["made"] * 4 and len(made) == 1
    assert said == [f"waiting: another process is making {path}"] * 3


def test_a_store_in_use_is_not_removed(work, capsys):
    data = prepared(work, CONFIG)
    (store,) = [entry for entry in cache.entries() if entry.kind == "token store"]
    assert command(["cache", "--remove", store.path.name]) == 2
    assert f"a process is using {store.path}" in capsys.readouterr().err
    assert len(data.train.load_by_range(0, 5)) == 5
    for lock in data.locks:
        lock.close()
    assert command(["cache"]) == 0
    shown = capsys.readouterr().out
    assert store.path.name in shown and "animals_tokenizer-" in shown and "together" in shown
    assert command(["cache", "--remove", f"{store.path}/"]) == 0  # as shells complete it
    assert not store.path.exists() and not list(work.glob("data/*.writing"))
    assert command(["cache", "--unused_days", "1"]) == 0
    assert command(["cache", "--remove", "animals.txt"]) == 2
    assert "which is not in data" in capsys.readouterr().err
    assert command(["cache", "--unused_days", "0"]) == 0
    assert list(cache.entries()) == []


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has other locks")
@pytest.mark.parametrize("name", ["ENOSYS", "ENOLCK", "ENOTSUP"])
def test_a_file_system_without_locks_is_no_reason_to_refuse(work, name, monkeypatch, caplog):
    number = getattr(locks.errno, name)

    def no_locks(_number, _how):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(locks.fcntl, "flock", no_locks)
    locks._warn_once.cache_clear()
    data = prepared(work, CONFIG)
    assert train(work / "run", data, CONFIG) == 0
    warnings = [r.getMessage() for r in caplog.records if "has no file locks" in r.getMessage()]
    assert len(warnings) == len(set(warnings)) == 2, "once for data/, once for the run's folder"


def test_a_lock_whose_file_was_removed_is_taken_anew(tmp_path):
    first = acquire(tmp_path / "lock")
    assert acquire(tmp_path / "lock") is None
    first.close(remove=True)
    second = acquire(tmp_path / "lock")
    assert second is not None and (tmp_path / "lock").exists()


def test_a_folder_that_cannot_be_is_named(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(ValueError, match=r"file' cannot be written to .*; name another folder"):
        wait_for(tmp_path / "file" / "lock", shared=False, on_wait=lambda: None)
