"""`cs-lm sft`: from a base run to one that answers, and back after a stop."""

import json
import os

import pytest
import torch

from cs_lm.alignment.conversations import Message, template_of
from cs_lm.cli.commands import main as command
from cs_lm.cli.train import main as run_clm
from cs_lm.config.model import GPT2Config
from cs_lm.inference.decoding_config import DecodingConfig
from cs_lm.inference.generate import generate_samples
from cs_lm.inference.text import allowed_ids, complete, stop_ids_of
from cs_lm.training.checkpoint import read_checkpoint
from cs_lm.training.checkpoint_manager import STATE
from cs_lm.training.metrics_log import MetricsLog
from cs_lm.training.run_dir import RunFolder, load_trained
from tests.end_to_end.instructions import SPECIAL, WORDS
from tests.sameness import assert_equal

SHAPE = "--vocab_size 260 --d_model 32 --num_layers 2 --num_heads 2 --d_ff 64 --max_seq_length 64"
BASE = f"{SHAPE} --seq_length 32 --batch_size 8 --max_steps 8 --lr 2e-3 --device cpu".split()
SFT = {"--num_epochs": 999, "--batch_size": 8, "--lr": 3e-3} | {
    "--eval_interval": 4,
    "--save_interval": 3,
}


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """A folder with base runs of both architectures, and instructions with one-word answers."""
    folder = tmp_path_factory.mktemp("sft")
    here = os.getcwd()
    os.chdir(folder)
    try:
        with open("text.txt", "w", encoding="utf-8") as file:
            file.write("The cat and the dog saw a bird. " * 120)
        data = ["--corpus_path", "text.txt", "--special_tokens", *SPECIAL]
        assert run_clm([*BASE, *data, "--out_dir", "runs/transformer"]) == 0
        gpt2 = ["--model", "gpt2-small", "--out_dir", "runs/gpt2"]
        assert run_clm([*BASE, *data, *gpt2]) == 0
        with open("data.jsonl", "w", encoding="utf-8") as file:
            for word in WORDS * 3:
                record = {"instruction": f"shout {word}", "output": word.upper()}
                file.write(json.dumps(record) + "\n")
    finally:
        os.chdir(here)
    return folder


@pytest.fixture
def work(bases, tmp_path, monkeypatch):
    monkeypatch.chdir(bases)
    return tmp_path


def sft(*more, source="runs/transformer", data="data.jsonl", **changes):
    settings = {"--from": source, "--data": data, "--device": "cpu", **SFT}
    settings |= {f"--{name}": value for name, value in changes.items()}
    return command(["sft", *(str(word) for pair in settings.items() for word in pair), *more])


def state(folder, step):
    return read_checkpoint(RunFolder(folder).checkpoints.path(step) / STATE)


def test_a_model_learns_to_answer_and_to_end(work):
    """Validated on what it learns, and with text mixed in, whose loss falls, too."""
    out = work / "run"
    mix = ["--pretraining_mix", "0.25", "--pretraining_weight", "0.5"]
    assert sft(*mix, max_steps=160, eval_interval=80, out_dir=out, valid_data="data.jsonl") == 0
    records = list(MetricsLog(out / "metrics.jsonl").records())
    valid = [record for record in records if record["kind"] == "valid"]
    assert valid[-1]["loss_nats"] < 0.3 and valid[-1]["text_bits_per_byte"] < 1.5
    base = [r for r in MetricsLog("runs/transformer/metrics.jsonl").records() if "perplexity" in r]
    assert valid[-1]["text_bits_per_byte"] < base[-1]["bits_per_byte"]
    assert any(record["kind"] == "sample" for record in records)
    trained = load_trained(RunFolder(out), "last", torch.device("cpu"))
    assert "<|end|>" in trained.tokenizer.end_tokens
    template = template_of(trained.tokenizer)
    prompts = [template.render_for_completion((Message("user", f"shout {w}"),)) for w in WORDS]
    ends = stop_ids_of(trained.tokenizer, ())
    allowed = allowed_ids(trained.tokenizer, 260, None, ends)
    greedy = DecodingConfig(temperature=0.0, max_new_tokens=20)
    found = generate_samples(trained.model, prompts, greedy, ends, allowed)
    assert all(one.stopped for one in found)
    right = [trained.tokenizer.decode(one.token_ids) == w.upper() for one, w in zip(found, WORDS)]
    assert sum(right) >= 11  # of 12
    (text,) = complete(trained.model, trained.tokenizer, ["The "], DecodingConfig(seed=1))
    assert text.text


