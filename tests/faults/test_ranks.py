"""Several processes train one run: equal to one, and none is left when one dies or stops."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import time

import pytest

from cs_lm.cli._fit import RANK_LOST
from cs_lm.training.metrics_log import MetricsLog
from cs_lm.training.run_dir import RunFolder
from tests.end_to_end.conftest import ROOT, write_corpus
from tests.ranks import free_port, launch_variables
from tests.sameness import assert_equal

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("torchrun")]
# fmt: off
RUN = [
    "--model", "gpt2-small", "--corpus_path", "animals.txt", "--vocab_size", "300",
    "--d_model", "24", "--num_heads", "3", "--d_ff", "40", "--num_layers", "2",
    "--max_seq_length", "16", "--seq_length", "16", "--batch_size", "7", "--grad_accum", "2",
    "--drop_rate", "0.1", "--device", "cpu", "--log_interval", "1", "--eval_interval", "5",
    "--save_interval", "10", "--sample_interval", "0", "--eval_tokens", "500",
    "--num_epochs", "1000", "--lr", "1e-3", "--lr_min", "1e-3", "--warmup_ratio", "0",
]
# fmt: on
LAST = 60
VARIABLES = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PYTHONFAULTHANDLER": "1"}
STARTED = []  # processes of the test that runs


@pytest.fixture(autouse=True)
def no_process_is_left():
    yield
    for process in STARTED:
        process.kill()
        process.wait()
    STARTED.clear()


def start(
    size, *flags, of_rank=lambda _: (), parallel=("--parallel", "ddp"), program=("run_clm.py",)
):
    """The processes of a run, as torchrun would start them."""
    path, *first = program
    port, command = free_port(), [sys.executable, str(ROOT / path), *first]
    variables = [launch_variables(rank, size, port) if size > 1 else {} for rank in range(size)]
    parallel = parallel if size > 1 else ()
    started = [
        subprocess.Popen(
            [*command, *parallel, *map(str, flags), *of_rank(rank)],
            env={**os.environ, **own, **VARIABLES},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank, own in enumerate(variables)
    ]
    STARTED.extend(started)
    return started


def finish(processes, timeout_s=120):
    """Exit status and output of each."""
    printed = [process.communicate(timeout=timeout_s)[0] for process in processes]
    return [process.returncode for process in processes], printed


def train(size, *flags, **more):
    statuses, printed = finish(start(size, *flags, **more))
    assert statuses == [0] * size, printed
    return printed


def numbers(folder):
    """Kind, step and losses of the records of training and validation."""
    return [
        (r["kind"], r["step"], r["loss_nats"])
        for r in MetricsLog(folder / "metrics.jsonl").records()
        if r["kind"] in ("train", "valid")
    ]


def assert_close(found, expected):
    assert [one[:2] for one in found] == [one[:2] for one in expected]
    assert [one[2] for one in found] == pytest.approx([one[2] for one in expected], rel=2e-6)


@pytest.fixture
def work(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_corpus(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def quiet(tmp_path_factory):
    """A run of two ranks that nothing disturbs."""
    folder = tmp_path_factory.mktemp("quiet")
    write_corpus(folder)
    with contextlib.chdir(folder):
        [printed, other] = train(2, *RUN, "--max_steps", LAST, "--out_dir", "run")
    assert "in each of 2 processes" in printed and other == ""
    return folder / "run"


def test_a_run_is_the_same_on_any_number_of_ranks(work, quiet):
    """Dropout, uneven rows, validation and all; a checkpoint goes on with any other number."""
    assert not {"checkpoints", "metrics.jsonl", "tokenizer"} - set(os.listdir(quiet))
    [config] = [r for r in MetricsLog(quiet / "metrics.jsonl").records() if "ranks" in r]
    assert len(config["ranks"]) == 2 and config["parallel"] == "ddp"
    train(1, *RUN, "--max_steps", 15, "--out_dir", "run")
    assert_close(numbers(work / "run"), numbers(quiet)[: len(numbers(work / "run"))])
    train(3, "--resume", "--resume_step", 10, "--max_steps", 20, "--out_dir", "run")
    assert_close(numbers(work / "run"), numbers(quiet)[: len(numbers(work / "run"))])


FSDP = ("--parallel", "fsdp")


def test_a_killed_rank_leaves_the_last_checkpoint_in_parts(work):
    processes = start(2, *RUN, "--out_dir", "run", "--max_steps", 100000, parallel=FSDP)
    wait_for_step(processes, work / "run", 25)
    processes[1].kill()
    statuses, printed = finish(processes)
    assert statuses[0] == RANK_LOST and "rank 1 (process" in printed[0], printed
    assert "the ranks save together, so this step is not saved" in printed[0]
    assert "is kept; start the same command again, with --resume" in printed[0]
    last = RunFolder("run").checkpoints.steps()[0]
    assert last % 5 == 0
    train(2, "--resume", "--max_steps", last + 5, "--out_dir", "run", parallel=FSDP)
    train(1, *RUN, "--max_steps", last + 5, "--out_dir", "one")
    assert_close(numbers(work / "run"), numbers(work / "one"))


# fmt: off
SHAPE = [
    "--corpus_path", "animals.txt", "--vocab_size", "300", "--d_model", "24", "--num_heads", "2",
    "--d_ff", "40", "--num_layers", "3", "--max_seq_length", "16", "--seq_length", "16",
    "--batch_size", "4", "--grad_accum", "3", "--device", "cpu", "--log_interval", "1",
    "--eval_interval", "5", "--save_interval", "5", "--eval_tokens", "500", "--lr", "1e-3",
    "--lr_min", "1e-3", "--warmup_ratio", "0", "--max_steps", "10",
]
# fmt: on


def test_a_model_that_ranks_share_trains_like_one(work):
    """On two stages; its checkpoint in parts goes on alone."""
    train(1, *SHAPE, "--out_dir", "one")
    flags = [*SHAPE[:-1], "5"]
    train(2, *flags, "--pipeline_parallel", 2, "--optimizer_sharding", "--out_dir", "run")
    train(1, "--resume", "--max_steps", 10, "--out_dir", "run")
    assert_close(numbers(work / "run"), numbers(work / "one"))


def wait_for_step(processes, folder, step):
    log = MetricsLog(folder / "metrics.jsonl")
    end_s = time.monotonic() + 100
    while time.monotonic() < end_s and all(process.poll() is None for process in processes):
        if log.path.exists() and any(r["step"] >= step for r in log.records(warn=False)):
            return
        time.sleep(0.05)
    for process in processes:
        process.send_signal(signal.SIGABRT)  # it prints where each thread is
    statuses, printed = finish(processes)
    raise AssertionError("\n".join([str(statuses), *printed]))


def state_of(folder, step):
    return RunFolder(folder).checkpoints.read(step)


def test_a_signal_to_one_rank_stops_all_at_the_same_step(work, quiet):
    processes = start(2, *RUN, "--out_dir", "run", "--max_steps", LAST)
    wait_for_step(processes, work / "run", 5)
    processes[1].send_signal(signal.SIGUSR1)
    statuses, printed = finish(processes)
    assert statuses == [128 + signal.SIGUSR1] * 2 and printed[1] == ""
    step = int(re.search(r"stopped by SIGUSR1 after step (\d+)", printed[0])[1])
    assert RunFolder("run").checkpoints.steps()[0] == step
    train(2, "--resume", "--out_dir", "run")
    wanted, found = (state_of(folder, LAST) for folder in (quiet, work / "run"))
    for key in ("model", "optimizer"):
        assert_equal(wanted[key], found[key])


@pytest.mark.parametrize("lost", (0, 1))
def test_a_killed_rank_ends_the_others_with_its_name(work, lost):
    processes = start(2, *RUN, "--out_dir", "run", "--max_steps", 100000)
    wait_for_step(processes, work / "run", 5)
    processes[lost].kill()
    begun_s = time.monotonic()
    statuses, printed = finish(processes)
    assert time.monotonic() - begun_s < 90
    assert statuses[1 - lost] == RANK_LOST, printed
    name = rf"rank {lost} \(process {processes[lost].pid} on .*\) has ended"
    assert re.search(name, printed[1 - lost]), printed
    if lost == 1:
        step = int(re.search(r"step (\d+) of \d+ is saved", printed[0])[1])
        assert state_of(work / "run", step)["iteration"] == step


def test_a_rank_that_does_not_answer_is_named(work):
    processes = start(2, *RUN, "--out_dir", "run", "--max_steps", 100000, "--dist_timeout_s", 3)
    wait_for_step(processes, work / "run", 5)
    processes[1].send_signal(signal.SIGSTOP)
    begun_s = time.monotonic()
    output = processes[0].communicate(timeout=60)[0]
    processes[1].kill()
    assert processes[0].returncode == RANK_LOST and "rank 1 (process" in output
    assert time.monotonic() - begun_s < 33


HINDERED = "tests/faults/hindered_run.py"


def test_no_rank_is_lost_while_another_one_saves(work, quiet):
    """Each save takes longer than a rank may be silent, and a best one is kept after it."""
    flags = ["--max_steps", 20, "--out_dir", "run", "--dist_timeout_s", 3]
    train(2, *RUN, *flags, program=(HINDERED, "slow"))
    found = numbers(work / "run")
    assert found == numbers(quiet)[: len(found)] and found[-1][1] == 20
    assert RunFolder("run").checkpoints.steps() == [20, 15]
    assert RunFolder("run").checkpoints.best().step == 20
    # and all ranks go on from the copy that rank 0 has found sound
    path = RunFolder("run").checkpoints.path(20) / "state.pt"
    content = path.read_bytes()
    path.unlink()  # the best one is a link to it
    path.write_bytes(content[:999] + bytes([content[999] ^ 1]) + content[1000:])
    printed = train(2, "--resume", "--max_steps", 22, "--out_dir", "run")
    assert "SKIPPED checkpoint" in printed[0]
    steps = [one for one in numbers(work / "run") if one[0] == "train"]
    assert steps == [one for one in numbers(quiet) if one[0] == "train"][: len(steps)]
    assert len(steps) == 22


def test_weights_that_differ_are_not_saved(work):
    flags = ["--max_steps", 20, "--out_dir", "run", "--check_interval", 14]
    statuses, printed = finish(start(2, *RUN, *flags, program=(HINDERED, "flip")))
    assert statuses == [2, 2]
    expected = "after step 14, the ranks differ in ln_final.weight, .* the checkpoint of step 10 is"
    assert re.search(expected, printed[0]), printed[0]
    assert RunFolder("run").checkpoints.steps()[0] == 10


def test_settings_that_differ_are_named_once(work):
    statuses, printed = finish(
        start(2, *RUN, "--out_dir", "run", of_rank=lambda rank: ("--seed", str(rank)))
    )
    assert statuses == [2, 2] and printed[0] == printed[1].replace("rank 1: ", "", 1)
    assert printed[0].count("\n") == 1 and "seed: got 0 at rank 0 and 1 at rank 1" in printed[0]
    assert not (work / "run").exists()
