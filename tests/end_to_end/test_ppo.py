"""`cs-lm ppo` and `cs-lm grpo`: from a run to one that scores better, and back after a stop."""

import json
import shutil
import sys

import pytest
import torch

from cs_lm.alignment.policy_task import PolicyTask
from cs_lm.cli.commands import main as command
from cs_lm.training.metrics_log import MetricsLog
from cs_lm.training.run_dir import RunFolder, load_trained
from tests.end_to_end.instructions import WORDS
from tests.end_to_end.test_reward import ranked, reward
from tests.end_to_end.test_sft import bases, sft, state, work
from tests.sameness import assert_equal

__all__ = ["bases", "ranked", "work"]  # fixtures


def policy(name, out, *more, **changes):
    settings = {"from": "runs/transformer", "prompts": "data.jsonl", "out_dir": out,
                "rollout_size": 16, "batch_size": 8, "max_new_tokens": 8, "num_epochs": 99,
                "lr": 1e-3, "lr_min": 1e-3, "eval_interval": 4, "save_interval": 3,
                "device": "cpu", **changes}  # fmt: skip
    if name == "grpo":
        settings = {"group_size": 4, **settings}
    flags = [word for key, value in settings.items() for word in (f"--{key}", str(value))]
    return command([name, *flags, *more])


def without_times(extras):
    facts = extras["rollouts"]["facts"]
    timed = [name for name in facts if name.endswith("_s")]
    return extras | {"rollouts": extras["rollouts"] | {"updating_s": 0, "facts": {
        name: value for name, value in facts.items() if name not in timed
    }}}  # fmt: skip


def assert_same_end(runs, step):
    """The checkpoints of two runs, but for times."""
    first, second = (state(out, step) for out in runs)
    for one in (first, second):
        one["extras"] = without_times(one["extras"])
    assert_equal(first, second)


def rollout_records(out):
    return [r for r in MetricsLog(out / "metrics.jsonl").records() if r["kind"] == "rollout"]


@pytest.mark.parametrize("name", ["ppo", pytest.param("grpo", marks=pytest.mark.slow)])
def test_answers_become_what_the_rule_likes(work, name):
    """Shorter ones; the run is a language model like any other."""
    out = work / name
    steps = 80 if name == "ppo" else 60
    assert policy(name, out, rule="length", max_steps=steps, lr=3e-3, lr_min=3e-3) == 0
    records = rollout_records(out)
    assert len(records) == steps // (4 if name == "ppo" else 2)
    first, last = (sum(r["score"] for r in part) / 3 for part in (records[:3], records[-3:]))
    assert last > first + 1.0
    assert all(r["ratio_gap"] < 1e-4 and r["sampling_s"] > 0 for r in records)
    valid = [r for r in MetricsLog(out / "metrics.jsonl").records() if r["kind"] == "valid"]
    assert len(valid) == steps // 4 and valid[-1]["kl_exact"] > 0.1
    assert command(["generate", "--out_dir", str(out), "--prompt", "The"]) == 0
    assert command(["verify", "--out_dir", str(out)]) == 0
    reference = load_trained(RunFolder("runs/transformer"), "best", torch.device("cpu"))
    learnt = load_trained(RunFolder(out), "last", torch.device("cpu"))
    assert not torch.equal(reference.model.output_embedding, learnt.model.output_embedding)


@pytest.mark.parametrize(
    ("name", "source"),
    [("ppo", "transformer"), ("grpo", "gpt2"),
     *(pytest.param(*other, marks=pytest.mark.slow)
       for other in (("ppo", "gpt2"), ("grpo", "transformer")))],
)  # fmt: skip
def test_a_resumed_run_is_the_same_to_the_last_bit(work, ranked, name, source):
    """From inside an iteration, with a reward model, text, and a changing coefficient."""
    more = {"from": f"runs/{source}", "reward": work / "rm", "pretraining_mix": 0.25}
    if name == "ppo":
        more |= {"kl_target": 0.5, "kl_horizon": 100, "value_lr": 2e-3}
    assert reward(ranked, work / "rm", max_steps=4) == 0
    runs = work / "whole", work / "parts"
    for out in runs:
        assert policy(name, out, max_steps=9, keep_last=9, **more) == 0
    assert command([name, "--resume", "--out_dir", str(runs[1]), "--resume_step", "3"]) == 0
    assert_same_end(runs, 9)
    logs = [
        [{k: v for k, v in r.items() if not k.endswith("_s")} for r in rollout_records(out)]
        for out in runs
    ]
    assert logs[0] == logs[1] and len(logs[0]) == (2 if name == "ppo" else 4)


def test_what_a_resume_needs_must_be_as_it_was(work, ranked, capsys):
    base, rm, out = work / "base", work / "rm", work / "ppo"
    shutil.copytree("runs/transformer", base)
    assert reward(ranked, rm, max_steps=3) == 0
    assert policy("ppo", out, reward=rm, max_steps=3, **{"from": base}) == 0
    resume = ["ppo", "--resume", "--out_dir", str(out), "--max_steps", "6"]
    shutil.move(rm, work / "away")
    assert reward(ranked, rm, max_steps=3, seed=1) == 0
    capsys.readouterr()
    assert command(resume) == 2
    assert "the reward model is not the one that the run began with" in capsys.readouterr().err
    shutil.rmtree(rm)
    shutil.move(work / "away", rm)
    shutil.move(base, work / "old")
    assert command(resume) == 2
    assert "is not there; need the folder of a run" in capsys.readouterr().err
    shutil.copytree("runs/transformer", base)
    assert sft(source=str(base), max_steps=2, out_dir=work / "sft") == 0
    shutil.rmtree(base)
    shutil.move(work / "sft", base)
    assert command(resume) == 2
    assert "holds other weights than when the run began" in capsys.readouterr().err
    shutil.rmtree(base)
    shutil.move(work / "old", base)
    assert command(resume) == 0
    assert command([*resume, "--kl_coef", "0.5"]) == 2
    assert "--kl_coef: cannot change in a resumed run" in capsys.readouterr().err


