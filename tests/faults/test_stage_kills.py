"""SIGKILL at random moments of each stage of alignment: what comes of it is the quiet run."""

import os

import pytest

from tests.faults.conftest import printed_by


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="each start is a fork of one process")
@pytest.mark.xdist_group("kills")
def test_every_stage_survives():
    found = printed_by("kill_stages", "--kills", "3")
    assert set(found) == {"sft", "reward", "dpo", "ppo", "grpo"}
    assert all(sum(one.get(key, 0) for key in ("killed", "ended")) == 3 for one in found.values())
