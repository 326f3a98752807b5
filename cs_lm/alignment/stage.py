"""What all stages of alignment share: their settings, and the trainer's view of them."""

import dataclasses
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from cs_lm.alignment.conversations import Template
from cs_lm.config.fields import not_positive, setting, to_json
from cs_lm.config.optim import OptimConfig
from cs_lm.config.run import RunConfig, as_in_a_run
from cs_lm.errors import Problem, UserError
from cs_lm.tokenizer import BPETokenizer
from cs_lm.training.run_dir import RunFolder

T = TypeVar("T")
# Settings of a stage that its trainer reads under the same name.
_OF_THE_TRAINER = (
    "batch_size", "grad_accum", "num_epochs", "max_steps", "device", "dtype", "seed",
    "log_interval", "save_interval", "keep_last", "on_nan", "eval_interval", "sample_interval",
    "eval_tokens", "tensorboard", "wandb", "mlflow", "out_dir", "optim",
)  # fmt: skip


@dataclass(frozen=True)
class StageConfig:
    """Settings of every stage. A subclass changes defaults and adds its own."""

    source: str = setting(
        "",
        "the model to start from: folder of a run, one of its checkpoints, or pretrained weights; "
        "required",
        flag="--from",
    )
    out_dir: str | None = setting(None, "folder of the new run; required")
    template: str = setting(
        "auto",
        "chat: control tokens of the tokenizer; alpaca: plain headings; auto: chat where the "
        "tokenizer has <|user|>, <|assistant|> and <|end|>",
        choices=("auto", "chat", "alpaca"),
    )
    seq_length: int | None = setting(
        None, "longest conversation; default: the model's context", "tokens"
    )
    num_epochs: float = setting(3.0, "passes over the data; sets the number of updates")
    max_steps: int | None = as_in_a_run("max_steps")
    batch_size: int = setting(16, "rows in one forward pass")
    grad_accum: int = as_in_a_run("grad_accum")
    optim: OptimConfig = field(default_factory=OptimConfig)
    device: str = as_in_a_run("device")
    dtype: str = as_in_a_run("dtype")
    seed: int = as_in_a_run("seed")
    log_interval: int = as_in_a_run("log_interval")
    save_interval: int = as_in_a_run("save_interval", default=100)
    keep_last: int = as_in_a_run("keep_last")
    on_nan: str = as_in_a_run("on_nan")
    eval_interval: int = as_in_a_run("eval_interval", default=50)
    eval_tokens: int = setting(20_000, "text in each evaluation of it", "tokens")
    sample_interval: int = as_in_a_run("sample_interval", default=100)
    tensorboard: bool = as_in_a_run("tensorboard")
    wandb: bool = as_in_a_run("wandb")
    mlflow: bool = as_in_a_run("mlflow")
    resume: bool = as_in_a_run("resume")
    resume_step: int | None = as_in_a_run("resume_step")

    def validate(self) -> list[Problem]:
        found = [*not_positive(self), *self.optim.validate()]
        if not self.out_dir:
            found.append(Problem("--out_dir", "is missing", fix="name a folder for the new run"))
        if not self.source and not self.resume:
            fix = "name the folder of a run, or weights"
            found.append(Problem("--from", "is missing", fix=fix))
        if self.resume_step is not None and not self.resume:
            what, fix = "has no effect without --resume", "add it, or leave it out"
            found.append(Problem("--resume_step", what, fix=fix))
        return found

    def num_steps(self, num_rows: int) -> int:
        """Updates for `num_epochs` passes over the rows: at least 1, at most `max_steps`."""
        rows = self.batch_size * self.grad_accum
        steps = max(1, round(self.num_epochs * num_rows / rows))
        return steps if self.max_steps is None else min(steps, self.max_steps)

    def as_run(self, base: RunConfig) -> RunConfig:
        """The settings of the stage as those of a run with the model of `base`.

        Its windows are as long as the longest conversation, and no longer than the context.
        """
        context_length = base.model.context_length
        length = min(self.seq_length or context_length, context_length)
        values = {name: getattr(self, name) for name in _OF_THE_TRAINER}
        return dataclasses.replace(base, **values, seq_length=length)

    def saved(self) -> dict[str, Any]:
        """The settings as JSON, for a checkpoint: without those of a single call."""
        return to_json(dataclasses.replace(self, resume=False, resume_step=None))

    def check_resumed(self, extras: dict[str, Any], tokenizer: Any, data_hash: str) -> None:
        """Raises: UserError if a run cannot go on from a checkpoint with these extras."""
        if extras["tokenizer_fingerprint"] != tokenizer.fingerprint:
            raise UserError("--resume: the tokenizer is not the one that the run began with")
        if extras.get("data_sha256") != data_hash:
            raise UserError(
                "--resume: --data or --valid_data hold other records than when the run began; "
                "restore the files, or start a new run in another --out_dir"
            )

    def max_tokens(self, base: RunConfig) -> int:
        """The longest conversation. A model reads all tokens but the last."""
        return self.as_run(base).seq_length + 1


def hash_of(value: Any) -> str:
    """SHA-256 of how the value is written."""
    return hashlib.sha256(repr(value).encode("utf-8")).hexdigest()


def split_by_prompt(
    records: Sequence[T], fraction: float, prompt_of: Callable[[T], Any]
) -> tuple[list[T], list[T]]:
    """Training and validation: records with the same prompt fall on the same side.

    The hashes of the prompts decide, so the order in the file does not matter. At least one prompt
    falls on each side.
    Raises: UserError for fewer than two prompts.
    """
    hashes = [hash_of(prompt_of(one)) for one in records]
    prompts = sorted(set(hashes))
    if len(prompts) < 2:
        raise UserError("--data: got a single prompt, which leaves none for validation; give more")
    count = min(max(1, round(fraction * len(prompts))), len(prompts) - 1)
    kept = set(prompts[:count])
    sides: tuple[list, list] = [], []
    for one, found in zip(records, hashes):
        sides[found in kept].append(one)
    return sides


def save_tokenizer_of(template: Template, tokenizer: BPETokenizer, folder: RunFolder) -> None:
    """Writes the tokenizer into the run's folder; the template's end of an answer ends a text."""
    end = tokenizer.decode([template.end_id])
    if end not in tokenizer.end_tokens:
        tokenizer.end_tokens = [*tokenizer.end_tokens, end]
    folder.save_tokenizer(tokenizer)
