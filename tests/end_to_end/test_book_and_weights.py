"""The book's experiment, and pretrained weights as runs, by command."""

import json

import pytest
import torch

from cs_lm.cli import book
from cs_lm.cli.commands import main as command
from cs_lm.cli.train import main as train
from cs_lm.config.flags import FlagParser, add_flags, config_from_flags
from cs_lm.config.model import GPT2Config
from cs_lm.config.run import RunConfig, named_run
from cs_lm.optim.schedule import learning_rate
from cs_lm.training.metrics_log import read_metrics
from cs_lm.training.run_dir import RunFolder, load_trained

TINY = "--d_model 16 --num_heads 2 --num_layers 1 --d_ff 40 --vocab_size 400"


@pytest.fixture
def work(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_settings_are_the_books(work):
    flags = book.flags_of_run(book.BookConfig(corpus_path="story.txt"), False)
    parser = FlagParser(prog="run_clm.py")
    add_flags(parser, RunConfig)
    config = config_from_flags(named_run("gpt2-small"), parser.parse_strictly(flags))
    assert config.model == GPT2Config(
        768, 12, 3072, 50257, 12, 256, 0.1, qkv_bias=False, tied_head=False, init="torch"
    )
    steps = config.num_steps(4631)
    assert steps == 90
    assert {learning_rate(step, steps, config.optim) for step in range(steps)} == {4e-4}
    assert config.optim.weight_decay == 0.1 and config.optim.max_norm == float("inf")
    assert (config.batch_size, config.seq_length, config.data.sampling) == (2, 256, "epoch")


def test_the_experiment_by_command(work, monkeypatch, capsys):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    monkeypatch.setattr(book, "MODEL", f"{book.MODEL} {TINY}")
    assert command(["book", "--max_steps", "18", "--out_dir", "run"]) == 0
    shown = capsys.readouterr().out
    for name in ("loss-epoch.png", "perplexity-tokens.png"):
        assert (work / "run" / name).read_bytes().startswith(b"\x89PNG")
    (story,) = (work / "data").glob("book-stand-in_text-*.txt")
    assert len(story.read_text(encoding="utf-8")) == 20_479
    valid = [r for r in read_metrics(work / "run" / "metrics.jsonl") if r["kind"] == "valid"]
    assert [r["step"] for r in valid] == [1, 5, 10, 15, 18]
    *_, first, middle, last, note = shown.splitlines()
    assert note == "the range of other seeds is known after 90 updates"
    assert first.split() == [
        "1",
        "9.781",
        "9.933",
        "1",
        f"{valid[0]['train_loss_nats']:.3f}",
        f"{valid[0]['loss_nats']:.3f}",
    ]
    assert middle.split()[3] == "15" and last.split()[:4] == ["86", "0.391", "6.452", "18"]
    assert command(["book", "--max_steps", "18", "--out_dir", "run"]) == 0  # only shows it
    assert "18 already" in capsys.readouterr().out


def test_the_end_is_placed_among_the_seeds(monkeypatch):
    ends = {"cs_lm": ((0.9, 6.3), (0.5, 6.6)), "torch.nn": ((0.3, 6.5), (0.7, 6.4))}
    monkeypatch.setattr(book, "SEED_ENDS", ends)
    early = {"kind": "valid", "step": 85, "train_loss_nats": 9.0, "loss_nats": 9.0}
    last = {"kind": "valid", "step": 90, "train_loss_nats": 0.8, "loss_nats": 6.2}
    _, *rows = book.place_among_seeds([early, last, {"kind": "end", "step": 90}]).splitlines()
    assert [" ".join(row.split()) for row in rows] == [
        "training cs_lm (2 seeds) 0.500 to 0.900 this run 0.800: in the range",
        "training torch.nn (2 seeds) 0.300 to 0.700 this run 0.800: above the range",
        "validation cs_lm (2 seeds) 6.300 to 6.600 this run 6.200: below the range",
        "validation torch.nn (2 seeds) 6.400 to 6.500 this run 6.200: below the range",
    ]


def imported(work, text):
    """A run trained here, exported, and imported again."""
    pytest.importorskip("safetensors", reason="safetensors is not installed")
    flags = f"--model gpt2-small {TINY} --max_seq_length 32 --seq_length 16 --batch_size 4"
    run = ["--corpus_path", str(text), "--max_steps", "6", "--out_dir", "first"]
    assert train([*flags.split(), *run]) == 0
    assert (
        command(["export-weights", "--out_dir", "first", "--to", "out", "--checkpoint", "last"])
        == 0
    )
    assert command(["import-weights", "--from", "out", "--out_dir", "second"]) == 0


def test_an_imported_run_writes_is_evaluated_and_trained(work, capsys):
    text = work / "text.txt"
    text.write_text("the cat sat on the mat, and the dog ran after it. " * 60, encoding="utf-8")
    imported(work, text)
    device = torch.device("cpu")
    first, second = (load_trained(RunFolder(f), "last", device) for f in ("first", "second"))
    for (name, a), b in zip(first.model.named_parameters(), second.model.parameters()):
        assert torch.equal(a, b), name
    assert second.iteration == 0
    capsys.readouterr()
    answers = []
    for folder in ("first", "second"):  # the best one is the only one there is
        generate = ["generate", "--out_dir", folder, "--prompt", "the cat", "--seed", "3"]
        assert command([*generate, "--max_new_tokens", "9"]) == 0
        answers.append(capsys.readouterr().out)
    assert answers[0] == answers[1]
    assert command(["verify", "--out_dir", "second"]) == 0
    more = ["--resume", "--out_dir", "second", "--corpus_path", str(text), "--valid_path"]
    more += [str(text), "--max_steps", "4", "--dropout", "0.3"]
    assert train(more) == 0
    shown = capsys.readouterr().out
    assert "steps 0 to 4" in shown and "--drop_rate is 0.3 from here on" in shown
    records = list(read_metrics(work / "second" / "metrics.jsonl"))
    assert [r["kind"] for r in records][:2] == ["import", "resume"]
    assert train(["--resume", "--out_dir", "second", "--d_model", "32"]) == 2


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("import-weights --out_dir x", "error: --from: is missing"),
        ("import-weights --from nowhere --out_dir x", "'nowhere'"),
        ("import-weights --from . --out_dir x", "has no config.json"),
        ("export-weights --to y", "error: --out_dir: is missing"),
        ("export-weights --out_dir x --to y --format onnx", "--format: got 'onnx', need one of"),
        ("export-weights --out_dir x --to y --shard_mb 0", "--shard_mb: got 0, need 1 or more"),
        ("export-weights --out_dir x --to y", "'x' is not the"),
    ],
)
def test_wrong_commands_say_what_to_do(argv, message, work, capsys):
    assert command(argv.split()) == 2
    errors = capsys.readouterr().err
    assert message in errors and all(x.startswith("error: ") for x in errors.splitlines())
    assert not list(work.iterdir())


