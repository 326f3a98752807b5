"""Kills a run at random moments, again and again, and compares what comes of it.

    python -m tests.faults.kill_runs [--kills 200] [--least_s 0] [--most_s 0.3] [--seed 0]
    python -m tests.faults.kill_runs --kills 0 --least_s 5 --most_s 40 --max_steps 600000 \\
        --save_interval 100 --log_interval 50        # the soak: one run, killed to its end

Each start is a fork of this process, which has loaded torch and computed nothing yet: the kill
comes while a step, a save, a validation or the reading of a checkpoint is under way. After each
kill all that has a checkpoint's name must verify. A run that comes to its end must be the quiet
run, bit for bit. Prints the counts as one JSON line, with memory and open files of the process
that lived longest: at a tenth of its life, at half of it, and at its end.
"""

import argparse
import json
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import ClassVar

import torch
import torch._dynamo  # each start would import it anew, with its first optimizer

from cs_lm import device
from cs_lm.config.fields import replace
from cs_lm.training.metrics_log import MetricsLog
from cs_lm.training.run_dir import RunFolder
from tests.faults.tiny_run import CONFIG, assert_same_run, prepared, train


def start(folder: Path, data, config) -> int:
    """A process that trains; returns its number."""
    child = os.fork()
    if child:
        return child
    status = 70
    try:
        with open(folder.with_suffix(".out"), "a", encoding="utf-8") as out:
            sys.stdout = sys.stderr = out
            status = train(folder, data, config)
    finally:
        os._exit(status)


class Watched:
    """Memory and open files of a process, looked at ten times a second."""

    longest: ClassVar[list[tuple[int, int]]] = []

    def __init__(self, child: int):
        self._child, self._seen, self._next_s = child, [], 0.0

    def look(self) -> None:
        if sys.platform != "linux" or time.monotonic() < self._next_s:
            return
        self._next_s = time.monotonic() + 0.1
        status = Path(f"/proc/{self._child}/status").read_text(encoding="utf-8")
        found = re.search(r"VmRSS:\s+(\d+)", status)
        if found:
            files = len(os.listdir(f"/proc/{self._child}/fd"))
            self._seen.append((int(found[1]) // 1024, files))
            if len(self._seen) > len(Watched.longest):
                Watched.longest = self._seen

    @staticmethod
    def report() -> dict:
        seen = Watched.longest
        if not seen:
            return {}
        chosen = [seen[len(seen) // 10], seen[len(seen) // 2], seen[-1]]
        return {
            "rss_mb": [mb for mb, _ in chosen],
            "open_files": [n for _, n in chosen],
            "longest_life_s": len(seen) / 10,
        }


def wait_or_kill(child: int, seconds: float) -> int | None:
    """The exit status, or None when it had to be killed."""
    deadline = time.monotonic() + seconds
    watched = Watched(child)
    while time.monotonic() < deadline:
        found, status = os.waitpid(child, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        watched.look()
        time.sleep(0.002)
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    return None if code == -signal.SIGKILL else code


def finish(child: int, folder: Path) -> None:
    status = wait_or_kill(child, 7200)
    assert status == 0, folder.with_suffix(".out").read_text(encoding="utf-8")[-3000:]


def steps_lost(run: RunFolder) -> int:
    """Steps in the log beyond the newest checkpoint."""
    reached = max((r["step"] for r in MetricsLog(run.metrics).records()), default=0)
    return reached - max(run.checkpoints.steps(), default=0)


def kill_many(work: Path, kills: int, least_s: float, most_s: float, seed: int, config) -> dict:
    chosen = random.Random(seed)
    data = prepared(work, config)
    quiet = work / "quiet"
    quiet_child = start(quiet, data, config)
    if kills:
        finish(quiet_child, quiet)
    counts, lost = Counter(), Counter()
    folder = work / "run0"
    while counts["kills"] < kills or not kills:
        child = start(folder, data, config)
        counts["starts"] += 1
        status = wait_or_kill(child, chosen.uniform(least_s, most_s))
        run = RunFolder(folder)
        if status is None:
            counts["kills"] += 1
            counts["left_half_written"] += bool(list(folder.glob("checkpoints/*.writing")))
            if run.exists():
                assert run.verify() == [], run.verify()
                lost[steps_lost(run)] += 1
            continue
        assert status == 0, folder.with_suffix(".out").read_text(encoding="utf-8")[-3000:]
        if not kills:
            finish(quiet_child, quiet)
        assert_same_run(quiet, folder)
        counts["runs_ended_equal"] += 1
        if not kills:
            break
        shutil.rmtree(folder)
        folder = work / f"run{counts['runs_ended_equal']}"
    if kills:
        finish(start(folder, data, config), folder)
        assert_same_run(quiet, folder)
        counts["runs_ended_equal"] += 1
    return {
        **counts,
        "save_interval": config.save_interval,
        "most_steps_lost": max(lost, default=0),
        "steps_lost": dict(sorted(lost.items())),
        **Watched.report(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=200, help="0: one run to its end")
    parser.add_argument("--least_s", type=float, default=0.0)
    parser.add_argument("--most_s", type=float, default=0.3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--max_steps", type=int, default=CONFIG.max_steps)
    parser.add_argument("--save_interval", type=int, default=CONFIG.save_interval)
    parser.add_argument("--log_interval", type=int, default=CONFIG.log_interval)
    asked = parser.parse_args()
    torch.set_num_threads(1)  # a fork has no other thread of its parent's
    device._MEASURED_S = 0.01  # each start would look at the clock for as long
    config = replace(
        CONFIG,
        {
            "max_steps": asked.max_steps,
            "log_interval": asked.log_interval,
            "save_interval": asked.save_interval,
            "eval_interval": 3 * asked.save_interval,
            "sample_interval": 6 * asked.save_interval,
        },
    )
    with tempfile.TemporaryDirectory() as work:
        began = time.monotonic()
        found = kill_many(Path(work), asked.kills, asked.least_s, asked.most_s, asked.seed, config)
        os.chdir("/")
    print(json.dumps({**found, "elapsed_s": round(time.monotonic() - began, 1)}))


if __name__ == "__main__":
    main()
