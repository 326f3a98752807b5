"""Consoles that cannot show what a model writes or a user types: nothing ends for it."""

import os
import pty
import re
import select
import subprocess
import sys
import time

import pytest

from tests.end_to_end.conftest import ROOT, TINY, laid_over, write_corpus

COMMAND = [sys.executable, "-m", "cs_lm"]


def environment(encoding):
    return {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": encoding}


@pytest.mark.slow
@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_every_command_survives(encoding, tmp_path, finished_run):
    """Samples, prompts, reports and plots with characters that the console does not have."""
    write_corpus(tmp_path)
    prompt = "née 🙂 北"
    argv = [
        *TINY,
        "--corpus_path",
        "animals.txt",
        "--max_steps",
        "4",
        "--sample_interval",
        "2",
        "--prompt",
        prompt,
    ]
    settings = {"cwd": tmp_path, "capture_output": True, "env": environment(encoding)}
    program = [sys.executable, ROOT / "run_clm.py"]
    found = subprocess.run([*program, *laid_over(argv)], **settings)
    assert found.returncode == 0, found.stderr
    assert found.stdout.count(b"| sample: ") == 2 and rb"\u5317" in found.stdout
    again = ["--corpus_path", "animals.txt", "--resume", "--max_steps", "6"]
    assert subprocess.run([*program, *again], **settings).returncode == 0
    if encoding == "cp1252":
        return  # one encoding for the other commands
    run = ["--out_dir", "runs/animals"]
    files = [
        f"--{name}_path=runs/animals/tokenizer/{name}.{end}"
        for name, end in (("vocab", "json"), ("merges", "txt"))
    ]
    for command in (
        ["generate", *run, "--prompt", prompt, "--max_new_tokens", "20"],
        ["generate", *run, "--prompt", prompt, "--max_new_tokens", "5", "--num_samples", "2"],
        ["evaluate", *run, "--text_path", "animals.txt"],
        ["tokenizer-report", *files, "--text_path", "animals.txt", "--word", " 北"],
        ["plot", *run],
    ):
        found = subprocess.run([*COMMAND, *command], **settings)
        assert found.returncode == 0, (command, found.stderr)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no arguments of bytes")
def test_bytes_that_are_no_text_are_refused_in_one_line(finished_run):
    command = [
        *map(os.fsencode, COMMAND),
        b"generate",
        b"--out_dir",
        b"runs/animals",
        b"--prompt",
        b"caf\xe9",
    ]
    found = subprocess.run(
        command, cwd=finished_run, capture_output=True, text=True, env=environment("utf-8")
    )
    assert found.returncode == 2
    assert found.stderr == "error: --prompt: got 'caf\\udce9', need text that UTF-8 can hold\n"
    argv = [
        os.fsencode(sys.executable),
        os.fsencode(ROOT / "run_clm.py"),
        b"--corpus_path",
        b"animals.txt",
        b"--out_dir",
        b"new",
        b"--prompt",
        b"caf\xe9",
    ]
    found = subprocess.run(argv, cwd=finished_run, capture_output=True, env=environment("utf-8"))
    assert found.returncode == 2 and found.stderr.count(b"\n") == 1


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no pseudo-terminals")
def test_a_session_outlives_what_is_typed(finished_run, tmp_path):
    """Typed bytes that are no text, wrong commands and wrong values; prompts are answered."""
    ours, theirs = pty.openpty()
    command = [*COMMAND, "generate", "--out_dir", "runs/animals", "--max_new_tokens", "3"]
    process = subprocess.Popen(
        command,
        cwd=finished_run,
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env={**environment("utf-8"), "TERM": "dumb", "HOME": str(tmp_path)},
    )
    os.close(theirs)
    shown = b""

    def read_until(pattern):
        nonlocal shown
        deadline = time.monotonic() + 60
        while not re.search(pattern, shown):
            assert time.monotonic() < deadline, shown
            if select.select([ours], [], [], 1)[0]:
                shown += os.read(ours, 4096)

    read_until(rb"> $")
    os.write(ours, b"caf\xe9\n")  # readline leaves out what is no text, input() reports it
    read_until(rb"caf(?s:.)*\r\n> $")
    for typed, answer in [
        (b"/temperature 0.5", rb"/temperature 0\.5\r\n> $"),
        (b"/temperature x", rb"error: --temperature: got 'x', need a number\r\n> $"),
        (b"/temperature 0", rb"/temperature 0\.0\r\n> $"),
        (b"/top_k 3", rb"error: --top_k: has no effect at --temperature 0[^>]*> $"),
        (b"/warmth 3", rb"error: /warmth: unknown command; see /help\r\n> $"),
        (b"/stop_token a", rb"/stop_token a\r\n> $"),
        (b"The cat", rb"error: --stop_token: got 'a'[^>]*>[^>]*> $"),
        (b"/stop_token none", rb"/stop_token none\r\n> $"),
        (b"/settings", rb"/temperature 0\.0\r\n(?s:.)*/seed 0\r\n> $"),
        (b'"""The dog\nand the cat"""', rb"The dog\r\nand the cat[^.](?s:.)*> $"),
        (b"The cat", rb"The cat\r\nThe cat(?s:.)+> $"),
    ]:
        shown = b""
        os.write(ours, typed + b"\n")
        read_until(answer)
        assert b"Traceback" not in shown and b"\x1b[" not in shown
    os.write(ours, b"\n")
    assert process.wait(timeout=60) == 0
    os.close(ours)


def test_words_that_begin_with_a_dash(finished_run, tmp_path):
    argv = [
        "generate",
        "--out_dir",
        "runs/animals",
        "--prompt",
        "- The cat",
        "--max_new_tokens",
        "4",
        "--stop",
        "-x",
        "--",
        "--seed",
        "3",
    ]
    found = subprocess.run(
        [*COMMAND, *argv],
        cwd=finished_run,
        capture_output=True,
        text=True,
        env=environment("utf-8"),
    )
    assert found.returncode == 0 and found.stdout.startswith("- The cat"), found.stderr


def test_a_flag_given_twice_is_refused_and_lists_collect(finished_run):
    argv = [
        sys.executable,
        ROOT / "run_clm.py",
        "--lr",
        "1",
        "--lr=2",
        "--compile",
        "--no-compile",
        "--corpus_path",
        "animals.txt",
        "--corpus_path",
        "none.txt",
        "--dry_run",
    ]
    found = subprocess.run(
        argv, cwd=finished_run, capture_output=True, text=True, env=environment("utf-8")
    )
    assert found.returncode == 2 and found.stderr.splitlines() == [
        "error: --lr: is given 2 times (--lr, --lr); give it once",
        "error: --compile: is given 2 times (--compile, --no-compile); give it once",
    ]
