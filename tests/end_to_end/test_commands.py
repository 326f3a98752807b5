"""The commands on a finished run."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from cs_lm.cli.commands import COMMANDS
from cs_lm.cli.commands import main as command
from cs_lm.data.token_store import MemmapManager
from cs_lm.tokenizer import BPETokenizer
from tests.end_to_end.conftest import ROOT, write_corpus

RUN = os.path.join("runs", "animals")


@pytest.fixture(autouse=True)
def in_the_run(finished_run, monkeypatch):
    monkeypatch.chdir(finished_run)


def shown_by(capsys, *argv: str) -> str:
    assert command(argv) == 0
    return capsys.readouterr().out


def test_overview(capsys):
    shown = shown_by(capsys)
    assert all(f"  {name} " in shown for name in COMMANDS)


def test_tokenizer_and_encode(capsys, tmp_path):
    text = write_corpus(tmp_path)
    files = ["--vocab_path", str(tmp_path / "v.json"), "--merges_path", str(tmp_path / "m.txt")]
    shown = shown_by(
        capsys, "train-tokenizer", "--corpus_path", str(text), "--vocab_size", "280", *files
    )
    assert "280 tokens, 23 merges" in shown
    store = ["--store", str(tmp_path / "store"), "--chunk_size", "1000"]
    argv = ["encode", "--corpus_path", str(text), *files, *store]
    assert "bytes a token) in" in shown_by(capsys, *argv)
    assert command(argv) == 2 and "exists; add --overwrite" in capsys.readouterr().err
    shown_by(capsys, *argv, "--overwrite")
    tokenizer = BPETokenizer.from_files(files[1], files[3], ["<|endoftext|>"])
    saved = MemmapManager(tmp_path / "store")
    assert saved.chunk_size == 1000 and saved.fingerprint == tokenizer.fingerprint
    ids = saved.load_by_range(0, len(saved)).tolist()
    assert tokenizer.decode(ids) == text.read_text(encoding="utf-8")


def test_evaluate_gives_the_same_for_any_batch_size(capsys):
    argv = ["evaluate", "--out_dir", RUN, "--text_path", "animals.txt"]
    one, two = (shown_by(capsys, *argv, "--batch_size", size) for size in ("1", "7"))
    assert one == two
    assert re.search(r"loss +[\d.]+ nats per token\nperplexity +[\d.]+\nbits per byte [\d.]+", one)
    assert command([*argv, "--seq_length", "33"]) == 2
    assert "--seq_length: got 33, need at most the model's context (32)" in capsys.readouterr().err


def test_generate_from_an_argument_and_a_file(capsys, tmp_path):
    (tmp_path / "p.txt").write_text("The dog", encoding="utf-8")
    argv = ["generate", "--out_dir", RUN, "--max_new_tokens", "40"]
    shown = shown_by(capsys, *argv, "--prompt", "The dog")
    assert shown.startswith("The dog") and len(shown) > 20
    assert shown == shown_by(capsys, *argv, "--prompt_file", str(tmp_path / "p.txt"))
    assert shown != shown_by(capsys, *argv, "--prompt", "The dog", "--seed", "1")
    assert shown_by(capsys, *argv, "--prompt", "The dog", "--checkpoint", "last")
    half = shown_by(capsys, *argv, "--prompt", "The dog", "--dtype", "bfloat16")
    assert half.startswith("The dog") and len(half) > 20


def generate_in_a_process(standard_input: str, *argv: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [
            sys.executable,
            "-m",
            "cs_lm",
            "generate",
            "--out_dir",
            RUN,
            "--max_new_tokens",
            "9",
            *argv,
        ],
        input=standard_input,
        capture_output=True,
        text=True,
        encoding="utf-8",
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )


def test_generate_from_standard_input():
    result = generate_in_a_process("The bird")
    assert result.returncode == 0 and result.stdout.startswith("The bird")
    empty = generate_in_a_process("")
    assert empty.returncode == 2 and "prompt: got an empty text" in empty.stderr


def test_generate_is_interactive_on_a_terminal(monkeypatch, capsys):
    lines = iter(["The cat", "The dog", ""])
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    monkeypatch.setattr("builtins.input", lambda _prompt: next(lines))
    shown = shown_by(capsys, "generate", "--out_dir", RUN, "--max_new_tokens", "9")
    assert re.match(r"The cat.*\nThe dog", shown, re.DOTALL)


def test_plot(capsys, tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    path = tmp_path / "a.png"
    shown = shown_by(capsys, "plot", "--out_dir", RUN, "--png_path", str(path))
    assert shown.strip() == str(path) and path.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("num_threads", [1, 2])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_selfcheck(capsys, dtype, num_threads):
    threads_before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        shown = shown_by(capsys, "selfcheck", "--dtype", dtype, "--device", "cpu")
    finally:
        torch.set_num_threads(threads_before)
    assert shown.count(" ok\n") == 23 and "DIFFERENT" not in shown


def test_selfcheck_finds_a_wrong_operation(capsys, monkeypatch):
    from cs_lm.ops import reference as ops

    monkeypatch.setattr(ops, "silu", lambda x: x * x.sigmoid() * 1.01)
    assert command(["selfcheck", "--device", "cpu"]) == 1
    assert re.search(r"silu .* DIFFERENT", capsys.readouterr().out)


def test_tokenizer_report(capsys):
    folder = os.path.join(RUN, "tokenizer")
    files = [f"--vocab_path={folder}/vocab.json", f"--merges_path={folder}/merges.txt"]
    argv = ["tokenizer-report", *files, "--text_path", "animals.txt", "--word", " bird"]
    shown = shown_by(capsys, *argv)
    size = os.path.getsize("animals.txt")
    assert f"{size:,} bytes" in shown and re.search(r"bytes per token [\d.]+\n", shown)
    assert re.search(r"vocabulary use +[\d,]+ of 300 tokens", shown)
    assert "'b' 'i' 'r' 'd'" in shown and re.search(r"merge \d+ .*' bird'", shown)
    text = Path("animals.txt").read_text(encoding="utf-8")[:600]
    assert text in shown.replace("|", "") and "\x1b" not in shown
    painted = re.sub(r"\x1b\[[0-9;]*m", "", shown_by(capsys, *argv, "--color", "always"))
    assert text in painted.replace("↵", "")
