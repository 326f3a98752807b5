"""Fuzzes what reads files of unknown origin: tokenizer files, store manifests, checkpoints.

    python -m tests.faults.fuzz [--seconds 60] [--keep FOLDER]

The seconds are shared by the targets. An input that ends a target is printed with its traceback,
and kept in FOLDER with all that reach new code, to go on from. Needs the extra `fuzz`.
"""

import argparse
import re
import subprocess
import sys
import tempfile
from pathlib import Path

NAMES = ("tokenizer", "store", "checkpoint")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seconds", type=int, default=60, help="for all targets together")
    parser.add_argument("--keep", type=Path, help="folder for inputs; default: a temporary one")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = (asked.keep or Path(temporary)).absolute()
        statuses = [_fuzz(name, folder, asked.seconds // len(NAMES)) for name in NAMES]
    return max(statuses)


def _fuzz(name: str, folder: Path, seconds: int) -> int:
    (folder / name).mkdir(parents=True, exist_ok=True)
    limits = ["-rss_limit_mb=3000", "-timeout=20", "-max_len=20000", "-seed=1"]
    result = subprocess.run(
        [
            sys.executable,
            "-m",
            "tests.faults.fuzz_target",
            name,
            str(folder / name),
            *limits,
            f"-max_total_time={seconds}",
            f"-artifact_prefix={folder}/{name}-",
        ],
        capture_output=True,
        text=True,
        encoding="utf-8",
        errors="replace",
    )
    shown = result.stdout + result.stderr
    runs = re.search(r"Done (\d+) runs", shown)
    covered = re.findall(r"cov: (\d+)", shown)
    if result.returncode or not runs:
        print("\n".join(line for line in shown.splitlines() if line[:1] not in "#I")[-6000:])
        print(f"{name}: FOUND something, see above")
        return 1
    print(f"{name}: {int(runs[1]):,} inputs, {covered[-1] if covered else '?'} places covered")
    return 0


if __name__ == "__main__":
    sys.exit(main())
