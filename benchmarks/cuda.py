"""The course's configuration on a CUDA device, beside the same model from torch.nn.

    python -m benchmarks.cuda [--rounds 3] [--seconds 10] [--out FILE]

Runs the tests that need CUDA, then trains both models in float32 and bfloat16, in turns, and prints
one JSON line a measurement, with the name of the card. Less than nine minutes in all.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

from benchmarks.twin import Twin, twin_optimizer, twin_step
from cs_lm.config.model import ModelConfig
from cs_lm.data.batches import Batch
from cs_lm.models.base import next_token_loss
from cs_lm.models.transformer import TransformerLM
from cs_lm.ops.compile import CompileWithFallback
from cs_lm.optim.adamw import AdamW
from cs_lm.optim.param_groups import parameter_groups
from cs_lm.training.step import train_step, under_autocast

ROOT = Path(__file__).parents[1]
SIZES = ModelConfig(
    d_model=512, num_heads=8, d_ff=1344, vocab_size=32_000, num_layers=8, context_length=512
)
BATCH_SIZE, SEQ_LENGTH = 48, 256
SETTINGS = {"lr": 1e-4, "betas": (0.9, 0.95), "weight_decay": 0.01}
WARM_UP_STEPS = 5


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cuda", description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=10.0, help="of each measurement")
    parser.add_argument("--out", help="also append the JSON lines to this file")
    chosen = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("error: this torch finds no CUDA device; nothing was measured")
    lines = [tests_of_cuda()]
    for dtype in ("float32", "bfloat16"):
        lines += in_turns(dtype, chosen.rounds, chosen.seconds)
    card = torch.cuda.get_device_name()
    for line in lines:
        shown = json.dumps({"card": card, "torch": torch.__version__, **line})
        print(shown, flush=True)
        if chosen.out:
            with open(chosen.out, "a", encoding="utf-8") as file:
                file.write(shown + "\n")


def tests_of_cuda() -> dict:
    argv = [sys.executable, "-m", "pytest", "-k", "cuda or device", "-p", "no:cacheprovider"]
    found = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, timeout=240)
    last = found.stdout.strip().splitlines()[-1:]
    return {"question": "tests that need CUDA", "status": found.returncode, "said": last}


def in_turns(dtype: str, rounds: int, seconds: float) -> list[dict]:
    contestants = {
        "cs_lm": lambda: ours(dtype, compiled=False),
        "torch.nn twin": lambda: twin(dtype, compiled=False),
        "cs_lm, compiled": lambda: ours(dtype, compiled=True),
        "torch.nn twin, compiled": lambda: twin(dtype, compiled=True),
    }
    found: dict[str, list[dict]] = {name: [] for name in contestants}
    for _ in range(rounds):
        for name, contestant in contestants.items():
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            found[name].append(timed(contestant(), seconds))
    lines = [
        {
            "question": f"training step, {dtype}",
            "who": name,
            **{key: statistics.median(one[key] for one in each) for key in each[0]},
        }
        for name, each in found.items()
    ]
    for name in ("cs_lm", "cs_lm, compiled"):  # like for like
        peer = name.replace("cs_lm", "torch.nn twin")
        ratios = [a["step_s"] / b["step_s"] for a, b in zip(found[name], found[peer])]
        lines.append(
            {
                "question": f"training step, {dtype}",
                "ratio": f"{name} / {peer}",
                "step_s_ratio": round(statistics.median(ratios), 3),
                "least": round(min(ratios), 3),
                "most": round(max(ratios), 3),
            }
        )
    return lines


def batch_of(seed: int) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(SIZES.vocab_size, (BATCH_SIZE, SEQ_LENGTH + 1), generator=generator)
    ids = ids.to("cuda")
    return Batch(ids[:, :-1].contiguous(), ids[:, 1:].contiguous())


def ours(dtype: str, compiled: bool):
    device = torch.device("cuda")
    model = TransformerLM(SIZES, generator=torch.Generator().manual_seed(0), device=device)
    groups = parameter_groups(model, SETTINGS["weight_decay"])
    optimizer = AdamW(groups, lr=SETTINGS["lr"], betas=SETTINGS["betas"])
    loss = CompileWithFallback(next_token_loss, print) if compiled else next_token_loss
    if compiled:
        optimizer.compile(print)
    loss, batch = under_autocast(loss, device, dtype), batch_of(1)
    return lambda: train_step(model, optimizer, [batch], 1.0, loss)[0]


def twin(dtype: str, compiled: bool):
    model = Twin(SIZES).to("cuda")
    run = torch.compile(model) if compiled else model
    optimizer, batch = twin_optimizer(model, **SETTINGS), batch_of(1)
    return lambda: twin_step(run, optimizer, *batch, 1.0, dtype)


def timed(step, seconds: float) -> dict:
    """Seconds of a step, with the device waited for at both ends of the measurement only."""
    for _ in range(WARM_UP_STEPS):
        step()
    torch.cuda.synchronize()
    start_s, num_steps = time.perf_counter(), 0
    while time.perf_counter() - start_s < seconds or not num_steps:
        loss = step()
        num_steps += 1
        if num_steps % 10 == 0:
            torch.cuda.synchronize()  # or thousands of steps would be queued
    torch.cuda.synchronize()
    step_s = (time.perf_counter() - start_s) / num_steps
    return {
        "step_s": round(step_s, 5),
        "tokens_per_s": round(BATCH_SIZE * SEQ_LENGTH / step_s),
        "peak_mb": round(torch.cuda.max_memory_allocated() / 1e6),
        "loss_nats": round(loss.item(), 4),
    }


if __name__ == "__main__":
    main()
