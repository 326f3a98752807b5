import json
import os
import subprocess
import sys

import pytest

from tests.end_to_end.conftest import ROOT


def printed_by(module, *flags):
    """The JSON that a program of this folder prints, with one thread."""
    result = subprocess.run(
        [sys.executable, "-m", f"tests.faults.{module}", *flags],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads(result.stdout)


@pytest.fixture
def work(tmp_path, monkeypatch):
    """The current folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(autouse=True)
def no_plot(monkeypatch):
    """It takes longer than a tiny run."""
    for module in ("reporter",):
        monkeypatch.setattr(f"cs_lm.training.{module}.plotted", lambda *_: "no plot")
