"""`cs-lm rank` and `cs-lm reward`: from a run to a reward model."""

import json

import pytest
import torch

from cs_lm.alignment.answers import Answer
from cs_lm.alignment.conversations import Message
from cs_lm.alignment.records import Prompt
from cs_lm.alignment.reward_model import render_answer, score_rows
from cs_lm.alignment.reward_training import load_reward_model
from cs_lm.cli._judges import Judge, scores_of, shown
from cs_lm.cli.commands import main as command
from cs_lm.cli.train import main as run_clm
from cs_lm.storage.lock import acquire
from cs_lm.training.metrics_log import MetricsLog
from cs_lm.training.run_dir import RunFolder
from tests.end_to_end.instructions import SPECIAL, WORDS
from tests.end_to_end.test_sft import BASE, bases, sft, state, work
from tests.sameness import assert_equal

__all__ = ["bases", "work"]  # fixtures


def rank(out, *more, **changes):
    settings = {"from": "runs/transformer", "prompts": "data.jsonl", "out": out, **changes}
    flags = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
    return command(["rank", *flags, "--max_new_tokens", "12", "--device", "cpu", *more])


@pytest.fixture
def ranked(work):
    """Answers in capital letters are better than those in small ones."""
    path = work / "ranked.jsonl"
    with path.open("w", encoding="utf-8") as file:
        for word in WORDS:
            answers = [word.upper(), word, word.title()]
            file.write(
                json.dumps({"prompt": word, "responses": answers, "ranks": [1, 3, 2]}) + "\n"
            )
    return path


def stage(name, ranked, out, *more, **changes):
    settings = {"from": "runs/transformer", "data": ranked, "out_dir": out, "lr": 3e-3,
                "batch_size": 4, "num_epochs": 99, "eval_interval": 4, "save_interval": 3,
                "device": "cpu", **changes}  # fmt: skip
    flags = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
    return command([name, *flags, *more])


def reward(ranked, out, *more, **changes):
    return stage("reward", ranked, out, *more, **changes)


def test_answers_are_ranked_by_a_rule_and_a_stop_loses_none(work, capsys):
    whole, parts = work / "whole.jsonl", work / "parts.jsonl"
    assert rank(whole, "--num_answers", "2", "4", rule="length", seed=3) == 0
    lines = whole.read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    assert len(records) == 3 * len(WORDS)
    assert {len(record["responses"]) for record in records} == {2, 3, 4}
    for record in records:
        lengths = [len(answer) for answer in record["responses"]]
        better = sorted(set(lengths))
        assert len(record["ended"]) == len(lengths)  # False: cut at --max_new_tokens
        assert record["ranks"] == [better.index(length) + 1 for length in lengths]
    # stopped within a line
    parts.write_text("\n".join(lines[:7]) + "\n" + lines[7][:20], encoding="utf-8")
    capsys.readouterr()
    assert rank(parts, "--num_answers", "2", "4", rule="length", seed=3) == 0
    assert "ranked already" in capsys.readouterr().out
    found = parts.read_text(encoding="utf-8").splitlines()
    assert found[:7] == lines[:7] and set(found) <= set(lines)
    asked = {json.loads(line)["prompt"] for line in found}
    assert asked == {record["prompt"] for record in records}


