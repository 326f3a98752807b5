"""The chapters of the tour run, print what stands in them, and end in their pictures."""

import io
import os
import re
from contextlib import redirect_stdout
from pathlib import Path

import pytest

TOUR = Path(__file__).parents[2] / "docs" / "tour"
CHAPTERS = sorted(TOUR.glob("[0-9]-*.md"))
# A block of code, and the block of text right behind it, if there is one: what it prints.
BLOCK = re.compile(r"```python\n(.*?)```(?:\n\n```text\n(.*?)```)?", re.DOTALL)
NUMBER = re.compile(r"-?\d+\.\d+")


def output_of(code: str, names: dict) -> str:
    shown = io.StringIO()
    with redirect_stdout(shown):
        exec(code, names)
    return shown.getvalue()


def assert_same(shown: str, expected: str) -> None:
    """Words are equal; decimal numbers agree to one of their last digit."""
    assert NUMBER.sub("#", shown) == NUMBER.sub("#", expected)
    for found, wanted in zip(NUMBER.findall(shown), NUMBER.findall(expected)):
        last_digit = 10.0 ** -len(wanted.partition(".")[2])
        assert float(found) == pytest.approx(float(wanted), abs=1.01 * last_digit), shown


@pytest.mark.parametrize("chapter", CHAPTERS, ids=lambda path: path.stem)
def test_chapter_runs(chapter, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib", reason="the pictures need matplotlib")
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    blocks = BLOCK.findall(chapter.read_text(encoding="utf-8"))
    assert len(blocks) >= 5
    for code, expected in blocks:
        shown = output_of(code, names)
        if expected:
            assert_same(shown, expected)
    picture = tmp_path / f"{chapter.stem}.png"
    assert picture.read_bytes()[:4] == b"\x89PNG"
    assert (TOUR / picture.name).is_file(), "the page shows it"


def test_there_are_five():
    assert len(CHAPTERS) == 5
    assert os.path.exists(TOUR / "README.md")
