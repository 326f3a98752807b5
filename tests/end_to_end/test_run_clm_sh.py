"""`run_clm.sh`: the flags of a preset, less those that are given."""

import os
import shutil
import subprocess
import sys

import pytest

from cs_lm.cli.train import DESCRIPTION
from cs_lm.config.flags import FlagParser, add_flags
from cs_lm.config.run import RunConfig
from tests.end_to_end.conftest import ROOT

pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="bash is not here")
SHOW = """#!/bin/sh
printf '%s\\n' "$@"
"""


def words_of(tmp_path, *argv) -> list[str]:
    """What Python is called with, by a copy of the script beside an environment that is set up."""
    for name in ("run_clm.sh", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    python = tmp_path / "venv" / "bin" / "python"
    python.parent.mkdir(parents=True, exist_ok=True)
    python.write_text(SHOW, encoding="utf-8")
    python.chmod(0o755)
    stamp = (ROOT / "pyproject.toml").read_bytes() + (ROOT / "constraints.txt").read_bytes()
    (tmp_path / "venv" / "installed-ui").write_bytes(stamp)
    shown = subprocess.run(
        ["bash", tmp_path / "run_clm.sh", *argv],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "CS_LM_VENV": str(tmp_path / "venv"), "PYTHON": sys.executable},
    ).stdout
    words = shown.splitlines()[1:]
    return words[words.index("run_clm.py") :]


@pytest.mark.parametrize("mode", [[], ["characters"], ["lecture"], ["distributed"]])
def test_given_flags_take_the_place_of_a_preset_s(mode, tmp_path):
    script, *words = words_of(
        tmp_path, *mode, "--seed=7", "--betas", "0.1", "0.2", "--rope_theta", "5", "--prompt", "--"
    )
    parser = FlagParser(prog=script, description=DESCRIPTION)
    add_flags(parser, RunConfig)
    found = vars(parser.parse_strictly(words))
    assert found["seed"] == "7" and found["betas"] == ["0.1", "0.2"] and found["prompt"] == "--"
    assert found["rope_theta"] == "5" and found["log_interval"] in ("10", "50")


def test_a_text_of_one_s_own_goes_by_its_own_name(tmp_path):
    words = words_of(tmp_path, "--corpus_path", "my text.txt")
    assert "my text.txt" in words and "--corpus_size" not in words and "--out_dir" not in words
    assert "--out_dir" not in words_of(tmp_path, "distributed", "--corpus_path", "x.txt")
    assert "--out_dir" in words_of(tmp_path, "characters", "--corpus_path", "x.txt")
    assert words_of(tmp_path, "-h")[-1] == "-h"


@pytest.mark.parametrize("number", ["x", "0", "-1", "2.5"])
def test_a_number_of_processes_that_is_none(number):
    found = subprocess.run(
        ["bash", ROOT / "run_clm.sh", "distributed"],
        capture_output=True,
        text=True,
        env={**os.environ, "CS_LM_PROCESSES": number},
    )
    assert found.returncode == 2
    assert found.stderr.startswith(f"error: CS_LM_PROCESSES: got '{number}', need 1 or more")
