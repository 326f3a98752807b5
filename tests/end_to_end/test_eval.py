"""`cs-lm eval` on a finished run."""

import json
import os
import xml.etree.ElementTree

import pytest

from cs_lm.cli.commands import main as command

RUN = os.path.join("runs", "animals")


@pytest.fixture
def task(finished_run, tmp_path, monkeypatch):
    monkeypatch.chdir(finished_run)
    for name, count in (("test", 7), ("dev", 4), ("shots", 9)):
        rows = [
            {"question": f"{name} {i}", "choices": ["cat", "dog", "bird"], "answer": i % 3}
            for i in range(count)
        ]
        text = "\n".join(map(json.dumps, rows))
        (tmp_path / f"{name}.jsonl").write_text(text, encoding="utf-8")
    return ["eval", "--out_dir", RUN, "--task_path", str(tmp_path / "test.jsonl")]


def test_several_numbers_of_demonstrations(task, tmp_path, capsys):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    results, plot = tmp_path / "results.jsonl", tmp_path / "plot.svg"
    argv = [*task, "--demonstrations_path", str(tmp_path / "shots.jsonl"), "--num_shots", "0", "1"]
    argv += ["--template", "{question}: {answer}", "--separator", r"\n"]
    argv += ["--results_path", str(results), "--plot_path", str(plot)]
    argv += ["--contamination_path", "animals.txt", "--ngram", "3"]
    assert command(argv) == 0
    first = capsys.readouterr().out
    assert "7 questions, multiple_choice" in first and "0 of 7 questions share 3 words" in first
    records = [json.loads(line) for line in results.read_text(encoding="utf-8").splitlines()]
    assert [(r["num_shots"], r["index"]) for r in records] == [
        (n, i) for n in (0, 1) for i in range(7)
    ]
    for record in records:
        best = record["scores_nats"].index(max(record["scores_nats"]))
        assert record["given"] == record["choices"][best]
        assert record["correct"] == (record["given"] == record["answer"])
        assert record["contaminated"] is False
    num_correct = sum(r["correct"] for r in records if r["num_shots"] == 1)
    assert f"{num_correct} of 7" in first
    assert xml.etree.ElementTree.parse(plot).getroot().tag.endswith("svg")
    assert command(argv) == 0 and capsys.readouterr().out == first


def test_the_best_number_is_chosen_on_the_development_part(task, tmp_path, capsys):
    files = ["--demonstrations_path", str(tmp_path / "shots.jsonl")]
    dev = ["--dev_path", str(tmp_path / "dev.jsonl")]
    assert command([*task, *files, *dev, "--num_shots", "0", "2"]) == 0
    on_dev, _, on_task = capsys.readouterr().out.partition("chosen: ")
    assert "of 4" in on_dev and "of 7" not in on_dev
    assert on_task.startswith(("0\n", "2\n")) and on_task.count("of 7") == 1


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--num_shots", "1"], "--num_shots: has no solved examples to show"),
        (["--num_shots", "-1"], "--num_shots: got -1, need 0 or more"),
        (["--num_shots", "0", "0"], "--num_shots: has a number twice"),
        (["--dev_path", "x"], "--dev_path: has no effect with one value of --num_shots"),
        (["--plot_path", "a.gif"], "--plot_path: got 'a.gif', need a name that ends in .png or"),
        (["--kind", "exact_match", "--letters"], "--letters: has no effect with answers of kind"),
        (
            ["--kind", "last_number", "--scoring", "per_token"],
            "--scoring: has no effect with answers of kind last_number",
        ),
        (["--template", "{question}"], "--template: got '{question}', need {answer} in it, once"),
        (["--max_examples", "0"], "--max_examples: got 0, need 1 or more"),
    ],
)
def test_what_cannot_be(task, flags, message, capsys):
    assert command([*task, *flags]) == 2
    assert message in capsys.readouterr().err
