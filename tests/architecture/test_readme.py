"""README is true: its links lead to the lines they name, its commands have these flags."""

import re
import shlex
from pathlib import Path

import pytest

from cs_lm.cli.commands import COMMANDS
from cs_lm.cli.commands import main as command
from cs_lm.cli.train import main as train
from cs_lm.config.fields import validate_all
from cs_lm.tokenizer import BPETokenizer

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
LINKS = re.findall(r"\[`([\w.]+)`\]\(([\w./]+)#L(\d+)\)", README)
PARTS = (
    "BPE tokenizer",
    "encode_iterable",
    "Linear",
    "Embedding",
    "RMSNorm",
    "RoPE",
    "SwiGLU",
    "stable log-softmax",
    "cross-entropy calculator",
    "AdamW, a subclass of `torch.optim.Optimizer`",
    "gradient clipper",
    "LR scheduler",
    "memmap manager",
    "checkpoint manager",
)


def readme_commands() -> list[list[str]]:
    blocks = re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [shlex.split(line, comments=True) for line in lines if line.startswith("python ")]


@pytest.mark.parametrize("name, path, line", LINKS, ids=lambda value: str(value))
def test_link_leads_to_its_definition(name, path, line):
    lines = (ROOT / path).read_text(encoding="utf-8").splitlines()
    defined = re.compile(rf"\s*(def|class) {name.rpartition('.')[2]}\b")
    here = [number for number, text in enumerate(lines, start=1) if defined.match(text)]
    assert int(line) in here, f"{name} is defined in line {here} of {path}"


def test_every_part_is_in_the_table():
    rows = [line for line in README.splitlines() if line.startswith("| ") and "#L" in line]
    for part in PARTS:
        assert any(part.lower() in row.split("|")[1].lower() for row in rows), part


@pytest.mark.parametrize("words", readme_commands(), ids=" ".join)
def test_command_has_these_flags(words, monkeypatch, tmp_path, capsys):
    """Each command gets as far as looking for its files; a wrong flag would end it before."""
    monkeypatch.chdir(tmp_path)
    if words[1] == "run_clm.py":
        assert train(words[2:]) == 2
    else:
        assert words[1:3] == ["-m", "cs_lm"] and words[3] in COMMANDS
        if words[3] == "selfcheck":
            return
        assert command(words[3:]) == 2
    errors = capsys.readouterr().err.splitlines()
    missing_file = re.compile(r"is not a file|holds no (checkpoint|tokenizer)")
    assert errors and all(missing_file.search(line) for line in errors), errors


def test_python_examples_run(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    names: dict = {"tokenizer": BPETokenizer({i: bytes([i]) for i in range(256)}, [])}
    for example in re.findall(r"```python\n(.*?)```", README, re.DOTALL):
        exec(example, names)
    assert names["loss"].isfinite() and not validate_all(names["config"])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["ours.tiktoken", "tokenizer.json"]
