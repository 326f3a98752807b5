"""`python -m cs_lm evaluate`: how well a trained model predicts texts.

Several values of --text_path give a table with a line for each, and one for all together.
"""

import functools
import operator
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from cs_lm.cli._errors import readable_errors
from cs_lm.config.fields import setting
from cs_lm.config.flags import parse_config
from cs_lm.config.shared import (
    checkpoint_setting,
    corpora_setting,
    device_setting,
    document_separator_setting,
    encoding_errors_setting,
    text_field_setting,
    validate_checkpoint,
)
from cs_lm.data.corpus import text_of
from cs_lm.data.token_store import ArrayTokens
from cs_lm.device import resolve_device
from cs_lm.errors import Problem, UserError
from cs_lm.evaluation.perplexity import EvalOptions, Evaluation, evaluate, token_byte_lengths
from cs_lm.tokenizer.corpus_files import find_files
from cs_lm.training.run_dir import RunFolder, TrainedModel, load_trained


@dataclass(frozen=True)
class EvaluateConfig:
    out_dir: str = setting("", "folder of the run; required")
    text_path: tuple[str, ...] = corpora_setting("texts to score, one line each")
    checkpoint: str = checkpoint_setting()
    seq_length: int | None = setting(None, "window; default: the run's --seq_length", "tokens")
    batch_size: int = setting(16, "windows in one forward pass; changes the speed alone")
    max_tokens: int | None = setting(
        None,
        "score about this many of each text, in whole windows, at least one; default: all",
        "tokens",
    )
    stride: int | None = setting(
        None,
        "from one window to the next; below --seq_length, every token sees at least the difference "
        "before it; default: --seq_length",
        "tokens",
    )
    encoding_errors: str = encoding_errors_setting()
    text_field: str = text_field_setting()
    document_separator: str | None = document_separator_setting()
    device: str = device_setting()

    def validate(self) -> list[Problem]:
        found = [
            Problem(f"--{n}", "is missing", fix="name it")
            for n in ("out_dir", "text_path")
            if not getattr(self, n)
        ]
        for name in ("seq_length", "batch_size", "max_tokens", "stride"):
            value = getattr(self, name)
            if value is not None and value < 1:
                found.append(Problem(f"--{name}", f"got {value}", "1 or more"))
        return found + validate_checkpoint(self.checkpoint)


@readable_errors
def main(argv: Sequence[str] | None = None) -> int:
    config = parse_config(EvaluateConfig, "python -m cs_lm evaluate", __doc__, argv)
    for path in config.text_path:
        find_files([path], "--text_path")
    trained = load_trained(
        RunFolder(config.out_dir),
        config.checkpoint,
        resolve_device(config.device),
    )
    seq_length = config.seq_length or trained.config.seq_length
    if seq_length > trained.config.model.context_length:
        raise UserError(
            f"--seq_length: got {seq_length}, need at most the model's context "
            f"({trained.config.model.context_length})"
        )
    if config.stride is not None and config.stride > seq_length:
        raise UserError(
            f"--stride: got {config.stride}, need at most the window ({seq_length}): else tokens "
            "between the windows are not scored"
        )
    options = EvalOptions(seq_length, config.batch_size, config.max_tokens, config.stride)
    print(f"model         {config.out_dir}, {config.checkpoint}, step {trained.iteration}")
    results = [_evaluated(trained, path, config, options) for path in config.text_path]
    if len(results) == 1:
        _print_one(results[0])
    else:
        _print_table(config.text_path, results)
    return 0


def _evaluated(
    trained: TrainedModel, path: str, config: EvaluateConfig, options: EvalOptions
) -> Evaluation:
    text = text_of([path], config, trained.tokenizer.special_tokens, "--text_path")
    blocks = trained.tokenizer.encode_blocks(text.read())
    ids = np.concatenate([np.asarray(block, np.int64) for block in blocks])
    if len(ids) < 2:
        raise UserError(f"--text_path: {path!r} has {len(ids)} tokens, need at least 2")
    lengths = token_byte_lengths(trained.tokenizer.vocab)
    return evaluate(trained.model, ArrayTokens(ids), lengths, options)


def _print_one(result: Evaluation) -> None:
    print(f"scored        {result.num_tokens:,} tokens, {result.num_bytes:,} bytes")
    print(f"loss          {result.loss_nats:.4f} nats per token")
    print(f"perplexity    {result.perplexity:.2f}")
    print(f"bits per byte {result.bits_per_byte:.4f}")


def _print_table(paths: Sequence[str], results: Sequence[Evaluation]) -> None:
    """A line for each text, and one for all tokens together."""
    rows = [*zip(paths, results), ("all", functools.reduce(operator.add, results))]
    width = max(len(name) for name, _ in rows)
    heads = f"{'tokens':>12}{'bytes':>14}{'loss [nats]':>13}{'perplexity':>12}{'bits/byte':>11}"
    print(f"\n{'text':<{width}}{heads}")
    for name, found in rows:
        print(
            f"{name:<{width}}{found.num_tokens:>12,}{found.num_bytes:>14,}{found.loss_nats:>13.4f}"
            f"{found.perplexity:>12.2f}{found.bits_per_byte:>11.4f}"
        )
