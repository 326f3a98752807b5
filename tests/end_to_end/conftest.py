"""A text, and a run on it that several tests read."""

import contextlib
import io
import subprocess
from collections.abc import Sequence
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import pytest

from cs_lm.cli import train as train_command
from cs_lm.training.checkpoint_manager import CheckpointManager

ROOT = Path(__file__).parents[2]
# fmt: off
TINY = [
    "--vocab_size", "300", "--d_model", "16", "--num_heads", "2", "--d_ff", "40",
    "--num_layers", "2", "--max_seq_length", "32", "--seq_length", "16", "--batch_size", "4",
    "--lr", "1e-2", "--log_interval", "5", "--eval_interval", "20", "--save_interval", "20",
    "--sample_interval", "20",
]
# fmt: on


def laid_over(argv: Sequence[str | Path]) -> list[str | Path]:
    """Each flag once, with the values that it was given last: a command refuses it twice."""
    values: dict[str | Path, list[str | Path]] = {}
    for word in argv:
        if str(word).startswith("--"):
            values.pop(word, None)
            values[word] = []
        else:
            values[[*values][-1]].append(word)
    return [word for flag, its in values.items() for word in (flag, *its)]


def run_script(folder: Path, *argv: str) -> subprocess.CompletedProcess:
    """What `python run_clm.py` does in the folder, in this process: starting one takes seconds.

    Tests of signals, terminals and consoles start processes of their own.
    """
    words = [str(word) for word in laid_over(argv)]
    out, err = io.StringIO(), io.StringIO()
    with contextlib.chdir(folder), redirect_stdout(out), redirect_stderr(err):
        try:
            status = train_command.main(words)
        except SystemExit as end:  # --help
            status = end.code
    return subprocess.CompletedProcess(words, status, out.getvalue(), err.getvalue())


def last_checkpoint(run: Path) -> dict[str, Any]:
    """The newest of a run's folder; all of them must verify."""
    return CheckpointManager(run / "checkpoints").read_newest()


def write_corpus(folder: Path) -> Path:
    animals = ["cat", "dog", "bird", "fish", "née 🙂 horse"]
    lines = [
        f"The {animals[i % 5]} saw the {animals[i * 7 % 3]} {i % 11} times.\n" for i in range(600)
    ]
    path = folder / "animals.txt"
    path.write_text("".join(lines), encoding="utf-8", newline="")
    return path


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory) -> Path:
    """The folder in which a run of 40 steps was made, in runs/animals."""
    folder = tmp_path_factory.mktemp("finished")
    write_corpus(folder)
    argv = [*TINY, "--corpus_path", "animals.txt", "--max_steps", "40", "--prompt", "The cat"]
    result = run_script(folder, *argv)
    assert result.returncode == 0, result.stderr
    (folder / "output.txt").write_text(result.stdout, encoding="utf-8")
    return folder
