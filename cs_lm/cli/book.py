"""`python -m cs_lm book`: trains GPT-2's 124M shape on one short story, ten times over.

The experiment that readers of the books know, with its settings, its two plots, and the losses that
were published for "The Verdict" (20,479 characters) beside ours. Without a text of its own it takes
as many characters of the Python manual; without GPT-2's vocabulary, a tokenizer is trained. About
ten minutes on two cores, and 10 GB of disk. A run that was stopped goes on.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cs_lm.cli import train
from cs_lm.cli._errors import readable_errors
from cs_lm.config.fields import not_positive, setting
from cs_lm.config.flags import parse_config
from cs_lm.config.shared import device_setting
from cs_lm.data.cache import keep_text
from cs_lm.data.corpus import embedded_text
from cs_lm.errors import Problem
from cs_lm.training.metrics_log import read_metrics
from cs_lm.training.plots import plot_runs
from cs_lm.training.run_dir import RunFolder

NUM_CHARACTERS = 20_479
# Of the model, and of the training; constant learning rate, no clipping.
MODEL = "--model gpt2-small --no-qkv_bias --no-tied_head --init torch --max_seq_length 256"
TRAINING = (
    "--seq_length 256 --batch_size 2 --sampling epoch --num_epochs 10 --lr 4e-4 --lr_min 4e-4 "
    "--warmup_ratio 0 --weight_decay 0.1 --betas 0.9 0.999 --max_norm inf "
    "--eval_first --eval_interval 5 --eval_train --eval_tokens 2560 --log_interval 1 "
    "--save_interval 0 --sample_interval 45"
)
# Updates, loss on the training text and on the validation text [nats per token].
# Source: Raschka 2024, Build a large language model (from scratch), section 5.2.
PUBLISHED = ((1, 9.781, 9.933), (16, 5.961, 6.616), (86, 0.391, 6.452))
NUM_UPDATES = 90
# (training, validation) losses after all updates, of other seeds on "The Verdict", from
# `python -m benchmarks.book`: ours, and the book's model from torch.nn.
SEED_ENDS = {
    "cs_lm": ((0.677, 6.377), (0.358, 6.472), (1.077, 6.298), (0.519, 6.474), (0.388, 6.607)),
    "torch.nn": ((0.4, 6.504), (0.253, 6.641), (0.912, 6.357), (0.326, 6.544), (0.28, 6.526)),
}
PLOTS = (("epoch", "loss"), ("tokens", "perplexity"))


@dataclass(frozen=True)
class BookConfig:
    corpus_path: str | None = setting(None, "the story; default: a part of the Python manual")
    vocab_path: str | None = setting(None, "GPT-2's vocab.json; default: trained on the story")
    merges_path: str | None = setting(None, "GPT-2's merges.txt, beside --vocab_path")
    prompt: str = setting("Every effort moves you", "how the samples begin")
    max_steps: int | None = setting(None, "at most this many updates, of 90", "steps")
    seed: int = setting(123, "random seed of weights, batches and samples", minimum=0)
    device: str = device_setting()
    out_dir: str = setting("runs/book", "folder of the run")

    def validate(self) -> list[Problem]:
        return not_positive(self)  # the run finds the others, under the same flags


@readable_errors
def main(argv: Sequence[str] | None = None) -> int:
    config = parse_config(BookConfig, "python -m cs_lm book", __doc__, argv)
    folder = RunFolder(config.out_dir)
    status = train.main(flags_of_run(config, folder.exists()))
    if status:
        return status
    for against, show in PLOTS:
        print(f"plot: {plot_runs([folder.metrics], folder.plot_of(show, against), against, show)}")
    records = list(read_metrics(folder.metrics))
    print(comparison(records))
    print(place_among_seeds(records))
    return 0


def flags_of_run(config: BookConfig, goes_on: bool) -> list[str]:
    """The arguments of `run_clm.py`."""
    corpus_path = config.corpus_path or str(_stand_in())
    flags = [*MODEL.split(), *TRAINING.split(), "--corpus_path", corpus_path]
    for name in ("vocab_path", "merges_path", "prompt", "max_steps", "seed", "device", "out_dir"):
        value = getattr(config, name)
        if value is not None:
            flags += [f"--{name}", str(value)]
    return [*flags, "--resume"] if goes_on else flags


def _stand_in() -> Path:
    return keep_text("book-stand-in", embedded_text()[:NUM_CHARACTERS].encode("utf-8"))


def comparison(records: list[dict[str, Any]]) -> str:
    """The published losses, and ours after the nearest number of updates."""
    ours = [r for r in records if r["kind"] == "valid"]
    lines = [
        'loss [nats per token]   published ("The Verdict")      ours',
        "                     updates  train  validation   updates  train  validation",
    ]
    for updates, train_loss, valid_loss in PUBLISHED:
        near = min(ours, key=lambda r: abs(r["step"] - updates))
        lines.append(
            f"{'':21}{updates:7}  {train_loss:5.3f}  {valid_loss:10.3f}   {near['step']:7}  "
            f"{near['train_loss_nats']:5.3f}  {near['loss_nats']:10.3f}"
        )
    return "\n".join(lines)


def place_among_seeds(records: list[dict[str, Any]]) -> str:
    """Where the end of the run lies among the ends of other seeds on "The Verdict"."""
    last = [r for r in records if r["kind"] == "valid"][-1]
    if last["step"] != NUM_UPDATES:
        return f"the range of other seeds is known after {NUM_UPDATES} updates"
    lines = [f"after {NUM_UPDATES} updates: other seeds, lowest to highest, and this run"]
    for which, key in enumerate(("train_loss_nats", "loss_nats")):
        for who, ends in SEED_ENDS.items():
            losses = sorted(end[which] for end in ends)
            place = _place(last[key], losses)
            kind = ("training", "validation")[which]
            shown = f"{losses[0]:.3f} to {losses[-1]:.3f}"
            of_seeds = f"{who:8} ({len(ends)} seeds)"
            lines.append(f"  {kind:10}  {of_seeds}  {shown}   this run {last[key]:.3f}: {place}")
    return "\n".join(lines)


def _place(loss: float, losses: list[float]) -> str:
    if losses[0] <= loss <= losses[-1]:
        return "in the range"
    return "below the range" if loss < losses[0] else "above the range"
