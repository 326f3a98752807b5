"""`keep_running.sh` starts a command again until it ends well, from its newest checkpoint."""

import os
import subprocess
import sys

import pytest

from tests.end_to_end.conftest import ROOT

pytestmark = pytest.mark.skipif(os.name != "posix", reason="it is for bash")
# A command that makes two steps in each start, and dies until it has made 6.
PROGRAM = """
import pathlib, sys
folder = pathlib.Path("run/checkpoints")
pathlib.Path("calls.txt").open("a").write(" ".join(sys.argv[1:]) + "\\n")
folder.mkdir(parents=True, exist_ok=True)
step = max([int(p.name[5:]) for p in folder.glob("step-*") if "." not in p.name], default=0)
if "--stuck" not in sys.argv:
    step += 2
    (folder / f"step-{step:08d}").mkdir()
    (folder / f"step-{step + 1:08d}.writing").mkdir(exist_ok=True)
sys.exit(0 if step >= 6 else 2 if "--wrong" in sys.argv else 1)
"""


def keep_running(folder, *flags):
    (folder / "program.py").write_text(PROGRAM, encoding="utf-8")
    command = ["bash", str(ROOT / "keep_running.sh"), "run", sys.executable, "program.py", *flags]
    found = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=60)
    calls = folder / "calls.txt"
    return found, calls.read_text(encoding="utf-8").splitlines() if calls.exists() else []


def test_it_starts_again_with_resume_until_the_end(tmp_path):
    found, calls = keep_running(tmp_path, "--a", "b c")
    assert found.returncode == 0, found.stderr
    assert calls == ["--a b c", "--a b c --resume", "--a b c --resume"]
    assert found.stderr.count("starting again from") == 2


def test_it_gives_up_where_starting_again_does_not_help(tmp_path):
    found, calls = keep_running(tmp_path, "--stuck")
    assert found.returncode == 1 and len(calls) == 3
    assert "three starts in a row saved nothing new" in found.stderr
    found, calls = keep_running(tmp_path, "--wrong", "--stuck")
    assert found.returncode == 2 and len(calls) == 4


def test_it_says_how_it_is_called():
    found = subprocess.run(
        ["bash", str(ROOT / "keep_running.sh"), "run"], capture_output=True, text=True
    )
    assert found.returncode == 2 and found.stderr.startswith("usage: ")
