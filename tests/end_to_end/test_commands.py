"""The commands on a finished run."""

import html
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from cs_lm.cli._prompt import PromptSession, paint
from cs_lm.cli.commands import COMMANDS
from cs_lm.cli.commands import main as command
from cs_lm.data.token_store import MemmapManager
from cs_lm.inference.decoding_config import DecodingConfig
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
    assert empty.returncode == 2 and "standard input: is empty, need" in empty.stderr


def test_generate_is_interactive_on_a_terminal(monkeypatch, capsys):
    lines = iter(["The cat", "The dog", ""])
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    monkeypatch.setattr("builtins.input", lambda _prompt: next(lines))
    shown = shown_by(capsys, "generate", "--out_dir", RUN, "--max_new_tokens", "9")
    assert re.match(r"The cat.*\nThe dog", shown, re.DOTALL)


def test_colours_are_for_terminals_alone(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert paint("a", "2", Terminal()) == "\033[2ma\033[0m"
    assert paint("a", "2", io.StringIO()) == paint("", "2", Terminal()) + "a" == "a"
    monkeypatch.setenv("NO_COLOR", "1")
    assert paint("a", "2", Terminal()) == "a"


def test_typed_bytes_that_are_no_text_are_reported(monkeypatch, capsys):
    broken = UnicodeDecodeError("utf-8", b"caf\xe9", 3, 4, "x")
    block = ['"""a', "caf\udce9", broken, 'b"""']
    typed = iter([broken, "caf\udce9", "The cat", *block, "/", None])

    def answer(_prompt):
        line = next(typed)
        if isinstance(line, Exception) or line is None:
            raise line or EOFError
        return line

    monkeypatch.setattr("builtins.input", answer)
    assert list(PromptSession(DecodingConfig()).prompts()) == ["The cat", "a\nb"]
    errors = capsys.readouterr().err.splitlines()
    assert "/help" in "".join(errors[4:])  # for an empty command
    errors = errors[:2]
    assert errors[0].startswith("error: prompt: is not UTF-8 at byte offset 3; once more")
    assert len(errors) == 2 and errors[1].startswith("error: prompt: ")


def test_logprobs_and_samples_are_shown(capsys):
    argv = ["generate", "--out_dir", RUN, "--prompt", "The cat", "--max_new_tokens", "5"]
    lines = shown_by(capsys, *argv, "--num_alternatives", "2").splitlines()[-5:]
    line = re.compile(r' +-\d+\.\d{3}  "[^\n]+"( +"[^\n]+" -\d+\.\d{3}){2}')
    assert all(map(line.fullmatch, lines)), lines
    several = shown_by(capsys, *argv, "--num_samples", "2", "--best_of", "4")
    assert several.count("---- sample ") == 2
    beams = shown_by(capsys, *argv, "--temperature", "0", "--num_beams", "3", "--num_samples", "3")
    assert beams.count("---- sample ") == 3
    digits = shown_by(capsys, *argv, "--allowed_characters", " e")
    assert set(digits.removeprefix("The cat")) <= set(" e\n")


def test_evaluate_several_texts_and_a_stride(capsys, tmp_path):
    (tmp_path / "b.txt").write_text("The dog sees the cat. " * 20, encoding="utf-8")
    argv = ["evaluate", "--out_dir", RUN, "--text_path", "animals.txt", str(tmp_path / "b.txt")]
    *_, heads, first, second, every = shown_by(capsys, *argv).splitlines()
    assert heads.split() == ["text", "tokens", "bytes", "loss", "[nats]", "perplexity", "bits/byte"]
    columns = [line.split() for line in (first, second, every)]
    assert [name for name, *_ in columns] == ["animals.txt", str(tmp_path / "b.txt"), "all"]
    a, b, both = ([float(x.replace(",", "")) for x in row[1:]] for row in columns)
    assert both[0] == a[0] + b[0] and both[1] == a[1] + b[1]
    assert both[2] == pytest.approx((a[0] * a[2] + b[0] * b[2]) / both[0], abs=1e-3)
    strided = shown_by(capsys, *argv, "--stride", "4").splitlines()[-1].split()
    assert float(strided[3]) < both[2] and strided[1] == columns[2][1]
    assert command([*argv, "--stride", "17"]) == 2
    assert "--stride: got 17, need at most the window (16)" in capsys.readouterr().err


def test_score_in_lines_colours_json_and_a_page(capsys, tmp_path):
    argv = ["score", "--out_dir", RUN, "--text", "The cat sees <the> dög\nThe"]
    lines = shown_by(capsys, *argv).splitlines()
    assert lines[0].split()[0] == "-" and re.match(r" +\d+\.\d{4}  \"", lines[1])
    page = tmp_path / "score.html"
    colours = shown_by(capsys, *argv, "--view", "colours", "--html_path", str(page))
    assert re.sub(r"\033\[[\d;]*m", "", colours).startswith("The cat sees <the> dög\nThe")
    text = page.read_text(encoding="utf-8")
    assert "<the>" not in text and "http" not in text
    shown = html.unescape(re.sub(r"<[^>]*>", "", text.partition('<div class="text">')[2]))
    assert shown.startswith("The cat sees <the> dög\nThe")
    rows = [json.loads(x) for x in shown_by(capsys, *argv, "--view", "jsonl").splitlines()]
    assert rows[0]["nats"] is None and rows[1]["nats"] > 0 and len(rows[1]["alternatives"]) == 3
    assert len(rows) == len(lines)
    for wrong, message in [
        (["--text", "", "--text_path"], "--text, --text_path: got both"),
        (["--text", ""], "--text: is empty"),
        (["--text_path", "none.txt"], "--text_path: got 'none.txt', which is not a file"),
    ]:
        wrong = [*wrong, "x"] if wrong[-1] == "--text_path" else wrong
        assert command(["score", "--out_dir", RUN, *wrong]) == 2
        assert message in capsys.readouterr().err


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
    assert shown.count(" ok\n") == 27 and "DIFFERENT" not in shown


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