def test_a_reward_model_learns_what_is_better(work, ranked, capsys):
    """Validated on what it learns; then it ranks answers itself, and makes no text."""
    out = work / "rm"
    assert reward(ranked, out, max_steps=60, eval_interval=30, valid_data=ranked) == 0
    valid = [r for r in MetricsLog(out / "metrics.jsonl").records() if r["kind"] == "valid"]
    assert valid[-1]["accuracy"] > 0.95 and valid[-1]["num_pairs"] == 3 * len(WORDS)
    assert valid[-1]["loss_nats"] < 0.3 < valid[0]["calibration"][0]["expected"]
    model, _, template = load_reward_model(RunFolder(out), "last", torch.device("cpu"))
    answers = [(word, one) for word in WORDS for one in (word.upper(), word, word.title())]
    rows = [render_answer(template, (Message("user", w),), one) for w, one in answers]
    scores = score_rows(model, rows, torch.device("cpu"))
    assert abs(scores.mean().item()) < 0.35  # 0 over the answers that it was trained on
    again = work / "by_model.jsonl"
    assert rank(again, reward=out) == 0
    record = json.loads(again.read_text(encoding="utf-8").splitlines()[0])
    assert record["ranks"][record["scores"].index(max(record["scores"]))] == 1
    capsys.readouterr()
    assert command(["verify", "--out_dir", str(out)]) == 0
    for argv, message in [
        (["generate", "--out_dir", str(out), "--prompt", "a"], "is a reward model, which gives"),
        (["sft", "--from", str(out), "--data", "data.jsonl", "--out_dir", str(work / "x")],
         "is a reward model, need a language model"),
        (["rank", "--from", "runs/transformer", "--prompts", "data.jsonl", "--out",
          str(work / "y"), "--reward", "runs/transformer"], "is a run of cs-lm train, need one of"),
    ]:  # fmt: skip
        assert command(argv) == 2
        assert message in capsys.readouterr().err


@pytest.mark.parametrize("source", ["transformer", pytest.param("gpt2", marks=pytest.mark.slow)])
def test_a_resumed_reward_run_is_the_same_to_the_last_bit(work, ranked, source):
    runs = work / "whole", work / "parts"
    for out in runs:
        start = f"runs/{source}"
        assert reward(ranked, out, max_steps=6, keep_last=5, **{"from": start}) == 0
    assert command(["reward", "--resume", "--out_dir", str(runs[1]), "--resume_step", "3"]) == 0
    assert_equal(*(state(out, 6) for out in runs))


def test_dpo_prefers_what_is_ranked_above(work, ranked):
    """Validated on what it learns; the run is a language model like any other."""
    out = work / "dpo"
    settings = {"max_steps": 40, "eval_interval": 20, "valid_data": ranked, "beta": 0.3}
    assert stage("dpo", ranked, out, **settings) == 0
    valid = [r for r in MetricsLog(out / "metrics.jsonl").records() if r["kind"] == "valid"]
    assert valid[-1]["accuracy"] > 0.95 and valid[-1]["loss_nats"] < 0.3
    assert valid[-1]["log_prob_better"] > valid[-1]["log_prob_worse"]
    assert command(["generate", "--out_dir", str(out), "--prompt", "The"]) == 0


@pytest.mark.parametrize("source", ["transformer", pytest.param("gpt2", marks=pytest.mark.slow)])
def test_a_resumed_dpo_run_is_the_same_to_the_last_bit(work, ranked, source):
    runs = work / "whole", work / "parts"
    for out in runs:
        start = {"from": f"runs/{source}"}
        assert stage("dpo", ranked, out, max_steps=6, keep_last=5, **start) == 0
    assert command(["dpo", "--resume", "--out_dir", str(runs[1]), "--resume_step", "3"]) == 0
    assert_equal(*(state(out, 6) for out in runs))


@pytest.mark.parametrize("name", ["reward", "dpo"])
def test_other_ranks_are_refused_in_a_resumed_run(work, ranked, name, capsys):
    out = work / name
    assert stage(name, ranked, out, max_steps=1) == 0
    text = ranked.read_text(encoding="utf-8")
    ranked.write_text(text.replace("[1, 3, 2]", "[3, 1, 2]"), encoding="utf-8")
    capsys.readouterr()
    assert command([name, "--resume", "--out_dir", str(out), "--max_steps", "2"]) == 2
    assert "hold other records than when the run began" in capsys.readouterr().err


