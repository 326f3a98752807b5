"""Kills the stages of alignment at random moments, and compares what comes of it.

    python -m tests.faults.kill_stages [--kills 3] [--most_s 1.5] [--seed 0]

Each start is a fork of this process, as in kill_runs.py. A stage that was killed is resumed, or
begun again where it had no checkpoint yet; its last checkpoint must be that of the quiet run, bit
for bit, and so must its log be, but for times. Prints the counts as one JSON line.
"""

import argparse
import contextlib
import json
import os
import random
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # each start would import it anew, with its first optimizer

from cs_lm.cli.commands import main as command
from cs_lm.training.metrics_log import MetricsLog
from cs_lm.training.run_dir import RunFolder
from tests.end_to_end.instructions import SPECIAL, WORDS
from tests.faults.kill_runs import wait_or_kill
from tests.sameness import assert_equal

SHAPE = (
    "--vocab_size 260 --d_model 16 --num_layers 1 --num_heads 2 --d_ff 24 --max_seq_length 48 "
    "--seq_length 32 --batch_size 4 --max_steps 4 --corpus_path text.txt --out_dir base"
)
EVERY = (
    "--device cpu --save_interval 2 --eval_interval 4 --log_interval 1 --lr 1e-3 --num_epochs 99"
)
POLICY = "--from base --prompts data.jsonl --rollout_size 8 --batch_size 4 --max_new_tokens 8"
STAGES = {
    "sft": f"sft --from base --data data.jsonl --batch_size 4 --max_steps 24 {EVERY} "
    "--pretraining_mix 0.25 --lora_rank 2",
    "reward": f"reward --from base --data ranked.jsonl --batch_size 2 --max_steps 24 {EVERY}",
    "dpo": f"dpo --from base --data ranked.jsonl --batch_size 2 --max_steps 24 {EVERY}",
    "ppo": f"ppo {POLICY} --reward reward --max_steps 24 {EVERY} --kl_target 1 "
    "--pretraining_mix 0.25",
    "grpo": f"grpo {POLICY} --rule length --group_size 4 --max_steps 24 {EVERY}",
}


def write_data() -> None:
    Path("text.txt").write_text("The cat and the dog saw a bird. " * 60, encoding="utf-8")
    rows = [{"instruction": f"shout {word}", "output": word.upper()} for word in WORDS]
    ranked = [{"prompt": w, "responses": [w.upper(), w.title(), w]} for w in WORDS]
    for name, records in (("data", rows), ("ranked", ranked)):
        lines = "".join(json.dumps(record) + "\n" for record in records)
        Path(f"{name}.jsonl").write_text(lines, encoding="utf-8")


def start(argv: list[str], out: Path) -> int:
    """A process that runs the command; returns its number."""
    child = os.fork()
    if child:
        return child
    status = 70
    try:
        torch.set_num_threads(1)
        with (
            open(out, "a", encoding="utf-8") as file,
            contextlib.redirect_stdout(file),
            contextlib.redirect_stderr(file),
        ):
            status = command(argv)
    finally:
        os._exit(status)


def finish(argv: list[str], out: Path) -> None:
    status = wait_or_kill(start(argv, out), 300)
    assert status == 0, out.read_text(encoding="utf-8")[-3000:]


def content(folder: str) -> dict[str, Any]:
    """The last checkpoint and the log, without times and names of folders."""
    run = RunFolder(folder)
    records = [
        {key: value for key, value in record.items() if not is_timed(key)}
        for record in MetricsLog(run.metrics).records()
        if record["kind"] in ("valid", "rollout", "train")
    ]
    return {"checkpoint": without_times(run.read("last")), "log": records}


def is_timed(key: str) -> bool:
    return key.endswith("_s") or key in ("utilisation", "spike")


def without_times(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: without_times(v) for k, v in value.items() if not is_timed(str(k))}
    return value


def kill_stage(name: str, kills: int, most_s: float, chosen: random.Random) -> Counter:
    argv = STAGES[name].split()
    quiet, folder, out = name, f"killed_{name}", Path(f"{name}.out")
    finish([*argv, "--out_dir", quiet], out)
    counts = Counter()
    for _ in range(kills):
        run = RunFolder(folder)
        words = [argv[0], "--resume"] if run.exists() else argv
        status = wait_or_kill(start([*words, "--out_dir", folder], out), chosen.uniform(0, most_s))
        assert status in (None, 0), out.read_text(encoding="utf-8")[-3000:]
        counts["killed" if status is None else "ended"] += 1
        if run.exists():
            assert run.verify() == []
            counts["resumable"] += 1
    words = [argv[0], "--resume"] if RunFolder(folder).exists() else argv
    finish([*words, "--out_dir", folder], out)
    assert_equal(content(quiet), content(folder), name)
    return counts


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.faults.kill_stages", description=__doc__)
    parser.add_argument("--kills", type=int, default=3)
    parser.add_argument("--most_s", type=float, default=1.5)
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args()
    rng, found = random.Random(chosen.seed), {}
    with tempfile.TemporaryDirectory() as work, contextlib.chdir(work):
        write_data()
        base = ["train", *SHAPE.split(), "--special_tokens", *SPECIAL, "--device", "cpu"]
        finish(base, Path("base.out"))
        for name in STAGES:
            found[name] = kill_stage(name, chosen.kills, chosen.most_s, rng)
    json.dump({name: dict(counts) for name, counts in found.items()}, sys.stdout)


if __name__ == "__main__":
    main()
