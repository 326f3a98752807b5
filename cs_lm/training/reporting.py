"""What a run says of itself when it begins and when it is done."""

import shlex
from collections.abc import Callable
from typing import Any

from cs_lm.config.run import RunConfig
from cs_lm.data.prepare import PreparedData
from cs_lm.inference.evaluate import described, gzip_bits_per_byte
from cs_lm.inference.sampling import DecodingConfig, NotANumberError
from cs_lm.inference.text import generate_text
from cs_lm.models.base import LanguageModel
from cs_lm.models.stats import num_parameters
from cs_lm.tokenizer import BPETokenizer
from cs_lm.training.plots import plotted
from cs_lm.training.run_dir import RunFolder

SAMPLE_TOKENS = 80


def opening_line(config: RunConfig, begins: str, where: str, steps: tuple[int, int]) -> str:
    """begins  "training" or "resuming"; where  device, precision and speed in words"""
    first, last = steps
    return (
        f"{begins}: {num_parameters(config.model) / 1e6:.2f} M parameters on {where}, "
        f"{config.ops} ops; steps {first} to {last} of {config.tokens_per_step:,} tokens"
    )


def sample_text(
    model: LanguageModel,
    tokenizer: BPETokenizer,
    prompt: str,
    seed: int,
    check: Callable[[], None],
) -> tuple[str | None, str]:
    """What the model writes after the prompt, or None, and why not; `check` is called for each part
    that is certain.
    """
    choice = DecodingConfig(max_new_tokens=SAMPLE_TOKENS, seed=seed)
    try:
        return generate_text(model, tokenizer, [prompt], choice, lambda *_: check())[0], ""
    except NotANumberError as error:  # finite weights whose products are not
        return None, str(error)


def closing_lines(
    config: RunConfig, data: PreparedData, folder: RunFolder, step: int, valid: dict | None
) -> list[str]:
    """valid  what the last validation found"""
    lines = []
    if valid is not None:
        scored: tuple[Any, ...] = data.valid, data.tokenizer.vocab
        lengths = config.seq_length, config.eval_tokens
        lines.append(described(valid, gzip_bits_per_byte(*scored, *lengths)))
    best = "".join(f", the best is step {step}" for step in folder.checkpoints.steps("best"))
    return [
        *lines,
        f"checkpoints: {folder.checkpoints.path(step)}{best}",
        plotted(folder.metrics, folder.plot),
        f"more text: python -m cs_lm generate --out_dir {shlex.quote(str(folder.path))} "
        f"--prompt {shlex.quote(config.prompt)}",
    ]
