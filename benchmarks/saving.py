"""What a checkpoint costs a run: how long training stops, and how a save beside it slows a step.

    python -m benchmarks.saving [--rounds 5]

The course's model: 57.7 M parameters, with both moments 0.69 GB. A save in place, as most
trainers do it, stops the run for all of `torch.save`.
"""

import argparse
import functools
import tempfile
from pathlib import Path

from benchmarks.measure import Found, in_turns
from benchmarks.training import MODELS, SETTINGS, _batch

COURSE = next(iter(MODELS))
REPEATS = 3


def _trained_one_step():
    from cs_lm.config.model import ModelConfig
    from cs_lm.data.batches import Batch
    from cs_lm.models.transformer import TransformerLM
    from cs_lm.optim.adamw import AdamW
    from cs_lm.optim.param_groups import parameter_groups
    from cs_lm.training.malloc import keep_freed_memory
    from cs_lm.training.step import train_step

    keep_freed_memory()
    sizes, batch_size, _ = MODELS[COURSE]
    model = TransformerLM(ModelConfig(**sizes))
    groups = parameter_groups(model, SETTINGS["weight_decay"])
    optimizer = AdamW(groups, lr=SETTINGS["lr"], betas=SETTINGS["betas"])
    batch = Batch(*_batch(sizes, batch_size))

    def step():
        train_step(model, optimizer, [batch], 1.0)

    step()  # creates the moments
    return model, optimizer, step


def standing_still(how: str):
    """What the caller waits for: the copy in memory, a save in place, or all that a save does."""
    import torch

    from cs_lm.training.checkpoint import checkpoint_content, copied
    from cs_lm.training.checkpoint_manager import CheckpointManager

    model, optimizer, _ = _trained_one_step()
    folder = tempfile.TemporaryDirectory()

    def timed() -> Found:
        for number in range(1, REPEATS + 1):
            content = checkpoint_content(model, optimizer, number)
            if how == "copy":
                copied(content)
            elif how == "in place":
                torch.save(content, Path(folder.name) / "state.pt")
            else:
                CheckpointManager(folder.name).save(content)
        return Found()

    return timed


def stepping(saves: bool):
    """Steps, with a save that begins before the first of them and is waited for, or without."""
    from cs_lm.training.async_checkpoint import BackgroundSaver
    from cs_lm.training.checkpoint import checkpoint_content
    from cs_lm.training.checkpoint_manager import CheckpointManager

    model, optimizer, step = _trained_one_step()
    folder = tempfile.TemporaryDirectory()
    saver = BackgroundSaver(CheckpointManager(folder.name))

    def timed() -> Found:
        if saves:
            saver.save(checkpoint_content(model, optimizer, 1))
        for _ in range(REPEATS):
            step()
        saver.wait()
        return Found()

    return timed


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args(argv).rounds
    ways = {
        "copy in memory (cs_lm)": "copy",
        "torch.save in place": "in place",
        "checksum, fsync, rename": "all",
    }
    contestants = {name: functools.partial(standing_still, how) for name, how in ways.items()}
    in_turns(f"a run stands still for a save, {COURSE}", contestants, rounds, repeats=REPEATS)
    contestants = {
        "with a save beside them": functools.partial(stepping, True),
        "without": functools.partial(stepping, False),
    }
    in_turns(f"a step of {REPEATS}, {COURSE}", contestants, rounds, repeats=REPEATS)


if __name__ == "__main__":
    main()
