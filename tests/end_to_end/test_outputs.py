"""Commands that write a file look at it before their work, and never destroy another one."""

import json
import os
import shutil

import pytest

from cs_lm.cli.commands import main as command

RUN = os.path.join("runs", "animals")


@pytest.fixture
def folder(finished_run, tmp_path, monkeypatch):
    """A copy of a run, and files that a person could lose."""
    shutil.copytree(finished_run / RUN, tmp_path / RUN)
    monkeypatch.chdir(tmp_path)
    rows = [{"question": f"{i}?", "choices": ["cat", "dog"], "answer": i % 2} for i in range(3)]
    files = {
        "task.jsonl": "\n".join(map(json.dumps, rows)),
        "notes.jsonl": '{"mine": 1}\n',
        "page.html": "<p>mine</p>",
        "picture.png": "mine",
        "text.txt": "a cat and a dog " * 30,
    }
    for name, text in files.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    return tmp_path


WRITES = {
    "--html_path": [
        ["score", "--out_dir", RUN, "--text_path", "text.txt"],
        ["report", "--out_dir", RUN],
    ],
    "--results_path": [["eval", "--out_dir", RUN, "--task_path", "task.jsonl"]],
    "--plot_path": [
        ["eval", "--out_dir", RUN, "--task_path", "task.jsonl"],
        ["plot", "--out_dir", RUN],
    ],
}
BAD = {
    "--html_path": (
        "text.txt",
        "page.html",
        f"{RUN}/metrics.jsonl",
        "/dev/null",
        "text.txt/a.html",
    ),
    "--results_path": ("task.jsonl", "notes.jsonl", f"{RUN}/metrics.jsonl", "/dev/null"),
    "--plot_path": ("picture.png", "text.txt", "/dev/null", "text.txt/a.png"),
}


@pytest.mark.parametrize(
    ("argv", "flag", "path"),
    [(argv, flag, path) for flag in WRITES for argv in WRITES[flag] for path in BAD[flag]],
)
def test_another_file_is_never_replaced(folder, argv, flag, path, capsys, monkeypatch):
    def never(*_):
        raise AssertionError("the work has begun")

    for module in ("score", "eval"):
        monkeypatch.setattr(f"cs_lm.cli.{module}.load_trained", never)
    before = {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}
    assert command([*argv, flag, path]) == 2
    shown = capsys.readouterr()
    (line,) = shown.err.splitlines()
    assert line.startswith(f"error: {flag}: ") and path in line
    assert {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()} == before


@pytest.mark.parametrize(
    ("flag", "name"),
    [("--html_path", "a.html"), ("--results_path", "a.jsonl"), ("--plot_path", "a.svg")],
)
def test_an_earlier_file_of_the_same_kind_is_replaced(folder, flag, name):
    if flag == "--plot_path":
        pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    for argv in WRITES[flag]:
        path = os.path.join("new", argv[0], name)
        assert command([*argv, flag, path]) == 0
        first = (folder / path).read_bytes()
        assert command([*argv, flag, path]) == 0
        assert first and (folder / path).exists()


def test_a_tokenizer_never_replaces_its_text(folder, capsys):
    argv = ["train-tokenizer", "--corpus_path", "text.txt", "--vocab_size", "270", "--overwrite"]
    before = (folder / "text.txt").read_bytes()
    assert command([*argv, "--vocab_path", "text.txt"]) == 2
    assert "--vocab_path: got 'text.txt', which the command reads" in capsys.readouterr().err
    assert command([*argv, "--merges_path", "/dev/null"]) == 2
    assert "--merges_path: got '/dev/null', which is no regular" in capsys.readouterr().err
    assert (folder / "text.txt").read_bytes() == before


def test_answers_stay_when_an_evaluation_stops(folder, capsys, monkeypatch):
    from cs_lm.cli import eval as module

    answer, calls = module.answer_all, []

    def stops(*args):
        calls.append(1)
        if len(calls) == 3:
            raise OSError("the disk is gone")
        return answer(*args)

    monkeypatch.setattr(module, "answer_all", stops)
    monkeypatch.setattr(module, "_QUESTIONS_AT_ONCE", 1)
    argv = ["eval", "--out_dir", RUN, "--task_path", "task.jsonl", "--results_path", "out.jsonl"]
    assert command(argv) == 2
    (kept,) = folder.glob("out.jsonl*")
    assert str(kept.name) in capsys.readouterr().err and kept.name != "out.jsonl"
    records = [json.loads(line) for line in kept.read_text(encoding="utf-8").splitlines()]
    assert [record["index"] for record in records] == [0, 1]


def test_a_question_that_cannot_be_answered_is_named_first(folder, capsys):
    def written(name, **record):
        (folder / name).write_text(json.dumps(record), encoding="utf-8")
        return ["eval", "--out_dir", RUN, "--task_path", "task.jsonl", name]

    long = written("long.jsonl", question="q", choices=["b", "w " * 99], answer=0)
    assert command(long) == 2
    shown = capsys.readouterr()
    assert "long.jsonl, line 1: an answer has " in shown.err and "demonstrations" not in shown.out
    assert command(written("free.jsonl", question="q", answer="#### 7")) == 2
    shown = capsys.readouterr().err
    assert "task.jsonl, line 1 looks like multiple_choice, " in shown
    assert "free.jsonl, line 1 like last_number" in shown
    cut = written("cut.jsonl", question="w " * 99, choices=["b", "c"], answer=0)
    assert command(cut) == 0
    shown = capsys.readouterr().out
    assert "1 questions do not fit the context" in shown and "cut.jsonl, line 1" in shown
