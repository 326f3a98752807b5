"""SIGKILL at random moments of each stage of alignment: what comes of it is the quiet run."""

import json
import os
import subprocess
import sys

import pytest

from tests.end_to_end.conftest import ROOT


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="each start is a fork of one process")
@pytest.mark.xdist_group("kills")
def test_every_stage_survives():
    result = subprocess.run(
        [sys.executable, "-m", "tests.faults.kill_stages", "--kills", "3"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert result.returncode == 0, result.stderr[-3000:]
    found = json.loads(result.stdout)
    assert set(found) == {"sft", "reward", "dpo", "ppo", "grpo"}
    assert all(sum(one.get(key, 0) for key in ("killed", "ended")) == 3 for one in found.values())