def test_a_tokenizer_that_is_too_large_leaves_nothing(work, capsys):
    text = work / "text.txt"
    text.write_text("the cat sat on the mat, and the dog ran after it. " * 60, encoding="utf-8")
    imported(work, text)
    names = json.loads((work / "out/vocab.json").read_text(encoding="utf-8"))
    names["long"] = 5000
    (work / "out/tokenizer.json").unlink()  # or it would decide
    (work / "out/vocab.json").write_text(json.dumps(names), encoding="utf-8")
    assert command(["import-weights", "--from", "out", "--out_dir", "third"]) == 2
    assert "has 5001 tokens, but the weights are for 400" in capsys.readouterr().err
    assert not (work / "third").exists()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("--model gpt2", "--model: got 'gpt2', need one of gpt2-small, gpt2-medium, "),
        ("--model gpt2-smal", "--model: got 'gpt2-smal', need one of gpt2-small"),
        ("--model gpt2-small --theta 5", "--theta: has no effect with --model gpt2-small; leave"),
        ("--dropout 0.1", "--dropout: has no effect with --model transformer; leave it out"),
        ("--model gpt2-small --dropout 1", "--dropout: got 1.0, need 0 to 0.99"),
    ],
)
def test_flags_that_do_not_go_with_the_model(argv, message, work, capsys):
    assert train([*argv.split(), "--dry_run"]) == 2
    assert capsys.readouterr().err.startswith(f"error: {message}")
    assert not list(work.iterdir())
