"""Trains the runs of a sweep, several at a time. Each is a normal run, in a folder of its own."""

import json
import logging
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cs_lm.errors import Problem, UserError
from cs_lm.scaling.sweep import PlannedRun, Spec, spec_of
from cs_lm.storage.atomic import atomic_write
from cs_lm.storage.json_file import read_json
from cs_lm.storage.lock import FileLock, acquire, locked
from cs_lm.training.run_dir import RunFolder
from cs_lm.training.signals import StopRequested, StopSignals

DONE, DIVERGED = 0, 3  # exit status of a run: it needs no further try
_LOOK_AGAIN_S = 0.1
_TRAIN = (sys.executable, "-m", "cs_lm", "train")
_log = logging.getLogger("cs_lm")


class SweepFolder:
    """The folder of a sweep: spec.json, states.jsonl, runs/, logs/, results.csv, plots."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self._spec, self._states = self.path / "spec.json", self.path / "states.jsonl"
        self.results = self.path / "results.csv"

    def exists(self) -> bool:
        return self._spec.is_file()

    def write_spec(self, spec: Spec) -> None:
        self.path.mkdir(parents=True, exist_ok=True)
        content = json.dumps(spec.as_json(), indent=1, ensure_ascii=False)
        atomic_write(self._spec, content.encode("utf-8"))

    def read_spec(self) -> Spec:
        return spec_of(read_json(self._spec, "sweep", dict))

    def run(self, name: str) -> RunFolder:
        return RunFolder(self.path / "runs" / name)

    def log(self, name: str) -> Path:
        return self.path / "logs" / f"{name}.log"

    def statuses(self) -> dict[str, int]:
        """The exit status of each run's last try."""
        if not self._states.is_file():
            return {}
        found = {}
        for line in self._states.read_bytes().split(b"\n")[:-1]:  # a crash cuts the last one
            try:
                one = json.loads(line)
                found[one["run"]] = one["status"]
            except (ValueError, KeyError, TypeError):
                _log.warning("SKIPPED a damaged line of %r", str(self._states))
        return found

    def note(self, name: str, status: int) -> None:
        line = json.dumps({"run": name, "status": status}).encode("utf-8") + b"\n"
        with open(self._states, "a+b") as file:
            if file.tell():
                file.seek(-1, os.SEEK_END)
                line = line if file.read() == b"\n" else b"\n" + line  # a crash has cut the last
            file.write(line)

    @contextmanager
    def lock(self) -> Iterator[None]:
        """While entered, no other process works on the sweep. Raises: UserError if one does."""
        with locked(self.path / "lock") as is_ours:
            if not is_ours:
                what = f"another process works on {str(self.path)!r}"
                raise UserError(Problem("--out_dir", what, fix="wait for it, or stop it"))
            yield

    def training(self, name: str) -> FileLock | None:
        """The right to train a run, which its process keeps; None while another one has it."""
        return acquire(self.path / "locks" / name)


def command_of(run: PlannedRun, out_dir: Path) -> str:
    """The command that trains the run again, elsewhere if its folder is named differently."""
    return shlex.join(["python", "run_clm.py", *run.words, "--out_dir", str(out_dir)])


def train_runs(
    runs: Sequence[PlannedRun],
    folder: SweepFolder,
    num_jobs: int,
    on_start: Callable[[PlannedRun], None],
    on_end: Callable[[PlannedRun, int], None],
) -> None:
    """Trains those that have not ended yet, `num_jobs` at a time.

    on_start  called with each run that starts or goes on
    on_end    called with each run that ends, and its exit status
    Raises: StopRequested after a signal, when all runs have saved their work.
    """
    statuses = folder.statuses()
    waiting = [run for run in runs if statuses.get(run.name) not in (DONE, DIVERGED)]
    running: dict[str, tuple[PlannedRun, subprocess.Popen]] = {}
    with StopSignals() as signals:
        try:
            while waiting or running:
                signals.check()
                _start_some(waiting, running, folder, num_jobs, on_start)
                if not _end_some(running, folder, on_end):
                    time.sleep(_LOOK_AGAIN_S)
        except BaseException as error:
            _stop(running, error)
            raise


def _start_some(
    waiting: list, running: dict, folder: SweepFolder, num_jobs: int, on_start: Callable
) -> None:
    left_over = 0  # runs of an earlier sweep that was killed; they were not
    for run in list(waiting):
        if len(running) + left_over >= num_jobs:
            return
        lock = folder.training(run.name)
        if lock is None:
            left_over += 1
            continue
        waiting.remove(run)
        try:
            running[run.name] = run, _started(run, folder, num_jobs, lock)
        finally:
            lock.close()  # the run has it now
        on_start(run)


def _started(
    run: PlannedRun, folder: SweepFolder, num_jobs: int, lock: FileLock
) -> subprocess.Popen:
    own = folder.run(run.name)
    words = ["--resume"] if own.exists() else run.words
    path = folder.log(run.name)
    path.parent.mkdir(parents=True, exist_ok=True)
    threads = max(1, (os.cpu_count() or 1) // num_jobs)
    environment: dict[str, Any] = {"OMP_NUM_THREADS": str(threads), **os.environ}
    with open(path, "ab") as log:
        return subprocess.Popen(
            [*_TRAIN, *words, "--out_dir", str(own.path)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,  # Ctrl-C is for the sweep, which tells its runs
            pass_fds=lock.descriptors if os.name == "posix" else (),
        )


def _end_some(running: dict, folder: SweepFolder, on_end: Callable) -> bool:
    ended = [(run, process) for run, process in running.values() if process.poll() is not None]
    for run, process in ended:
        del running[run.name]
        folder.note(run.name, process.returncode)
        on_end(run, process.returncode)
    return bool(ended)


def _stop(running: dict, error: BaseException) -> None:
    """Lets the runs save and end."""
    if running and isinstance(error, StopRequested):
        _log.info("stopping: %d runs save their work; --resume goes on with them", len(running))
    for _, process in running.values():
        process.send_signal(signal.SIGTERM)
    for _, process in running.values():
        process.wait()
