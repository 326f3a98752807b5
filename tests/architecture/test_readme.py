"""README and the pages in docs/ are true: links, symbols, commands, examples."""

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
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
]
MAX_README_LINES = 200
# What a reader of the course looks for; each stands in a row of README's table of symbols.
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
    "AdamW",
    "gradient clipper",
    "LR scheduler",
    "memmap manager",
    "checkpoint manager",
)
LINK = re.compile(r"\[([^\]]*)\]\(([^)\s]+)\)")


def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def prose_of(page: Path) -> str:
    """The page without its blocks of code."""
    return re.sub(r"```.*?```", "", text_of(page), flags=re.DOTALL)


def anchors_of(page: Path) -> set[str]:
    """What forges make of the headings: lower case, dashes for spaces, no other signs."""
    headings = re.findall(r"^#+ (.+)$", prose_of(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def commands() -> list[list[str]]:
    found = []
    for page in PAGES:
        blocks = re.findall(r"```bash\n(.*?)```", text_of(page), re.DOTALL)
        lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
        found += [shlex.split(line, comments=True) for line in lines if line.startswith("python ")]
    return found


def test_readme_is_short():
    assert len(text_of(ROOT / "README.md").splitlines()) <= MAX_README_LINES


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_to_what_they_name(page):
    for shown, target in LINK.findall(prose_of(page)):
        if target.startswith("http"):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{name_of(page)} links to {target}, which is not there"
        if anchor:
            assert anchor in anchors_of(file), f"{name_of(page)} links to {target}"
        symbol = re.fullmatch(r"`(\w+)`", shown)
        if symbol and file.suffix == ".py":
            defined = rf"^\s*(def|class) {symbol[1]}\b|^{symbol[1]}\b.* ="
            assert re.search(defined, text_of(file), re.MULTILINE), f"{symbol[1]} is not in {path}"


def test_every_part_is_in_the_table():
    rows = [row for row in text_of(ROOT / "README.md").splitlines() if ".py)" in row]
    for part in PARTS:
        assert any(part.lower() in row.split("|")[1].lower() for row in rows), part


def test_every_page_is_linked_from_readme():
    linked = {target for _, target in LINK.findall(text_of(ROOT / "README.md"))}
    for page in (ROOT / "docs").glob("*.md"):
        assert f"docs/{page.name}" in linked, page.name


@pytest.mark.parametrize("words", commands(), ids=" ".join)
def test_command_has_these_flags(words, monkeypatch, tmp_path, capsys):
    """Each command gets as far as looking for its files; a wrong flag would end it before."""
    monkeypatch.chdir(tmp_path)
    if words[1] == "run_clm.py":
        assert train(words[2:]) == 2
    elif words[1:3] == ["-m", "benchmarks"] or words[2].startswith("benchmarks."):
        assert (ROOT / f"{words[2].replace('.', '/')}.py").exists() or words[2] == "benchmarks"
        return
    else:
        assert words[1:3] == ["-m", "cs_lm"] and words[3] in COMMANDS
        if words[3] == "selfcheck":
            return
        assert command(words[3:]) == 2
    errors = capsys.readouterr().err.splitlines()
    missing_file = re.compile(
        r"is not a file|is not there|is not the folder of a run|holds no checkpoint"
    )
    assert errors and all(missing_file.search(line) for line in errors), errors


def test_python_examples_run(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for page in PAGES:
        if "tour" in page.parts:  # run by test_tour.py
            continue
        names: dict = {"tokenizer": BPETokenizer({i: bytes([i]) for i in range(256)}, [])}
        for example in re.findall(r"```python\n(.*?)```", text_of(page), re.DOTALL):
            exec(example, names)
        if page.name == "README.md":
            assert names["loss"].isfinite() and not validate_all(names["config"])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["ours.tiktoken", "tokenizer.json"]