@pytest.mark.parametrize("source, more", [
    ("transformer", ["--pretraining_mix", "0.5", "--grad_accum", "2"]),
    ("transformer", ["--packing"]),
    ("gpt2", ["--seq_length", "48"]),
])  # fmt: skip
def test_a_resumed_run_is_the_same_to_the_last_bit(work, source, more):
    """From step 3 of 6; GPT-2 with its dropout."""
    assert GPT2Config().drop_rate > 0
    runs = work / "whole", work / "parts"
    for out in runs:
        assert sft(*more, source=f"runs/{source}", max_steps=6, keep_last=5, out_dir=out) == 0
    again = ["sft", "--resume", "--out_dir", str(runs[1]), "--resume_step", "3"]
    assert command(again) == 0
    whole, parts = (state(out, 6) for out in runs)
    assert_equal(whole, parts)
    logs = [
        [r for r in MetricsLog(out / "metrics.jsonl").records() if r["kind"] in ("train", "valid")]
        for out in runs
    ]
    for one, other in zip(*logs, strict=True):
        for key in ("loss_nats", "grad_norm", "lr", "text_bits_per_byte"):
            assert one.get(key) == other.get(key)


def test_padding_and_packing_learn_from_the_same_targets(work, capsys):
    for more in ([], ["--packing"]):
        out = work / ("packed" if more else "padded")
        assert sft(*more, max_steps=1, out_dir=out) == 0
    shown = capsys.readouterr().out
    assert shown.count("template chat") == 2
    facts = [
        next(MetricsLog(work / name / "metrics.jsonl").records()) for name in ("padded", "packed")
    ]
    assert facts[1]["train_rows"] < facts[0]["train_rows"] / 2


def test_conversations_may_be_as_long_as_the_context(work, capsys):
    """A longer --seq_length is refused."""
    out = work / "run"
    assert sft(max_steps=1, seq_length=9999, out_dir=out) == 2
    assert "got 9999, but the model of --from has a context of 64" in capsys.readouterr().err
    assert sft(max_steps=1, seq_length=64, out_dir=out) == 0
    assert load_trained(RunFolder(out), "last", torch.device("cpu")).config.seq_length == 64


def test_other_data_is_refused_in_a_resumed_run(work, capsys):
    data = work / "own.jsonl"
    with open("data.jsonl", encoding="utf-8") as file:
        data.write_text(file.read(), encoding="utf-8")
    out = work / "run"
    assert sft(max_steps=3, out_dir=out, data=data) == 0
    again = ["sft", "--resume", "--out_dir", str(out), "--max_steps", "5"]
    record = json.dumps({"instruction": "shout cow", "output": "COW"})
    data.write_text(data.read_text(encoding="utf-8") + record, encoding="utf-8")
    capsys.readouterr()
    assert command(again) == 2
    assert "hold other records than when the run began" in capsys.readouterr().err
    for more in (["--packing"], ["--from", "runs/gpt2"], ["--template", "alpaca"]):
        assert command([*again, *more]) == 2
        assert f"{more[0]}: cannot change in a resumed run" in capsys.readouterr().err
    assert RunFolder(out).checkpoints.steps() == [3]


def test_a_resumed_run_takes_its_own_settings_in_other_words(work):
    out = work / "run"
    assert sft(max_steps=3, out_dir=out) == 0
    again = ["sft", "--resume", "--out_dir", str(out), "--max_steps", "4"]
    assert command([*again, "--template", "auto", "--from", "runs/transformer/"]) == 0
    assert state(out, 4)["extras"]["template"] == "chat"