def test_mistakes_are_named(work, ranked, capsys):
    cases = [
        (["reward"], "--data: is missing; name files of rankings"),
        (["reward", "--from", "runs/transformer", "--data", "data.jsonl", "--out_dir", "z"],
         "data.jsonl, line 1: got responses"),
        (["rank"], "--prompts: is missing"),
        (["rank", "--num_answers", "4", "2"], "--num_answers: got 4 2, need one number, or"),
        (["rank", "--rule", "length", "--reward", "x"], "--rule, --reward: got both"),
    ]  # fmt: skip
    for argv, message in cases:
        assert command(argv) == 2
        assert message in capsys.readouterr().err, argv
    assert rank(work / "out.jsonl") == 2
    assert "--rule: is missing: give it or --reward" in capsys.readouterr().err
    other = work / "other.jsonl"
    other.write_text("[1]\n", encoding="utf-8")
    assert rank(other, rule="length") == 2
    assert "holds other lines than rankings" in capsys.readouterr().err


def test_a_person_ranks_on_a_terminal(work, monkeypatch, capsys):
    from cs_lm.cli._judges import _asked
    from cs_lm.cli.rank import _ranked

    lines = iter(["3", "1 2 3 3", "2 1=3"])
    monkeypatch.setattr("builtins.input", lambda _: next(lines))
    prompt = Prompt((Message("user", "q"),), {})
    answers = [Answer(one, True) for one in "xyz"]
    record = _ranked(prompt, answers, _asked(prompt, answers))
    assert record["ranks"] == [2, 1, 2] and record["prompt"] == "q"
    assert capsys.readouterr().err.count("need each of 1 to 3 once") == 2


def test_a_reward_model_chooses_the_checkpoint(work, ranked):
    """The best one is that with the highest score, whatever its loss is."""
    out = work / "chosen"
    settings = {"max_steps": 24, "eval_interval": 4, "seed": 2, "out_dir": out}
    base = work / "long"
    more = ["--special_tokens", *SPECIAL, "--max_seq_length", "128", "--out_dir", str(base)]
    argv = " ".join(BASE).replace("--max_seq_length 64", "").split()
    assert run_clm([*argv, "--corpus_path", "text.txt", *more]) == 0
    assert reward(ranked, work / "rm", max_steps=20, **{"from": base}) == 0
    assert sft("--reward", str(work / "rm"), source=str(base), **settings) == 0
    valid = [r for r in MetricsLog(out / "metrics.jsonl").records() if r["kind"] == "valid"]
    best = max(valid, key=lambda record: record["reward_score"])
    assert RunFolder(out).checkpoints.steps("best") == [best["step"]]


def test_rank_never_empties_another_file(work, capsys):
    other = work / "vocab.json"
    for text in ('{"a": 1, "b": 2}', "notes", '{"a": 1}\n{"b'):
        other.write_text(text, encoding="utf-8")
        assert rank(other, rule="length") == 2
        assert "holds other lines than rankings; name another" in capsys.readouterr().err
        assert other.read_text(encoding="utf-8") == text
    whole = work / "whole.jsonl"
    assert rank(whole, rule="length") == 0
    text = whole.read_text(encoding="utf-8")
    whole.write_text(text.removesuffix("\n"), encoding="utf-8")
    assert rank(whole, rule="length") == 0
    assert whole.read_text(encoding="utf-8") == text


def test_a_prompt_that_occurs_twice_is_ranked_twice_after_a_stop_too(work):
    prompts = work / "prompts.jsonl"
    prompts.write_text("\n".join(json.dumps({"prompt": w}) for w in "abcabdaa"))
    whole, parts = work / "whole.jsonl", work / "parts.jsonl"
    assert rank(whole, rule="length", prompts=prompts) == 0
    lines = whole.read_text(encoding="utf-8").splitlines(keepends=True)
    assert len(lines) == 8
    parts.write_text("".join(lines[:5]), encoding="utf-8")
    assert rank(parts, rule="length", prompts=prompts) == 0
    assert parts.read_text(encoding="utf-8") == whole.read_text(encoding="utf-8")


