"""A training step beside the same model from torch's own layers (`twin.py`).

    python -m benchmarks.training [--rounds 5]

Random tokens: the work does not depend on them. The memory is what the process has at its peak
above what it had before there was a model, less weights, gradients and both moments.
"""

import argparse
import functools

from benchmarks.measure import Found, in_turns, peak_mb

# the course's configuration, and the small one where the overhead of each operation rules
MODELS = {
    "57.7 M, B 8, T 256": (
        {
            "d_model": 512,
            "num_heads": 8,
            "d_ff": 1344,
            "num_layers": 8,
            "vocab_size": 32000,
            "context_length": 256,
        },
        8,
        4,
    ),
    "0.82 M, B 12, T 64": (
        {
            "d_model": 128,
            "num_heads": 4,
            "d_ff": 320,
            "num_layers": 4,
            "vocab_size": 256,
            "context_length": 64,
        },
        12,
        200,
    ),
}
SETTINGS = {"lr": 1e-3, "betas": (0.9, 0.95), "weight_decay": 0.1}


def _timed(step, parameters, before_mb: float, num_steps: int):
    state_mb = 16 * sum(p.numel() for p in parameters) / 2**20
    step()  # creates the moments

    def timed() -> Found:
        for _ in range(num_steps):
            step()
        return Found(above_state_mb=peak_mb() - before_mb - state_mb)

    return timed


def _batch(sizes: dict, batch_size: int):
    import torch

    generator = torch.Generator().manual_seed(0)
    shape = (2, batch_size, sizes["context_length"])
    return torch.randint(sizes["vocab_size"], shape, generator=generator)


def ours(
    name: str,
    dtype: str,
    micro_batches: int = 1,
    batch_size: int | None = None,
    checkpointing: bool = False,
    compiled: bool = False,
):
    """Steps of so many micro-batches of `batch_size` windows (None: the model's own number).

    The fewer, the larger they are: the same tokens in all.
    """
    import torch

    from cs_lm.config.model import ModelConfig
    from cs_lm.data.batches import Batch
    from cs_lm.models.base import next_token_loss
    from cs_lm.models.transformer import TransformerLM
    from cs_lm.ops.compile import CompileWithFallback
    from cs_lm.optim.adamw import AdamW
    from cs_lm.optim.param_groups import parameter_groups
    from cs_lm.training.malloc import keep_freed_memory
    from cs_lm.training.step import train_step, under_autocast

    keep_freed_memory()  # as a run does
    sizes, usual_size, num_steps = MODELS[name]
    batch_size = batch_size or usual_size
    num_steps = num_steps * usual_size // (batch_size * micro_batches)
    batches = [Batch(*_batch(sizes, batch_size)) for _ in range(micro_batches)]
    before_mb = peak_mb()
    model = TransformerLM(ModelConfig(**sizes), activation_checkpointing=checkpointing)
    groups = parameter_groups(model, SETTINGS["weight_decay"])
    optimizer = AdamW(groups, lr=SETTINGS["lr"], betas=SETTINGS["betas"])
    loss = next_token_loss
    if compiled:
        loss = CompileWithFallback(next_token_loss, print)
        optimizer.compile(print)
    loss = under_autocast(loss, torch.device("cpu"), dtype)

    def step():
        train_step(model, optimizer, batches, 1.0, loss)

    return _timed(step, list(model.parameters()), before_mb, num_steps)


def twin(name: str, dtype: str, keeps_memory: bool = False, compiled: bool = False):
    import torch

    from benchmarks.twin import Twin, twin_loss, twin_optimizer, twin_step
    from cs_lm.config.model import ModelConfig
    from cs_lm.training.malloc import keep_freed_memory

    if keeps_memory:  # our setting of the allocator, lent to torch
        keep_freed_memory()
    sizes, batch_size, num_steps = MODELS[name]
    x, y = _batch(sizes, batch_size)
    before_mb = peak_mb()
    model = Twin(ModelConfig(**sizes))
    optimizer = twin_optimizer(model, **SETTINGS)
    loss_function = torch.compile(twin_loss) if compiled else twin_loss

    def step():
        twin_step(model, optimizer, x, y, 1.0, dtype, loss_function)

    return _timed(step, list(model.parameters()), before_mb, num_steps)


def ways_to_take_a_step(name: str) -> dict[str, dict]:
    """Questions, each with its contestants."""
    batch_size = MODELS[name][1]
    plain = functools.partial(ours, name, "float32")
    of_twin = functools.partial(twin, name, "float32")
    return {
        "gradient accumulation": {
            f"4 micro-batches of {batch_size}": functools.partial(plain, micro_batches=4),
            f"steps of {batch_size}": plain,
            f"one batch of {4 * batch_size}": functools.partial(plain, batch_size=4 * batch_size),
        },
        "activation checkpointing": {
            "checkpointing": functools.partial(plain, checkpointing=True),
            "without": plain,
        },
        "torch.compile": {
            "compiled": functools.partial(plain, compiled=True),
            "eager": plain,
            "torch.nn twin": of_twin,
            "the twin, compiled": functools.partial(of_twin, compiled=True),
        },
    }


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args(argv).rounds
    for name, (_, _, num_steps) in MODELS.items():
        for dtype in ("float32", "bfloat16"):
            contestants = {
                "cs_lm": functools.partial(ours, name, dtype),
                # like for like first: our setting of the allocator lent to the peer
                "the twin, freed memory kept": functools.partial(twin, name, dtype, True),
                "torch.nn twin": functools.partial(twin, name, dtype),
            }
            in_turns(f"training step, {name}, {dtype}", contestants, rounds, repeats=num_steps)
    for name, (_, _, num_steps) in MODELS.items():
        for question, contestants in ways_to_take_a_step(name).items():
            in_turns(f"{question}, {name}, float32", contestants, rounds, repeats=num_steps)


if __name__ == "__main__":
    main()
