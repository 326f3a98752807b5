"""`sweep`, `scaling-law` and `plan` as a user runs them."""

import csv
import json
import re
import subprocess
import sys
import time

import pytest

from cs_lm.cli.commands import main as command
from cs_lm.config.run import RunConfig
from cs_lm.scaling.sweep import PlannedRun, read_spec
from cs_lm.scaling.sweep_results import Result, at_an_end
from cs_lm.scaling.sweep_runs import SweepFolder
from cs_lm.training.metrics_log import MetricsLog
from cs_lm.training.run_dir import RunFolder
from tests.end_to_end.conftest import ROOT, write_corpus

# fmt: off
FLAGS = [
    "--corpus_path", "animals.txt", "--vocab_size", "300", "--num_heads", "2", "--d_ff", "40",
    "--num_layers", "1", "--max_seq_length", "16", "--seq_length", "16", "--batch_size", "4",
    "--eval_tokens", "300", "--sample_interval", "0", "--device", "cpu", "--lr_min", "0",
]
# fmt: on
VARY = ["--vary", "lr=1e-3,1e-2", "d_model=16,32"]


@pytest.fixture
def work(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    write_corpus(tmp_path)
    return tmp_path


def sweep(*more, flags=FLAGS, vary=VARY):
    return command(["sweep", "--out_dir", "s", "--flags", " ".join(flags), *vary, *more])


def rows(folder="s"):
    with open(f"{folder}/results.csv", newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def losses(folder="s"):
    return {row["run"]: row["loss"] for row in rows(folder)}


@pytest.mark.slow
def test_a_grid_of_runs(work, capsys):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    flags = [*FLAGS, "--max_steps", "12"]
    assert sweep("--dry_run", flags=flags) == 0
    assert "4 runs, " in capsys.readouterr().out and not (work / "s").exists()
    assert sweep("--num_jobs", "2", flags=flags) == 0
    shown = capsys.readouterr().out
    assert shown.count("done, loss") == shown.count("training ") == 4 and "best     " in shown
    assert {row["state"] for row in rows()} == {"done"}
    best = min(rows(), key=lambda row: float(row["loss"]))
    assert f"best     {best['run']}: python run_clm.py" in shown
    assert f"--lr {best['lr']} --d_model {best['d_model']}" in shown
    for name in ("loss-lr.png", "loss-d_model.png", "settings.png"):
        assert (work / "s" / name).read_bytes().startswith(b"\x89PNG")
    # each is a run as run_clm.py makes it
    assert RunFolder(work / "s" / "runs" / best["run"]).read("last")["iteration"] == 12
    assert sweep(flags=flags) == 2
    assert "holds a sweep already; add --resume" in capsys.readouterr().err
    before = losses()
    assert sweep("--resume", flags=flags) == 0
    assert losses() == before and "done, loss" not in capsys.readouterr().out


def start(*more):
    return subprocess.Popen(
        [sys.executable, "-m", "cs_lm", "sweep", "--out_dir", "s", *more],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def wait_for(condition):
    end_s = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end_s
        time.sleep(0.02)


@pytest.mark.slow
def test_a_sweep_that_was_stopped_and_killed_goes_on(work):
    """After a signal its runs save; after a kill they go on alone, and the next sweep waits."""
    flags = [*FLAGS, "--max_steps", "60", "--save_interval", "5", "--log_interval", "1"]
    vary = ["--vary", "lr=1e-3,3e-3,1e-2"]
    first = ["--flags", " ".join([*flags, "--d_model", "16"]), *vary, "--num_jobs", "2"]

    def logs():
        return [path.read_bytes() for path in (work / "s" / "runs").glob("*/metrics.jsonl")]

    process = start(*first)
    wait_for(lambda: any(len(log) > 3000 for log in logs()))
    process.terminate()
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 143 and "runs save their work" in output, output
    process = start("--resume", "--num_jobs", "2")
    wait_for(lambda: any(b'"kind": "resume"' in log for log in logs()))
    process.kill()
    process.communicate(timeout=60)
    assert command(["sweep", "--out_dir", "s", "--resume", "--num_jobs", "2"]) == 0
    for row in rows():
        quiet = [*flags, "--d_model", "16", "--lr", row["lr"], "--out_dir", f"quiet/{row['run']}"]
        assert command(["train", *quiet]) == 0
        records = MetricsLog(work / "quiet" / row["run"] / "metrics.jsonl").records()
        assert [r["loss_nats"] for r in records if r["kind"] == "valid"][-1] == float(row["loss"])
    assert len(rows()) == 3


@pytest.mark.slow
def test_a_run_whose_sweep_was_killed_is_waited_for(work, monkeypatch):
    """Also if it has not got as far as to lock its folder."""
    flags = [*FLAGS, "--max_steps", "3"]
    process = start("--flags", " ".join(flags), "--vary", "lr=1e-3,1e-2")
    logs = work / "s" / "logs"
    wait_for(lambda: list(logs.glob("*.log")))
    process.kill()
    process.communicate(timeout=60)
    assert not list((work / "s" / "runs").glob("*/lock"))  # it is still importing
    assert command(["sweep", "--out_dir", "s", "--resume", "--num_jobs", "2"]) == 0
    assert {row["state"] for row in rows()} == {"done"}


def test_resume_with_the_family_named_again(work, capsys):
    """In other words, too; another family is refused. A dry run trains nothing."""
    flags = [*FLAGS, "--d_model", "16", "--max_steps", "12"]
    table = "".join(
        f"{flag[2:]} = {value if value.isdecimal() else json.dumps(value)}\n"
        for flag, value in zip(flags[::2], flags[1::2])
    )
    text = f"[flags]\n{table}[vary]\nlr = [0.001, 1e-2]\n"
    (work / "x.toml").write_text(text, encoding="utf-8")
    SweepFolder("s").write_spec(read_spec("x.toml"))
    argv = ["sweep", "--out_dir", "s", "--resume", "--dry_run"]
    (work / "y.json").write_text('{"isoflop": {"budgets": [1e9]}}', encoding="utf-8")
    same, other = ["--vary", "lr=1e-3,.01"], ["--vary", "lr=1e-3,.02"]
    flags = ["--flags", " ".join(flags)]
    for more in ([], ["--spec", "x.toml"], [*same, *flags]):
        assert command([*argv, *more]) == 0
        assert "2 runs, " in capsys.readouterr().out
    for more in ([*other, *flags], same, ["--spec", "y.json"]):
        assert command([*argv, *more]) == 2
        assert "--resume: the sweep in 's' is another one" in capsys.readouterr().err


def test_states_after_a_crash(tmp_path):
    folder = SweepFolder(tmp_path)
    folder.note("a", 0)
    with open(tmp_path / "states.jsonl", "ab") as file:
        file.write(b'{"run": "b", "sta')
    folder.note("c", 3)
    folder.note("a", 1)
    assert folder.statuses() == {"a": 1, "c": 3}


def test_a_sweep_that_began_meanwhile_is_kept(work, capsys):
    folder = SweepFolder("s")
    folder.path.mkdir()
    with folder.lock():
        assert sweep(vary=["--vary", "lr=1e-3"]) == 2
    assert "another process works on 's'" in capsys.readouterr().err
    assert not folder.exists() and not folder.results.exists()


@pytest.mark.slow
def test_runs_that_fail_and_two_at_once(work, capsys):
    """A run that fails does not end the sweep, and its output is named."""
    # a text that is too short: the flags are right, but each run fails
    spec = {"flags": {"corpus_path": "gone.txt"}, "vary": {"lr": [1e-3, 1e-2]}}
    (work / "gone.txt").write_text("x", encoding="utf-8")
    (work / "x.json").write_text(json.dumps(spec), encoding="utf-8")
    capsys.readouterr()
    assert command(["sweep", "--out_dir", "s", "--spec", "x.json"]) == 1
    shown = capsys.readouterr().out
    assert "2 of 2 runs failed" in shown and "failed with status 2" in shown
    assert shown.count("its output: s/logs/") == 2
    assert {row["state"] for row in rows()} == {"failed with status 2"}
    with SweepFolder("s").lock():
        assert command(["sweep", "--out_dir", "s", "--resume"]) == 2
    assert "another process works on 's'" in capsys.readouterr().err


def test_mistakes_are_named(work, capsys):
    for argv, words in (
        ([], "--spec: is missing"),
        (["--spec", "a.toml"], "a.toml"),
        (["--vary", "lr"], "--vary: got 'lr'"),
        (["--vary", "lr=1", "--spec", "x"], "--spec: cannot be used with"),
        (["--resume"], "'s' holds no sweep"),
        (["--resume", "--flags", "--lr 1"], "--flags: has no effect without --vary or --budgets"),
        (["--vary", "lr=1", "--num_jobs", "0"], "--num_jobs: got 0"),
        (["--vary", "lr=1", "--flags", "x"], "--flags: got 'x'"),
        (["--coordinate_check", "64"], "need two or more multiples of 16"),
        (["--coordinate_check", "64", "128", "--resume"], "cannot be used with"),
        (["--lr", "3"], "--lr: has no effect without --coordinate_check"),
        (["--coordinate_check", "64", "128", "--dry_run"], "--dry_run: has no effect with"),
        (["--vary", "lr=1", "lr=2"], "--vary: names lr twice"),
        (["--vary", "lr=1", "--flags", "--seed 1 --seed 2"], "--flags: has --seed twice"),
        (["--vary", "lr=1", "--flags", "--prompt 'x"], "No closing quotation"),
        (["--spec", "."], "--spec: '.' cannot be read"),
    ):
        assert command(["sweep", "--out_dir", "s", *argv]) == 2
        error = capsys.readouterr().err
        assert words in error and "Traceback" not in error, argv
    assert not (work / "s").exists()
    for more in (["--vary", "lr=1"], ["--coordinate_check", "64", "128"]):
        assert command(["sweep", "--out_dir", "animals.txt", *more]) == 2
        assert "'animals.txt' is a file" in capsys.readouterr().err


def test_plan(capsys):
    for argv, words in (
        (["--flops", "5.76e23"], "67.9 B"),
        (["--num_devices", "64", "--hours", "720"], "budget: "),
        (["--money", "1e5", "--price", "2", "--served_tokens", "1e13"], "serving 10 T tokens"),
        (["--model", "gpt3-175B", "--num_devices", "1024", "--device_kind", "A100"], "meshes fit"),
        (["--model", "gpt2-small", "--device_kind", "cpu"], " of one cpu at 40%"),
        (["--model", "gpt2-small", "--num_devices", "8"], " kWh"),
        (["--parameters", "7e9", "--price", "2"], "price: "),
        (["--show", "gpt3"], "RoBERTa-Large"),
        (["--show", "runs"], "Llama 3 405B"),
        (["--show", "devices"], "H100"),
        (["--model", "transformer"], "parameters     51.5 M"),
        (["--model", "gpt3-13B", "--num_devices", "64", "--machine_years", "1e-6"], "never ends"),
    ):
        assert command(["plan", *argv]) == 0
        assert words in capsys.readouterr().out
    for argv, words in (
        ([], "--flops: is missing"),
        (["--flops", "1e20", "--model", "gpt2-small"], "are given together"),
        (["--hours", "3"], "has no effect without --num_devices"),
        (["--money", "3"], "has no effect without --price"),
        (["--flops", "-1"], "--flops: got -1"),
        (["--parameters", "7e9", "--num_devices", "8"], "needs --model"),
        (["--model", "gpt3-175B", "--num_devices", "8"], "no mesh of 8 H100 holds the model"),
        (["--model", "gpt2-small", "--num_devices", "7919"], "no mesh of 7919 H100 divides"),
        (["--hours", "1", "--num_devices", "1", "--mfu", "2"], "--mfu: got 2"),
        (["--flops", "1e20", "--price", "2"], "--price: has no effect without --money"),
        (["--flops", "1e20", "--mfu", "0.5"], "--mfu: has no effect without"),
        (["--parameters", "1e9", "--save_s", "3"], "--save_s: has no effect without"),
        (["--parameters", "1e9", "--seq_length", "3"], "--seq_length: has no effect without"),
        (["--hours", "1e308", "--num_devices", "100000"], "got inf, need a budget below 1e40"),
    ):
        assert command(["plan", *argv]) == 2
        shown = capsys.readouterr()
        assert words in shown.err and not shown.out, argv


def test_scaling_law(work, capsys):
    pytest.importorskip("scipy", reason="scipy is not installed")
    found = []
    for size in (1e5, 2e5, 4e5, 8e5):
        for flops in (1e12, 2e12, 4e12):
            tokens = flops / 6 / size
            loss = 1.5 + 50 * size**-0.4 + 100 * tokens**-0.4
            found.append({"parameters": size, "flops": flops, "tokens": tokens, "loss": loss})
    (work / "runs.json").write_text(json.dumps(found), encoding="utf-8")
    argv = ["scaling-law", "--data", "runs.json", "--num_samples", "20"]
    assert command([*argv, "--predict", "1e14", "--out_dir", "law"]) == 0
    shown = capsys.readouterr().out
    assert re.search(r"alpha +0\.4 ", shown) and "1e+14" in shown
    law = json.loads((work / "law" / "scaling-law.json").read_text(encoding="utf-8"))
    assert law["parametric"]["E"]["value"] == pytest.approx(1.5, rel=1e-3)
    assert (work / "law" / "frontier.png").exists() and (work / "law" / "fit.png").exists()
    assert command([*argv, "--at_size", "1e6", "--at_tokens", "2e7"]) == 0
    assert "a run with N = 1 M and 20 M tokens: loss" in capsys.readouterr().out
    for more, words in (
        (["--at_size", "1"], "has no effect without --at_tokens"),
        (["--predict", "0"], "--predict: got 0"),
        (["--data", "gone.json"], "does not exist"),
        (["--num_samples", "1"], "--num_samples: got 1"),
    ):
        assert command(["scaling-law", "--data", "runs.json", *more]) == 2
        assert words in capsys.readouterr().err


def test_a_best_setting_at_an_end_is_told():
    config = RunConfig()

    def result(lr, budget, loss):
        run = PlannedRun("x", {"lr": lr, "budget": budget}, [], config)
        return Result(run, "done", 1, loss=loss)

    rising = [result(lr, lr * 10, 5 - lr) for lr in (1.0, 2.0, 3.0)]
    assert at_an_end(rising) == [("lr", "highest")]
    assert at_an_end([result(lr, 1, lr) for lr in (1.0, 2.0, 3.0)]) == [("lr", "lowest")]
    assert at_an_end([result(lr, 1, (lr - 2) ** 2) for lr in (1.0, 2.0, 3.0)]) == []
    assert at_an_end(rising[:2]) == []