def test_mistakes_are_named(work, capsys):
    out = str(work / "run")
    broken = work / "broken.jsonl"
    broken.write_text('{"instruction": "a", "output": "b"}\n{"instruction": 3}\n', encoding="utf-8")
    cases = [
        ([], "--out_dir: is missing"),
        (["--out_dir", out, "--valid_fraction", "1"], "--valid_fraction: got 1.0"),
        (["--out_dir", out, "--pretraining_path", "text.txt"], "no effect without --pretraining"),
        (
            ["--out_dir", out, "--pretraining_path", "no.txt", "--pretraining_mix", "1"],
            "--pretraining_path: got 'no.txt'",
        ),
        (["--out_dir", out, "--pretraining_mix", "0.001"], "less than half a window of text"),
        (
            ["--out_dir", out, "--valid_data", "data.jsonl", "--valid_fraction", "0.2"],
            "--valid_fraction: has no effect with --valid_data",
        ),
        (["--out_dir", out, "--lora_rank", "33"], "--lora_rank: got 33, need at most 32"),
        (["--out_dir", out, "--data", str(broken)], "broken.jsonl, line 2"),
        (["--out_dir", out, "--seq_length", "8"], "conversations are longer than 9 tokens"),
        (["--out_dir", "runs/transformer"], "holds a run already"),
        (["--out_dir", out, "--from", "nowhere"], "--from: got 'nowhere'"),
    ]
    for more, message in cases:
        flags = {"--from": "runs/transformer", "--data": "data.jsonl"}
        flags |= dict(zip(more[::2], more[1::2]))
        argv = [word for pair in flags.items() for word in pair]
        assert command(["sft", *argv]) == 2, more
        errors = capsys.readouterr().err
        assert message in errors and "Traceback" not in errors, (more, errors)
    assert not os.path.exists(out)
    assert command(["sft", "--resume", "--out_dir", "runs/transformer"]) == 2
    assert "is a run of cs-lm train, not of sft" in capsys.readouterr().err


def test_run_clm_does_not_resume_it(work, capsys):
    out = work / "run"
    assert sft(max_steps=1, out_dir=out) == 0
    capsys.readouterr()
    assert run_clm(["--resume", "--out_dir", str(out)]) == 2
    assert "python -m cs_lm sft --resume" in capsys.readouterr().err


@pytest.mark.parametrize("source", ["runs/transformer", "runs/gpt2"])
def test_low_rank_changes_are_trained_merged_and_resumed(work, source, capsys):
    """The run is a plain model; the embedding is that of the source, to the last bit."""
    runs = work / "whole", work / "parts"
    more = {"lora_rank": 4, "lora_alpha": 8, "lr": 2e-2, "max_steps": 12, "keep_last": 9}
    for out in runs:
        assert sft(source=source, out_dir=out, **more) == 0
    assert command(["sft", "--resume", "--out_dir", str(runs[1]), "--resume_step", "6"]) == 0
    first, second = (state(out, 12) for out in runs)
    assert_equal(first, second)
    base = RunFolder(source).read("best")["model"]
    assert torch.equal(first["model"]["token_embeddings.weight"], base["token_embeddings.weight"])
    changed = [name for name in base if not torch.equal(base[name], first["model"][name])]
    assert changed and all(n.startswith("layers.") or n == "dropout_state" for n in changed)
    valid = [r for r in MetricsLog(runs[0] / "metrics.jsonl").records() if r["kind"] == "valid"]
    assert valid[-1]["loss_nats"] < valid[0]["loss_nats"]
    number = sum(one.numel() for one in first["extras"]["lora"].values())
    assert first["optimizer"]["state"] and number < 0.4 * sum(x.numel() for x in base.values())
    assert command(["generate", "--out_dir", str(runs[0]), "--prompt", "The"]) == 0
    assert command(["verify", "--out_dir", str(runs[0])]) == 0
    assert sft("--lora_alpha", "3", out_dir=work / "x") == 2
    assert "--lora_alpha: has no effect without --lora_rank" in capsys.readouterr().err


def test_low_rank_changes_in_bfloat16(work):
    out = work / "run"
    more = {"lora_rank": 2, "max_steps": 4, "pretraining_mix": 0.25, "eval_interval": 2}
    assert sft(out_dir=out, dtype="bfloat16", **more) == 0
    model = state(out, 4)["model"]
    assert all(x.dtype == torch.float32 for x in model.values() if x.is_floating_point())


def test_the_template_of_a_run_goes_on_to_the_next(work):
    first, second, base = work / "first", work / "second", work / "long"
    shape = " ".join(BASE).replace("--max_seq_length 64", "--max_seq_length 256").split()
    data = ["--corpus_path", "text.txt", "--special_tokens", *SPECIAL]
    assert run_clm([*shape, *data, "--out_dir", str(base)]) == 0
    assert sft(source=str(base), max_steps=2, out_dir=first, template="alpaca") == 0
    assert sft(source=str(first), max_steps=2, out_dir=second) == 0
    extras = state(second, 2)["extras"]
    assert extras["template"] == "alpaca" == extras["stage"]["config"]["template"]
    assert command(["sft", "--resume", "--out_dir", str(second), "--max_steps", "3"]) == 0
