"""run_clm.py from a text to samples, interrupted and resumed."""

import functools
import os
import re
import shutil
import signal
import subprocess
import sys

import pytest
import torch

from cs_lm.cli.train import main as train
from cs_lm.training.metrics_log import read_metrics
from tests.end_to_end.conftest import (
    ROOT,
    TINY,
    laid_over,
    last_checkpoint,
    run_script,
    write_corpus,
)


def test_a_run_says_what_it_does(finished_run):
    shown = (finished_run / "output.txt").read_text(encoding="utf-8")
    for expected in [
        r"tokenizer: training 300 tokens on animals.txt",
        r"token store: wrote [\d,]+ tokens, [\d.]+ bytes each",
        r"step 5/40 \| loss [\d.]+ \| lr [\de.-]+ \| norm [\d.]+ \| [\d,]+ tokens/s "
        r"\([\d.]+% of peak\) \| ETA",
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
        "metrics.jsonl",
        "lock",
        *(
            f"checkpoints/{name}/{file}"
            for name in ("step-00000020", "step-00000040", "best-00000040")
            for file in ("state.pt", "manifest.json")
        ),
        "tokenizer/vocab.json",
        "tokenizer/merges.txt",
        "tokenizer/end_tokens.json",
        "tokenizer/special_tokens.json",
    }


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
    flops = train[0]["model_flops_per_s"]
    assert flops > 0 and train[0]["utilisation"] == flops / first["peak_flops_per_s"]
    assert train[-1]["loss_nats"] < train[0]["loss_nats"] - 1
    assert [r["step"] for r in records if r["kind"] == "valid"] == [20, 40]
    assert [r["step"] for r in records if r["kind"] == "sample"] == [20, 40]


def test_an_existing_run_is_never_overwritten(finished_run):
    state = finished_run / "runs" / "animals" / "checkpoints" / "step-00000040" / "state.pt"
    before = state.read_bytes()
    result = run_script(finished_run, *TINY, "--corpus_path", "animals.txt")
    assert result.returncode == 2
    assert "holds a run already; add --resume to continue it" in result.stderr
    assert state.read_bytes() == before


def test_resume_of_a_finished_run_says_so(finished_run):
    result = run_script(finished_run, "--corpus_path", "animals.txt", "--resume")
    assert result.returncode == 0 and "is at step 40 of 40 already; raise --num" in result.stdout


def test_a_finished_run_goes_on_from_an_earlier_step(finished_run, tmp_path):
    shutil.copytree(finished_run / "runs", tmp_path / "runs")
    shutil.copytree(finished_run / "data", tmp_path / "data")
    write_corpus(tmp_path)
    argv = ["--corpus_path", "animals.txt", "--resume", "--resume_step", "20"]
    result = run_script(tmp_path, *argv)
    assert result.returncode == 0 and "steps 20 to 40" in result.stdout, result.stderr
    one, two = (last_checkpoint(f / "runs" / "animals") for f in (finished_run, tmp_path))
    for name, weight in one["model"].items():
        assert torch.equal(weight, two["model"][name])


