"""`cs-lm chat` and `cs-lm compare` on small runs."""

import io
import json
import sys

import pytest
import torch

from cs_lm.cli.chat import Chat
from cs_lm.cli.commands import main as command
from cs_lm.inference.decoding_config import DecodingConfig
from cs_lm.training.run_dir import RunFolder, load_trained
from tests.end_to_end.instructions import WORDS
from tests.end_to_end.test_sft import bases, sft, work

__all__ = ["bases", "work"]  # fixtures
pytestmark = pytest.mark.xdist_group("chat")  # its run is trained once


@pytest.fixture(scope="module")
def tuned(bases, tmp_path_factory):
    """A run that answers "shout cat" with CAT."""
    out = tmp_path_factory.mktemp("tuned") / "sft"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(bases)
        assert sft(max_steps=160, eval_interval=0, out_dir=out, valid_data="data.jsonl") == 0
    return out


@pytest.fixture
def chat(tuned):
    return Chat(load_trained(RunFolder(tuned), "last", torch.device("cpu")), None)


GREEDY = DecodingConfig(temperature=0.0, max_new_tokens=20)


def test_it_answers_as_it_was_tuned(work, tuned, capsys):
    argv = ["chat", "--out_dir", str(tuned), "--temperature", "0", "--checkpoint", "last"]
    assert command([*argv, "--message", "shout cat"]) == 0
    shown = capsys.readouterr()
    assert shown.out == "CAT\n" and not shown.err
    assert command([*argv, "--message", "shout cat", "--max_new_tokens", "2"]) == 0
    shown = capsys.readouterr()
    assert shown.out == "CA\n" and "(cut after 2 tokens; more with --max_new_tokens)" in shown.err


def test_a_model_that_was_never_tuned_answers_too(work, capsys):
    argv = ["chat", "--out_dir", "runs/transformer", "--max_new_tokens", "5"]
    assert command([*argv, "--message", "shout cat"]) == 0
    assert capsys.readouterr().out


def test_turns_are_kept_and_the_oldest_go_first(chat, capsys):
    chat.answer("shout cat", GREEDY)
    chat.answer("shout dog", GREEDY)
    roles = [role for role, _ in chat._messages]
    assert roles == ["user", "assistant", "user", "assistant"]
    assert chat._messages[0][1] == "shout cat" and chat._messages[1][1] == "CAT"
    for word in WORDS:
        chat.answer(f"shout {word}", GREEDY)
    shown = capsys.readouterr()
    assert "the oldest turn is forgotten" in shown.err
    assert len(chat._messages) < 2 * len(WORDS) and chat._messages[-2][1] == f"shout {WORDS[-1]}"
    chat._messages.append(("user", "shout cow"))
    ids, _, room = chat._fitting()
    assert len(ids) + room == 65
    chat.begin()
    assert chat._messages == []
    with pytest.raises(ValueError, match="message: got .* need at most 64, the model's context"):
        chat.answer("x" * 100, GREEDY)
    assert chat._messages == []


def test_a_message_from_standard_input(work, tuned, capsys, monkeypatch):
    argv = ["chat", "--out_dir", str(tuned), "--temperature", "0", "--checkpoint", "last"]
    for given, status, shown in [(b"shout dog\n", 0, "DOG\n"), (b"\n", 2, "")]:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(given)))
        assert command(argv) == status
        assert capsys.readouterr().out == shown


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--num_samples", "2"], "--num_samples: has no effect in a conversation"),
        (["--num_alternatives", "2"], "--num_alternatives: has no effect in a conversation"),
        (["--message", ""], "--message: is empty"),
    ],
)
def test_what_chat_refuses(work, tuned, capsys, flags, message):
    assert command(["chat", "--out_dir", str(tuned), *flags]) == 2
    assert message in capsys.readouterr().err


# ---- compare ----


@pytest.fixture
def prompts(work):
    path = work / "prompts.jsonl"
    lines = [json.dumps({"instruction": f"shout {w}", "answer": w.upper()}) for w in WORDS]
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def compare(prompts, *runs, **changes):
    settings = {"prompts": prompts, "max_new_tokens": 20, "checkpoint": "last", **changes}
    flags = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
    return command(["compare", "--runs", *map(str, runs), *flags])


def test_the_tuned_one_wins(work, tuned, prompts, capsys):
    out = work / "new.jsonl"
    base = "runs/transformer"
    assert compare(prompts, base, tuned, rule="exact", results_path=out) == 0
    shown = capsys.readouterr().out
    row = next(line for line in shown.splitlines() if line.startswith(str(tuned)))
    share = float(row.removeprefix(str(tuned)).split()[1])
    records = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    wins = sum(r["scores"][1] > r["scores"][0] for r in records)
    ties = sum(r["scores"][1] == r["scores"][0] for r in records)
    assert len(records) == len(WORDS) and wins >= 5
    assert share == pytest.approx((wins + ties / 2) / len(WORDS), abs=1e-3)
    first = out.read_bytes()
    assert compare(prompts, base, tuned, rule="exact", results_path=out) == 0
    assert out.read_bytes() == first
    capsys.readouterr()
    assert compare(prompts, tuned, rule="exact") == 2
    assert "--runs: got 1, need the folders of two or more runs" in capsys.readouterr().err
    assert compare(prompts, base, tuned) == 2
    assert "--rule: is missing: give it or --reward" in capsys.readouterr().err
    assert compare(prompts, base, tuned, rule="exact", max_new_tokens=60) == 2
    assert "line 1: got " in capsys.readouterr().err


def test_a_person_judges_blindly_and_may_stop(work, tuned, prompts, capsys, monkeypatch):
    """The right answer is now first, now second; a stop keeps what was judged."""
    seen = []

    def answers(_question):
        lines = capsys.readouterr().out.splitlines()
        shown = [line.split(maxsplit=1)[1:] for line in lines if line.startswith("  ")]
        texts = [text[0] if text else "" for text in shown]
        right = next((n for n, text in enumerate(texts, 1) if text.isupper()), None)
        if len(seen) == 6:
            return "q"
        seen.append(right)
        return "1=2" if right is None else f"{right} {3 - right}"

    monkeypatch.setattr("builtins.input", answers)
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True)
    out = work / "mine.jsonl"
    assert compare(prompts, "runs/transformer", tuned, results_path=out) == 0
    assert {1, 2} <= set(seen)
    records = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    assert len(records) == 6
    for record, right in zip(records, seen):
        assert right is None or record["scores"][1] > record["scores"][0]
    assert "6 prompts, judged by you" in capsys.readouterr().out
    kept = out.read_bytes()
    assert compare(prompts, "runs/transformer", tuned, rule="exact", results_path=out) == 2
    assert "which holds judgements of a person; name another file" in capsys.readouterr().err
    assert out.read_bytes() == kept


def test_a_judge_that_fails_leaves_the_earlier_file(work, tuned, prompts, capsys):
    out = work / "new" / "results.jsonl"
    assert compare(prompts, "runs/transformer", tuned, rule="length", results_path=out) == 0
    kept = out.read_bytes()
    lines = prompts.read_text(encoding="utf-8").splitlines()
    prompts.write_text("\n".join([*lines, '{"prompt": "no answer"}']), encoding="utf-8")
    assert compare(prompts, "runs/transformer", tuned, rule="exact", results_path=out) == 2
    shown = capsys.readouterr().err
    assert "line 13: the rule failed" in shown and "those so far are in" in shown
    assert out.read_bytes() == kept
