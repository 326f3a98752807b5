"""run_clm.py from a text to samples, interrupted and resumed."""

import os
import re
import signal
import subprocess
import sys

import pytest
import torch

from cs_lm.checkpoint import read_checkpoint
from cs_lm.metrics import read_metrics
from tests.end_to_end.conftest import ROOT, TINY, run_script, write_corpus


def test_a_run_says_what_it_does(finished_run):
    shown = (finished_run / "output.txt").read_text(encoding="utf-8")
    for expected in [
        r"tokenizer: training 300 tokens on animals.txt",
        r"token store: wrote [\d,]+ tokens, [\d.]+ bytes each",
        r"step 5/40 \| loss [\d.]+ \| lr [\de.-]+ \| norm [\d.]+ \| [\d,]+ tokens/s \| ETA 0:0\d",
        r"step 20 \| validation loss [\d.]+ \| perplexity [\d.]+ \| [\d.]+ bits/byte \| best",
        r"step 20 \| sample: The cat",
        r"done: 40 steps, 2,560 tokens",
        r"validation: loss .* bits/byte \(gzip -9 on the same text: [\d.]+\)",
        r"plot: .*loss.png|plot: needs the package matplotlib",
        r"python -m cs_lm generate --out_dir runs.animals",
    ]:
        assert re.search(expected, shown), expected


def test_a_run_leaves_these_files(finished_run):
    run = finished_run / "runs" / "animals"
    left = {p.relative_to(run).as_posix() for p in run.rglob("*") if p.is_file()}
    assert left - {"loss.png"} == {
        "metrics.jsonl", "checkpoints/last.pt", "checkpoints/best.pt",
        "tokenizer/vocab.json", "tokenizer/merges.txt", "tokenizer/special_tokens.json",
    }  # fmt: skip


def test_metrics(finished_run):
    records = list(read_metrics(finished_run / "runs" / "animals" / "metrics.jsonl"))
    first, last = records[0], records[-1]
    assert first["kind"] == "config" and first["config"]["model"]["d_model"] == 16
    assert first["versions"]["torch"] == torch.__version__
    assert last["kind"] == "end" and last["step"] == 40 and last["bits_per_byte"] > 0
    train = [r for r in records if r["kind"] == "train"]
    assert [r["step"] for r in train] == [1, *range(5, 41, 5)]
    assert all(r["tokens"] == 64 * r["step"] for r in train)
    assert {"loss_nats", "lr", "grad_norm", "tokens_per_s", "elapsed_s"} <= set(train[0])
    assert train[-1]["loss_nats"] < train[0]["loss_nats"] - 1
    assert [r["step"] for r in records if r["kind"] == "valid"] == [20, 40]
    assert [r["step"] for r in records if r["kind"] == "sample"] == [20, 40]


def test_an_existing_run_is_never_overwritten(finished_run):
    before = (finished_run / "runs" / "animals" / "checkpoints" / "last.pt").read_bytes()
    result = run_script(finished_run, *TINY, "--corpus_path", "animals.txt")
    assert result.returncode == 2
    assert "holds a run already; add --resume to continue it" in result.stderr
    assert (finished_run / "runs" / "animals" / "checkpoints" / "last.pt").read_bytes() == before


def test_resume_of_a_finished_run_says_so(finished_run):
    result = run_script(finished_run, "--corpus_path", "animals.txt", "--resume")
    assert result.returncode == 0 and "has all its 40 steps; raise --num_epochs" in result.stdout