def test_resume_refuses_another_model(finished_run):
    argv = ["--corpus_path", "animals.txt", "--resume", "--d_model", "32", "--theta", "5"]
    result = run_script(finished_run, *argv)
    assert result.returncode == 2
    assert "--d_model: got 32, but the run to resume has 16" in result.stderr
    assert "--theta: got 5.0, but the run to resume has 100000.0" in result.stderr


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGINT for one process")
@pytest.mark.slow
@pytest.mark.parametrize("sampling", ["random", "epoch"])
def test_interrupted_and_resumed_is_the_uninterrupted_run(tmp_path, sampling):
    """Weights and moments to the last bit, and a log without gaps or repetitions."""
    write_corpus(tmp_path)
    argv = [*TINY, "--corpus_path", "animals.txt", "--max_steps", "200", "--sampling", sampling]
    argv += ["--num_epochs", "99", "--grad_accum", "2", "--eval_interval", "100"]
    argv += ["--sample_interval", "0"]
    whole = run_script(tmp_path, *argv, "--out_dir", "whole")
    assert whole.returncode == 0, whole.stderr
    process = subprocess.Popen(
        [sys.executable, ROOT / "run_clm.py", *laid_over(argv), "--out_dir", "cut"],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    for line in process.stdout:
        if line.startswith("step 30/200"):
            process.send_signal(signal.SIGINT)
            break
    rest, errors = process.communicate()
    assert process.returncode == 128 + signal.SIGINT, errors
    assert "saved; run the same command with --resume to continue" in rest
    stopped = last_checkpoint(tmp_path / "cut")["iteration"]
    assert 30 <= stopped < 200
    resumed = run_script(tmp_path, *argv, "--out_dir", "cut", "--resume")
    assert resumed.returncode == 0, resumed.stderr
    assert f"steps {stopped} to 200" in resumed.stdout
    one, two = (last_checkpoint(tmp_path / name) for name in ("whole", "cut"))
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
    for row in (
        "parameters",
        "FLOPs a token",
        "steps",
        "trained tokens",
        "memory",
        "disk",
        "lr at step 0",
        "lr at step 49",
    ):
        assert re.search(rf"^{row} ", result.stdout, re.MULTILINE), row
    assert list(tmp_path.iterdir()) == []


def test_dry_run_knows_the_store_that_a_run_made(finished_run):
    argv = [*TINY, "--corpus_path", "animals.txt", "--dry_run", "--num_epochs", "3"]
    argv += ["--out_dir", "other"]
    result = run_script(finished_run, *argv)
    assert result.returncode == 0 and "not encoded yet" not in result.stdout
    config = next(read_metrics(finished_run / "runs" / "animals" / "metrics.jsonl"))
    assert f"{config['num_parameters']:,}" in result.stdout
    assert f"{config['train_tokens']:,} tokens" in result.stdout


def test_resume_takes_new_settings_of_the_optimizer(tmp_path):
    write_corpus(tmp_path)
    run_script(tmp_path, *TINY, "--corpus_path", "animals.txt", "--max_steps", "4")
    changes = ["--weight_decay", "0.7", "--betas", "0.5", "0.6", "--eps", "1e-3"]
    argv = ["--corpus_path", "animals.txt", "--resume", "--max_steps", "6", *changes]
    result = run_script(tmp_path, *argv)
    assert result.returncode == 0, result.stderr
    assert "--weight_decay is 0.7 from here on, it was 0.01" in result.stdout
    groups = last_checkpoint(tmp_path / "runs" / "animals")["optimizer"]["param_groups"]
    assert [g["weight_decay"] for g in groups] == [0.7, 0.0]
    assert {(*g["betas"], g["eps"]) for g in groups} == {(0.5, 0.6, 1e-3)}


def test_resume_refuses_another_tokenizer_and_leaves_data_alone(finished_run):
    files = sorted((finished_run / "data").rglob("*.*"))
    before = [path.read_bytes() for path in files if path.is_file()]
    argv = ["--corpus_path", "animals.txt", "--resume", "--special_tokens", "<x>"]
    result = run_script(finished_run, *argv)
    assert result.returncode == 2 and "--special_tokens: got <x>, but the run" in result.stderr
    assert [path.read_bytes() for path in files if path.is_file()] == before


def test_a_run_that_diverges_stops(tmp_path):
    write_corpus(tmp_path)
    argv = [*TINY, "--corpus_path", "animals.txt", "--max_steps", "30", "--warmup_ratio", "0"]
    argv += ["--save_interval", "1", "--lr", "1000", "--max_norm", "inf", "--weight_decay", "1000"]
    result = run_script(tmp_path, *argv)
    assert result.returncode == 3, result.stdout + result.stderr
    assert re.search(r"error: training: .* is not finite", result.stderr), result.stderr
    assert "lower --lr or --max_norm" in result.stderr
    state = last_checkpoint(tmp_path / "runs" / "animals")["model"]
    assert all(weight.isfinite().all() for weight in state.values())


def test_a_run_that_died_before_its_first_checkpoint_begins_anew(tmp_path):
    write_corpus(tmp_path)
    (tmp_path / "runs" / "animals").mkdir(parents=True)
    log = tmp_path / "runs" / "animals" / "metrics.jsonl"
    log.write_text('{"kind": "config", "step": 0}\n', encoding="utf-8")
    result = run_script(tmp_path, *TINY, "--corpus_path", "animals.txt", "--max_steps", "2")
    assert result.returncode == 0, result.stderr
    assert [r["kind"] for r in read_metrics(log)].count("config") == 1


def test_a_run_with_only_a_best_checkpoint_goes_on_from_it(tmp_path):
    write_corpus(tmp_path)
    argv = ["--corpus_path", "animals.txt"]
    run_script(tmp_path, *TINY, *argv, "--max_steps", "4", "--eval_interval", "4")
    shutil.rmtree(tmp_path / "runs" / "animals" / "checkpoints" / "step-00000004")
    result = run_script(tmp_path, *argv, "--resume", "--max_steps", "6")
    assert result.returncode == 0 and "steps 4 to 6" in result.stdout, result.stderr


def test_dry_run_refuses_what_the_run_would(finished_run, tmp_path):
    (tmp_path / "short.txt").write_text("ab", encoding="utf-8")
    argv = [*TINY, "--corpus_path", "animals.txt", "--dry_run"]
    for more, message in [
        ([], "holds a run already; add --resume"),
        (
            ["--out_dir", "x", "--max_seq_length", "9999", "--seq_length", "9999"],
            "training text: g",
        ),
        (["--out_dir", "x", "--valid_fraction", "0.001"], "validation text: got 5 tokens"),
        (["--out_dir", "animals.txt/x"], "--out_dir: got 'animals.txt/x', but 'animals.txt' is"),
        (["--out_dir", "x", "--corpus_path", str(tmp_path / "short.txt")], "training text: got"),
    ]:
        result = run_script(finished_run, *argv, *more)
        assert result.returncode == 2 and message in result.stderr, result.stderr
    other = run_script(finished_run, *argv, "--out_dir", "x", "--vocab_size", "310")
    assert other.returncode == 0 and "(not encoded yet)" in other.stdout


@pytest.mark.slow
def test_training_outlives_its_terminal(tmp_path):
    """A closed pipe ends the display, not the run."""
    write_corpus(tmp_path)
    process = subprocess.Popen(
        [
            sys.executable,
            ROOT / "run_clm.py",
            *TINY,
            "--corpus_path",
            "animals.txt",
            "--max_steps",
            "60",
        ],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    for line in process.stdout:
        if line.startswith(b"training"):
            break
    process.stdout.close()
    errors = process.stderr.read().decode()
    assert process.wait() == 0 and errors == ""
    assert last_checkpoint(tmp_path / "runs" / "animals")["iteration"] == 60


def test_a_damaged_store_is_noticed(tmp_path):
    write_corpus(tmp_path)
    argv = [*TINY, "--corpus_path", "animals.txt", "--max_steps", "2"]
    assert run_script(tmp_path, *argv).returncode == 0
    (chunk,) = (tmp_path / "data").glob("animals_chunks-*/chunk_00000.bin")
    chunk.write_bytes(chunk.read_bytes()[:-2] + b"\xff\xff")
    result = run_script(tmp_path, *argv, "--out_dir", "x")
    assert result.returncode == 2 and "has changed since it was written; delete" in result.stderr


@pytest.mark.slow
def test_checkpoints_do_not_tell_whether_a_run_was_compiled(tmp_path, monkeypatch, capsys):
    """The same names and, to rounding, the same weights; and a run may go on without it."""
    monkeypatch.chdir(tmp_path)
    write_corpus(tmp_path)
    compiled = functools.partial(torch.compile, backend="aot_eager")  # needs no compiler
    monkeypatch.setattr(torch, "compile", compiled)
    argv = [*TINY, "--corpus_path", "animals.txt"]
    states = []
    for flags in (["--compile", "--out_dir", "with"], ["--out_dir", "without"]):
        assert train([*argv, "--max_steps", "3", *flags]) == 0
        states.append(last_checkpoint(tmp_path / flags[-1])["model"])
    assert "--compile: torch.compile failed" not in capsys.readouterr().out
    torch.testing.assert_close(*states, rtol=1e-3, atol=1e-4)
    assert train(["--out_dir", "with", "--resume", "--no-compile", "--max_steps", "5"]) == 0
    assert "--compile is False from here on, it was True" in capsys.readouterr().out


HOLDER = """
import sys, time
from cs_lm.training.run_dir import RunFolder
with RunFolder(sys.argv[1]).lock():
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.mark.parametrize(
    "resume", [[], pytest.param(["--resume"], marks=pytest.mark.slow)], ids=["start", "resume"]
)
def test_two_runs_in_one_folder_are_refused(resume, tmp_path, finished_run):
    """Until the first one ends, even by SIGKILL: its lock ends with it."""
    if resume:
        shutil.copytree(finished_run / "runs" / "animals", tmp_path / "run")
        shutil.copytree(finished_run / "data", tmp_path / "data")
    write_corpus(tmp_path)
    argv = [*TINY, "--corpus_path", "animals.txt", "--out_dir", "run", "--max_steps", "42", *resume]
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, tmp_path / "run"], cwd=ROOT, stdout=subprocess.PIPE
    ) as holder:
        assert holder.stdout.readline().strip() == b"held"
        refused = run_script(tmp_path, *argv)
        holder.kill()
    assert refused.returncode == 2 and "--out_dir: another process is training" in refused.stderr
    assert run_script(tmp_path, *argv).returncode == 0
