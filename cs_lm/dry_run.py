"""What a run would do and need, without doing it."""

import os
from pathlib import Path

from cs_lm.config import RunConfig
from cs_lm.model import flops_per_token, num_parameters
from cs_lm.prepare import (
    DATA,
    EMBEDDED_LABEL,
    embedded_text,
    find_corpus,
    label_of,
    num_training_tokens,
    store_folder,
)
from cs_lm.schedule import learning_rate
from cs_lm.token_store import MemmapManager
from cs_lm.train import num_training_steps

GUESSED_BYTES_PER_TOKEN = 4.0
FLOAT_BYTES = 4


def training_tokens(config: RunConfig) -> tuple[int, bool]:
    """Tokens to train on, and whether that number is known rather than guessed."""
    folder = store_folder(label_of(config))
    if folder.is_dir():
        return num_training_tokens(config, len(MemmapManager(folder))), True
    corpus = find_corpus(config)
    embedded = corpus == DATA / f"{EMBEDDED_LABEL}.txt" and config.data.corpus_path is None
    num_bytes = len(embedded_text().encode()) if embedded else os.path.getsize(corpus)
    guessed = max(1, int(num_bytes / GUESSED_BYTES_PER_TOKEN))
    return num_training_tokens(config, guessed), False


def memory_bytes(config: RunConfig) -> int:
    """Weights, gradients and two averages; and what a forward pass keeps for the backward one.

    A position keeps about 14 D + 5 F floats a layer, and 4 rows of H * T attention weights;
    with the clear operations also 4 rows of V scores.
    """
    model = config.model
    state = 4 * num_parameters(model)
    per_layer = 14 * model.d_model + 5 * model.d_ff + 4 * model.num_heads * config.seq_length
    per_position = model.num_layers * per_layer
    if config.ops == "clear":
        per_position += 4 * model.vocab_size
    return FLOAT_BYTES * (state + config.batch_size * config.seq_length * per_position)


def report(config: RunConfig, out_dir: Path) -> str:
    model = config.model
    tokens, known = training_tokens(config)
    steps = num_training_steps(config, tokens)
    trained = steps * config.tokens_per_step
    parameters = num_parameters(model)
    flops = flops_per_token(model, config.seq_length)
    checkpoint_bytes = 3 * FLOAT_BYTES * parameters
    id_bytes = 2 if model.vocab_size <= 1 << 16 else 4
    about = "" if known else "about "
    rows = [
        ("parameters", f"{parameters:,}"),
        ("FLOPs a token", f"{flops:,} (forward and backward)"),
        ("training text", f"{about}{tokens:,} tokens" + ("" if known else " (not encoded yet)")),
        ("steps", f"{about}{steps:,} of {config.tokens_per_step:,} tokens"),
        ("trained tokens", f"{about}{trained:,} = {trained / tokens:.2f} epochs"),
        ("FLOPs of the run", f"{about}{flops * trained:.3g}"),
        ("memory", f"about {_size(memory_bytes(config))} on the device"),
        (
            "disk",
            f"{_size(2 * checkpoint_bytes)} for two checkpoints in {out_dir}, "
            f"{about}{_size(id_bytes * tokens)} for the token store",
        ),
    ]
    warmup, end = (
        round(config.optim.warmup_ratio * steps),
        round(config.optim.warmfix_ratio * steps),
    )
    key_steps = sorted({0, max(0, warmup - 1), (warmup + end) // 2, max(0, end - 1), steps - 1})
    for step in key_steps:
        if step < steps:
            rows.append((f"lr at step {step:,}", f"{learning_rate(step, steps, config.optim):.3g}"))
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)


def _size(num_bytes: float) -> str:
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if num_bytes < 1000 or unit == "TB":
            return f"{num_bytes:.3g} {unit}"
        num_bytes /= 1000
    raise AssertionError