def test_a_rule_of_ones_own_and_a_second_one_to_watch(work, monkeypatch):
    (work / "mine.py").write_text(
        "def score(answer, fields):\n    return float(fields['prompt'].split()[-1] in answer)\n",
        encoding="utf-8",
    )
    monkeypatch.syspath_prepend(str(work))
    out = work / "ppo"
    prompts = work / "prompts.jsonl"
    prompts.write_text("\n".join(json.dumps({"prompt": f"say {w}"}) for w in WORDS))
    rules = {"rule": "mine:score", "gold_rule": "length", "prompts": prompts}
    assert policy("ppo", out, max_steps=4, **rules) == 0
    (record,) = rollout_records(out)
    assert record["gold"] < 0 <= record["score"]


@pytest.mark.parametrize("name", ["ppo", pytest.param("grpo", marks=pytest.mark.slow)])
def test_numbers_that_are_not_finite_end_the_run_in_a_line(work, name, capsys):
    out = work / name
    wild = {"lr": 500.0, "lr_min": 500.0, "max_norm": "inf", "save_interval": 1}
    status = policy(name, out, rule="length", max_steps=60, **wild)
    errors = capsys.readouterr().err
    assert status in (0, 2, 3) and "Traceback" not in errors
    if status:
        assert "not finite" in errors or "not numbers" in errors
    assert command(["verify", "--out_dir", str(out)]) == 0


def test_settings_that_would_falsify_the_divergence_are_refused_by_name(work, capsys):
    for flag in ("--top_k", "--top_p", "--min_p", "--repetition_penalty", "--no_repeat_ngram"):
        assert policy("ppo", work / "x", flag, "2", rule="length") == 2
        assert flag in capsys.readouterr().err


def test_a_bad_step_at_the_end_of_an_iteration_is_repeated(work, monkeypatch):
    """The coefficient changes there, too; the resumed run is the one without a bad step."""
    from cs_lm.alignment.ppo import ProximalPolicyOptimization as Task

    runs, learnt = (work / "whole", work / "parts"), Task.policy_loss
    more = {"rule": "length", "kl_target": 0.5, "kl_horizon": 100, "max_steps": 8}
    assert policy("ppo", runs[0], **more) == 0

    def bad(task, batch):
        total, count = learnt(task, batch)
        is_last = task._iteration == 0 and task._place == 3
        return total * (float("nan") if is_last else 1.0), count

    with monkeypatch.context() as patch:
        patch.setattr(Task, "policy_loss", bad)
        assert policy("ppo", runs[1], **more) == 3
    assert (runs[1] / "bad_step_00000004.json").exists()
    assert command(["ppo", "--resume", "--out_dir", str(runs[1])]) == 0
    assert_same_end(runs, 8)


def test_a_rule_that_fails_costs_nothing(work, monkeypatch, capsys):
    """In the second iteration; mended, the run is the one in which it never failed."""
    (work / "mine.py").write_text(
        "fails = False\n\n\ndef score(answer, fields):\n"
        "    assert not fails, 'no idea'\n    return -float(len(answer))\n",
        encoding="utf-8",
    )
    monkeypatch.syspath_prepend(str(work))
    monkeypatch.delitem(sys.modules, "mine", raising=False)
    import mine

    runs, begun = (work / "whole", work / "parts"), PolicyTask._begin_iteration
    more = {"rule": "mine:score", "kl_target": 0.5, "kl_horizon": 100, "max_steps": 8}
    assert policy("ppo", runs[0], **more) == 0

    def with_failure(task, step):
        mine.fails = step == 4
        begun(task, step)

    with monkeypatch.context() as patch:
        patch.setattr(PolicyTask, "_begin_iteration", with_failure)
        capsys.readouterr()
        assert policy("ppo", runs[1], **more) == 2
    assert "the rule failed on the answer" in capsys.readouterr().err
    mine.fails = False
    assert command(["ppo", "--resume", "--out_dir", str(runs[1])]) == 0
    assert_same_end(runs, 8)


def test_other_answers_of_the_prompts_are_noticed(work, capsys):
    prompts, out = work / "prompts.jsonl", work / "ppo"
    lines = [json.dumps({"prompt": f"say {w}", "answer": w}) for w in WORDS]
    prompts.write_text("\n".join(lines), encoding="utf-8")
    assert policy("ppo", out, rule="exact", prompts=prompts, max_steps=4) == 0
    prompts.write_text("\n".join(lines).replace('"answer": "cat"', '"answer": "dog"'))
    assert command(["ppo", "--resume", "--out_dir", str(out), "--max_steps", "8"]) == 2
    assert "hold other records than when the run began" in capsys.readouterr().err
