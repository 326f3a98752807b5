"""Ctrl-C while text comes from a pipe that is silent: everything ends at once, nothing is left."""

import os
import shutil
import signal
import subprocess
import sys
import time

import pytest

from tests.end_to_end.conftest import ROOT, TINY, last_checkpoint, write_corpus

PATIENCE_S = 60


def wait_for_the_end_of_group(group: int) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return
        time.sleep(0.05)
    os.killpg(group, signal.SIGKILL)
    raise AssertionError("a process was left")


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGINT for one process")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda n: n.name)
@pytest.mark.parametrize("command", ["train-tokenizer", "encode"])
def test_interrupt(command, number, finished_run, tmp_path):
    run = finished_run / "runs" / "animals"
    argv = {
        "train-tokenizer": ["--vocab_path", "vocab.json", "--merges_path", "merges.txt"],
        "encode": [
            "--store",
            "store",
            "--vocab_path",
            str(run / "tokenizer" / "vocab.json"),
            "--merges_path",
            str(run / "tokenizer" / "merges.txt"),
        ],
    }[command]
    process = subprocess.Popen(
        [sys.executable, "-m", "cs_lm", command, *argv, "--corpus_path", "-", "--num_workers", "2"],
        cwd=tmp_path,
        stdin=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        # a shell's background job starts with the signal ignored, and Python leaves it so
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    for _ in range(20):  # far more than a pipe holds: it is read from, by now
        process.stdin.write(b"The cat sat on the mat, it was so.\n" * 8000)
    process.stdin.flush()
    process.send_signal(number)
    try:
        status = process.wait(PATIENCE_S)
    finally:
        wait_for_the_end_of_group(process.pid)
    errors = process.stderr.read().decode()
    assert status == 128 + number, errors
    assert errors.splitlines()[-1] == f"stopped by {number.name}" and "Traceback" not in errors
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


@pytest.mark.skipif(sys.platform == "win32", reason="it is a script for bash")
@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda n: n.name)
def test_the_script_passes_signals_on(number, tmp_path):
    """To the shell's process alone, as a job scheduler sends them."""
    venv = tmp_path / "venv"
    (venv / "bin").mkdir(parents=True)
    (venv / "bin" / "python").write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n', "utf-8")
    (venv / "bin" / "python").chmod(0o755)
    for name in ("run_clm.sh", "run_clm.py", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    wanted = [(ROOT / name).read_bytes() for name in ("pyproject.toml", "constraints.txt")]
    (venv / "installed-ui").write_bytes(b"".join(wanted))
    write_corpus(tmp_path)
    flags = [*TINY, "--corpus_path", "animals.txt", "--corpus_size", "animals"]
    flags += ["--max_steps", "100000", "--num_epochs", "1e6", "--out_dir", "run"]
    process = subprocess.Popen(
        ["bash", tmp_path / "run_clm.sh", *flags],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
        encoding="utf-8",
        env={**os.environ, "CS_LM_VENV": str(venv), "PYTHONPATH": str(ROOT)},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    for line in process.stdout:
        if line.startswith("step 5/"):
            break
    os.kill(process.pid, number)
    rest, errors = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 128 + number, errors
    assert f"stopped by {number.name}" in rest and last_checkpoint(tmp_path / "run")