def test_rank_by_a_reward_model_keeps_within_its_context(work, ranked, capsys):
    """The longest prompt that is taken can be scored, whatever its answer is."""
    assert reward(ranked, work / "rm", max_steps=2) == 0
    prompts = work / "prompts.jsonl"
    for length, status in ((40, 0), (60, 2)):
        prompts.write_text(json.dumps({"prompt": "x" * length}) + "\n", encoding="utf-8")
        capsys.readouterr()
        out = work / f"{length}.jsonl"
        assert rank(out, "--num_answers", "8", reward=work / "rm", prompts=prompts) == status
    assert (
        "line 1: got 63 tokens with the template, and 12 of --max_new_tokens; need at most 64"
        in (capsys.readouterr().err)
    )


def test_a_file_of_rankings_holds_those_of_one_judge_and_one_model(work, capsys):
    out = work / "ranked.jsonl"
    assert rank(out, rule="length") == 0
    before = out.read_bytes()
    for changes, message in [
        ({"rule": "contains"}, "has rankings with judge 'length', not 'contains'"),
        ({"rule": "length", "from": "runs/gpt2"}, "has rankings with from"),
        ({"rule": "length", "temperature": 2}, "has rankings with temperature 1.0, not 2.0"),
    ]:
        assert rank(out, **changes) == 2
        assert message in capsys.readouterr().err
    assert out.read_bytes() == before
    lock = acquire(work / ".ranked.jsonl.lock")
    assert rank(out, rule="length") == 2
    assert "another process ranks into" in capsys.readouterr().err
    lock.close()


def test_equal_answers_have_equal_ranks_whatever_the_judge_thinks(monkeypatch):
    """A batch of rows may score the same row differently, in its last bits."""
    calls = []
    judge = Judge(
        lambda _, answers: calls.append(answers) or [0.1 * n for n in range(len(answers))]
    )
    prompt = Prompt((Message("user", "q", "with this"),), {})
    scores = scores_of(judge, prompt, [Answer(one, True) for one in "xyxy"], "0")
    assert scores[0] == scores[2] != scores[1] == scores[3] and len(calls[0]) == 2
    assert scores_of(Judge(None, is_person=True), prompt, [Answer("x", True)] * 3, "0") == [0.0] * 3
    assert shown(prompt.conversation) == "q\nwith this"
    turns = (Message("system", "s"), Message("user", "a"), Message("assistant", "b"))
    assert shown((*turns, Message("user", "c"))) == "system: s\nuser: a\nassistant: b\nuser: c"


def test_prompts_that_leave_no_room_are_named_before_the_first_question(work, capsys):
    long = work / "long.jsonl"
    records = [{"prompt": "a", "answer": "b"}, {"prompt": "word " * 60, "answer": "b"}]
    long.write_text("".join(json.dumps(one) + "\n" for one in records), encoding="utf-8")
    assert rank(work / "out.jsonl", rule="length", prompts=long) == 2
    message = capsys.readouterr().err
    assert "long.jsonl, line 2" in message and "lower --max_new_tokens" in message
    assert not (work / "out.jsonl").exists()


@pytest.mark.parametrize("name", ("reward", "dpo"))
def test_rankings_without_a_better_answer_teach_nothing(work, name, capsys):
    ties = work / "ties.jsonl"
    record = {"prompt": "a", "responses": ["x", "y"], "ranks": [1, 1]}
    ties.write_text("".join(json.dumps(record | {"prompt": w}) + "\n" for w in WORDS), "utf-8")
    assert stage(name, ties, work / "out") == 2
    assert "no answer is better than another one" in capsys.readouterr().err


def test_a_flag_that_names_another_folder_than_a_run_is_named(work, ranked, capsys):
    for argv, flag in [
        (["rank", "--from", "nope", "--prompts", "data.jsonl", "--out", "y", "--rule", "length"],
         "--from"),
        (["compare", "--runs", "runs/gpt2", "nope", "--prompts", "data.jsonl", "--rule", "length",
          "--max_new_tokens", "12"], "--runs"),
        (["compare", "--runs", "runs/gpt2", "runs/transformer", "--prompts", "data.jsonl",
          "--reward", "nope"], "--reward"),
    ]:  # fmt: skip
        assert command(argv) == 2
        assert capsys.readouterr().err.splitlines()[-1].startswith(f"error: {flag}: 'nope'")
