"""What was made before the code moved into wings still opens: names on disk do not change.

The files in tests/fixtures/before_wings/ were written by version 0.1.0 of November 2026.
"""

import json
import shutil
from pathlib import Path

import pytest

from cs_lm import BPETokenizer, MemmapManager
from cs_lm.cli import commands
from cs_lm.cli import train as train_command

FIXTURES = Path(__file__).parents[1] / "fixtures" / "before_wings"


@pytest.fixture
def old_files(tmp_path, monkeypatch) -> Path:
    folder = tmp_path / "old"
    shutil.copytree(FIXTURES, folder)
    monkeypatch.chdir(folder)
    return folder


def records(run: str, kind: str) -> list[dict]:
    lines = (Path(run) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [record for record in map(json.loads, lines) if record["kind"] == kind]


def test_a_run_goes_on_as_it_would_have(old_files, capsys):
    before = records("transformer-run", "train")[-1], records("transformer-run", "valid")[-1]
    assert train_command.main(["--out_dir", "transformer-run", "--resume"]) == 0
    after = records("transformer-run", "train")[-1], records("transformer-run", "valid")[-1]
    assert [record["step"] for record in after] == [8, 8]
    for old, new in zip(before, after):
        assert new["loss_nats"] == pytest.approx(old["loss_nats"], abs=1e-4)
    shown = capsys.readouterr().out
    assert "training 280 tokens" not in shown and "encoding text.txt" not in shown
    assert "resuming" in shown


def test_a_gpt2_run_speaks_and_goes_on(old_files, capsys):
    assert commands.main(["generate", "--out_dir", "gpt2-run", "--prompt", "The "]) == 0
    assert capsys.readouterr().out.startswith("The ")
    argv = ["--out_dir", "gpt2-run", "--resume", "--max_steps", "6"]
    assert train_command.main(argv) == 0
    assert records("gpt2-run", "end")[-1]["step"] == 6


def test_a_store_and_a_tokenizer_open(old_files):
    store = MemmapManager(next(Path("data").glob("text_chunks-*")))
    store.verify()
    folder = next(Path("data").glob("text_tokenizer-*"))
    specials = json.loads((folder / "settings.json").read_text(encoding="utf-8"))["special_tokens"]
    tokenizer = BPETokenizer.from_files(folder / "vocab.json", folder / "merges.txt", specials)
    text = Path("text.txt").read_text(encoding="utf-8")
    assert tokenizer.fingerprint == store.fingerprint
    assert tokenizer.decode(store.load_by_range(0, len(store)).tolist()) == text


def test_a_new_run_finds_them(old_files, capsys):
    shape = ["--vocab_size", "280", "--seq_length", "8", "--max_seq_length", "16"]
    shape += ["--d_model", "8", "--num_heads", "2", "--d_ff", "12", "--num_layers", "1"]
    argv = ["--corpus_path", "text.txt", "--max_steps", "1", "--out_dir", "new-run", *shape]
    assert train_command.main(argv) == 0
    shown = capsys.readouterr().out
    assert "encoding" not in shown and "training 280 tokens" not in shown


def test_an_export_comes_back(old_files, capsys):
    assert commands.main(["import-weights", "--from", "export", "--out_dir", "imported"]) == 0
    argv = ["--init_from", "export", "--corpus_path", "text.txt", "--max_steps", "1"]
    argv += ["--seq_length", "8", "--out_dir", "from-export"]
    assert train_command.main(argv) == 0
    assert records("from-export", "valid")[-1]["loss_nats"] < 5.7
