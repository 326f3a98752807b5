"""SIGKILL at random moments: every start succeeds, and what comes of it is the quiet run."""

import json
import os
import subprocess
import sys

import pytest

from tests.end_to_end.conftest import ROOT


@pytest.mark.skipif(not hasattr(os, "fork"), reason="each start is a fork of one process")
@pytest.mark.xdist_group("kills")
@pytest.mark.parametrize("kills", [20, pytest.param(200, marks=pytest.mark.slow)])
def test_killed_many_times(kills):
    result = subprocess.run(
        [sys.executable, "-m", "tests.faults.kill_runs", "--kills", str(kills)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert result.returncode == 0, result.stderr[-3000:]
    found = json.loads(result.stdout)
    print(result.stdout)
    assert found["kills"] == kills
    if kills == 200:  # how many depends on the machine
        assert found["left_half_written"] > 0 and found["runs_ended_equal"] > 0
    # one interval, and all of a second one while its save is being written: its last step is logged
    # before the next save waits for that
    assert found["most_steps_lost"] <= 2 * found["save_interval"]
