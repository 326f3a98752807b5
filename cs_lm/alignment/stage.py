"""What all stages of alignment share: their settings, and the trainer's view of them."""

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from cs_lm.config.fields import not_positive, setting, to_json
from cs_lm.config.optim import OptimConfig
from cs_lm.config.run import RunConfig, as_in_a_run
from cs_lm.errors import Problem

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
        """The settings of the stage as those of a run with the model of `base`."""
        length = self.seq_length or base.model.context_length
        values = {name: getattr(self, name) for name in _OF_THE_TRAINER}
        return dataclasses.replace(base, **values, seq_length=length)

    def saved(self) -> dict[str, Any]:
        """The settings as JSON, for a checkpoint: without those of a single call."""
        return to_json(dataclasses.replace(self, resume=False, resume_step=None))

    def max_tokens(self, base: RunConfig) -> int:
        """The longest conversation. A model reads all tokens but the last."""
        return min(self.seq_length or base.model.context_length, base.model.context_length) + 1
