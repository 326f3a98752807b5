"""`cs-lm rlhf`, with so few steps that nothing is learnt: all stages, the report, a stop."""

import json

import pytest

from cs_lm.cli import rlhf
from cs_lm.cli.commands import main as command
from cs_lm.training.run_dir import RunFolder

FEW = {"BASE": 3, "SFT": 4, "REWARD": 3, "PPO": 4, "PPO_FREE": 4, "GRPO": 4, "DPO": 3}
PARAMETERS = {"--d_model": 16, "--num_heads": 2, "--d_ff": 24, "--num_layers": 1}


def with_few_steps(flags, steps):
    words = flags.split()
    changes = {"--max_steps": steps, "--rollout_size": 16, "--batch_size": 8, **PARAMETERS}
    for flag, value in changes.items():
        if flag in words:
            words[words.index(flag) + 1] = str(value)
    if "--max_steps" not in words:
        words += ["--max_steps", str(steps)]
    return " ".join(words)


@pytest.mark.slow
def test_all_of_it_and_after_a_stop(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name, steps in FEW.items():
        monkeypatch.setattr(rlhf, name, with_few_steps(getattr(rlhf, name), steps))
    monkeypatch.setattr(rlhf, "NUM_RANKED", 12)
    monkeypatch.setattr(rlhf, "NUM_DEMONSTRATIONS", 60)
    monkeypatch.setattr(rlhf, "NUM_PROMPTS", 40)
    argv = ["rlhf", "--out_dir", "chain", "--device", "cpu"]
    begun = rlhf.Chain.run

    def stops(chain, name, *rest, **paths):
        if name == "dpo":
            raise KeyboardInterrupt
        begun(chain, name, *rest, **paths)

    with monkeypatch.context() as patch:
        patch.setattr(rlhf.Chain, "run", stops)
        with pytest.raises(KeyboardInterrupt):
            command(argv)
    before = (tmp_path / "chain" / "ppo" / "metrics.jsonl").read_bytes()
    capsys.readouterr()
    assert command(argv) == 0
    shown = capsys.readouterr().out
    assert "==== dpo" in shown and "==== ppo" not in shown
    assert (tmp_path / "chain" / "ppo" / "metrics.jsonl").read_bytes() == before
    summary = json.loads((tmp_path / "chain" / "summary.json").read_text(encoding="utf-8"))
    assert list(summary["models"]) == list(rlhf.MODELS)
    assert 0 <= summary["gold_accuracy"] <= 1 and 0.5 < summary["labeler_accuracy"] <= 1
    page = (tmp_path / "chain" / "report.html").read_text(encoding="utf-8")
    assert all(name in page for name in rlhf.MODELS)
    for name in ("base", "sft", "reward", "ppo", "ppo_ptx", "ppo_free", "dpo", "grpo"):
        assert RunFolder(tmp_path / "chain" / name).ends()
