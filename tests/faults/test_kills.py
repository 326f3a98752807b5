"""SIGKILL at random moments: every start succeeds, and what comes of it is the quiet run."""

import os

import pytest

from tests.faults.conftest import printed_by


@pytest.mark.skipif(not hasattr(os, "fork"), reason="each start is a fork of one process")
@pytest.mark.xdist_group("kills")
@pytest.mark.slow
def test_killed_many_times():
    found = printed_by("kill_runs", "--kills", "200")
    print(found)
    assert found["kills"] == 200
    assert found["left_half_written"] > 0 and found["runs_ended_equal"] > 0
    # one interval, and all of a second one while its save is being written: its last step is logged
    # before the next save waits for that
    assert found["most_steps_lost"] <= 2 * found["save_interval"]
