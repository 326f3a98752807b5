"""Estimates of a run's steps, FLOPs, memory and disk space, without training (--dry_run)."""

import math
from collections.abc import Callable
from pathlib import Path

from cs_lm.config.run import RunConfig
from cs_lm.data.corpus import find_corpus
from cs_lm.data.pipeline import check_length, find_prepared_store, num_training_tokens
from cs_lm.models.registry import ARCHITECTURES, SavedActivations
from cs_lm.models.stats import FLOAT_BYTES, count_weights, flops_per_token, num_parameters
from cs_lm.optim.schedule import learning_rate
from cs_lm.tokenizer import BPETokenizer
from cs_lm.training.console import format_bytes, format_duration


def saved_activations(config: RunConfig) -> SavedActivations:
    """Activations that the run's forward pass keeps for the backward pass.

    Dropout adds its masks, and attention then keeps as much as in the `clear` ops.
    """
    saved = ARCHITECTURES[config.model.architecture].saved_activations
    found = saved[config.ops, config.dtype]
    if getattr(config.model, "drop_rate", 0):
        weights = saved["clear", config.dtype].of_heads_and_keys + 0.25
        found = found._replace(of_heads_and_keys=weights, of_d_model=found.of_d_model + 0.5)
    return found


def store_tokens(config: RunConfig, tokenizer: BPETokenizer | None = None) -> tuple[int, bool]:
    """Number of tokens in the whole corpus, and whether it is exact (True) or a guess."""
    store = find_prepared_store(config, tokenizer)
    if store is not None:
        return len(store), True
    corpus = find_corpus(config.data, remember=False)
    if corpus.paths:
        next(corpus.open().read())  # raises for a corpus without text
    num_bytes = corpus.description["bytes"]
    return max(1, int(num_bytes / guessed_bytes_per_token(config.model.vocab_size))), False


def guessed_bytes_per_token(vocab_size: int) -> float:
    """A fit to English text: 2.1 bytes with 512 tokens, 3.6 with 2,048, 4.2 with 32,000."""
    return max(1.0, min(4.2, 0.8 * (math.log2(vocab_size) - 6.4)))


def memory_bytes(config: RunConfig) -> int:
    """Bytes for weights, gradients, AdamW's two averages, and activations kept for backward.

    Valid without --compile; torch.compile chooses itself which activations to keep.
    """
    model = config.model
    state = 4 * num_parameters(model)
    saved = saved_activations(config)
    per_layer = saved.of_d_model * model.d_model + saved.of_d_ff * model.d_ff
    per_layer += saved.of_heads_and_keys * model.num_heads * config.seq_length
    layers, blocks_at_once = model.num_layers * per_layer, model.num_layers
    if config.activation_checkpointing:
        layers = model.num_layers * model.d_model + per_layer  # all blocks' inputs, one whole block
        blocks_at_once = 1
    per_position = layers + 3 * model.d_model + saved.of_vocab * model.vocab_size
    positions = config.batch_size * config.seq_length
    copies = 0.0  # of the weights in bfloat16; a copy of one weight counts 1/2
    if config.dtype == "bfloat16":
        copies = blocks_at_once * count_weights(model).in_block / 2
    return int(FLOAT_BYTES * (state + copies + positions * per_position))


def report(
    config: RunConfig,
    out_dir: Path,
    tokenizer: BPETokenizer | None = None,
    seconds_of: Callable[[float], float | None] = lambda tokens: None,
) -> str:
    """The estimates as a table of text.

    seconds_of  time that training on so many tokens takes; None: not known
    tokenizer  the one of the resumed run or of --init_from; None: it is made from the corpus
    """
    model = config.model
    all_tokens, known = store_tokens(config, tokenizer)
    tokens = num_training_tokens(config, all_tokens)
    check_length("training", tokens, config)
    if not config.data.valid_path:
        check_length("validation", all_tokens - tokens, config)
    steps = config.num_steps(tokens)
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
        (
            "memory",
            f"about {format_bytes(memory_bytes(config))} on the device; while a save is written, "
            f"{format_bytes(checkpoint_bytes)} for the copy on the CPU",
        ),
        (
            "disk",
            # the newest ones, the best one, and the one that is being written
            f"{format_bytes((config.keep_last + 2) * checkpoint_bytes)} for checkpoints in "
            f"{out_dir}, "
            f"{about}{format_bytes(id_bytes * all_tokens)} for the token store",
        ),
    ]
    seconds = seconds_of(trained)
    if seconds is not None:
        rows.append(("time", f"roughly {format_duration(seconds)}, if nothing else runs here"))
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