def test_resume_refuses_another_model(finished_run):
    argv = ["--corpus_path", "animals.txt", "--resume", "--d_model", "32", "--theta", "5"]
    result = run_script(finished_run, *argv)
    assert result.returncode == 2
    assert "--d_model: got 32, but the run to resume has 16" in result.stderr
    assert "--theta: got 5.0, but the run to resume has 100000.0" in result.stderr


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGINT for one process")
@pytest.mark.parametrize("sampling", ["random", "epoch"])
def test_interrupted_and_resumed_is_the_uninterrupted_run(tmp_path, sampling):
    """Weights and moments to the last bit, and a log without gaps or repetitions."""
    write_corpus(tmp_path)
    argv = [*TINY, "--corpus_path", "animals.txt", "--max_steps", "400", "--sampling", sampling]
    argv += [
        "--num_epochs",
        "99",
        "--grad_accum",
        "2",
        "--eval_interval",
        "200",
        "--sample_interval",
        "0",
    ]
    whole = run_script(tmp_path, *argv, "--out_dir", "whole")
    assert whole.returncode == 0, whole.stderr
    process = subprocess.Popen(
        [sys.executable, ROOT / "run_clm.py", *argv, "--out_dir", "cut"],
        cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding="utf-8",
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUTF8": "1"},
    )  # fmt: skip
    for line in process.stdout:
        if line.startswith("step 30/400"):
            process.send_signal(signal.SIGINT)
            break
    rest, errors = process.communicate()
    assert process.returncode == 128 + signal.SIGINT, errors
    assert "saved; the same command with --resume goes on" in rest
    stopped = read_checkpoint(tmp_path / "cut" / "checkpoints" / "last.pt")["iteration"]
    assert 30 <= stopped < 400
    resumed = run_script(tmp_path, *argv, "--out_dir", "cut", "--resume")
    assert resumed.returncode == 0, resumed.stderr
    assert f"steps {stopped} to 400" in resumed.stdout
    one, two = (
        read_checkpoint(tmp_path / name / "checkpoints" / "last.pt") for name in ("whole", "cut")
    )
    for name, weight in one["model"].items():
        assert torch.equal(weight, two["model"][name]), name
    for index, state in one["optimizer"]["state"].items():
        assert torch.equal(state["exp_avg_sq"], two["optimizer"]["state"][index]["exp_avg_sq"])
    logs = [
        [
            (r["kind"], r["step"], r.get("loss_nats"), r["tokens"])
            for r in read_metrics(tmp_path / name / "metrics.jsonl")
            if r["kind"] in ("train", "valid")
        ]
        for name in ("whole", "cut")
    ]
    assert logs[0] == logs[1]


@pytest.mark.parametrize("flags", [["--ops", "clear"], ["--dtype", "bfloat16"]], ids=" ".join)
def test_other_ways_to_compute_train_too(tmp_path, flags):
    write_corpus(tmp_path)
    argv = [*TINY, "--corpus_path", "animals.txt", "--max_steps", "30", *flags]
    assert run_script(tmp_path, *argv).returncode == 0
    records = list(read_metrics(tmp_path / "runs" / "animals" / "metrics.jsonl"))
    losses = [r["loss_nats"] for r in records if r["kind"] == "train"]
    assert losses[-1] < losses[0] - 1


def test_tensorboard_events(tmp_path):
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    write_corpus(tmp_path)
    argv = [*TINY, "--corpus_path", "animals.txt", "--max_steps", "5", "--tensorboard"]
    result = run_script(tmp_path, *argv)
    assert result.returncode == 0, result.stderr
    assert list((tmp_path / "runs" / "animals" / "tensorboard").glob("events.*"))


def test_dry_run_of_the_embedded_default_writes_nothing(tmp_path):
    result = run_script(tmp_path, "--dry_run", "--max_steps", "50")
    assert result.returncode == 0, result.stderr
    for row in ("parameters", "FLOPs a token", "steps", "trained tokens", "memory", "disk",
                "lr at step 0", "lr at step 49"):  # fmt: skip
        assert re.search(rf"^{row} ", result.stdout, re.MULTILINE), row
    assert list(tmp_path.iterdir()) == []


def test_dry_run_knows_the_store_that_a_run_made(finished_run):
    argv = [*TINY, "--corpus_path", "animals.txt", "--dry_run", "--num_epochs", "3"]
    result = run_script(finished_run, *argv)
    assert result.returncode == 0 and "not encoded yet" not in result.stdout
    config = next(read_metrics(finished_run / "runs" / "animals" / "metrics.jsonl"))
    assert f"{config['num_parameters']:,}" in result.stdout
    assert f"{config['train_tokens']:,} tokens" in result.stdout
