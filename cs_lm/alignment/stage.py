"""What all stages of alignment share: their settings, their task, and the split of their data."""

import dataclasses
import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from cs_lm.alignment.conversations import template_of
from cs_lm.config.fields import not_positive, setting, to_json
from cs_lm.config.optim import OptimConfig
from cs_lm.config.run import RunConfig, as_in_a_run
from cs_lm.errors import Problem, UserError, no_effect_without
from cs_lm.models.base import LanguageModel
from cs_lm.models.registry import build_model
from cs_lm.models.stats import flops_per_token
from cs_lm.ops.fused import OPS
from cs_lm.optim.param_groups import adamw_of
from cs_lm.tokenizer import BPETokenizer
from cs_lm.training.checkpoint import restore
from cs_lm.training.run_dir import RunFolder
from cs_lm.training.task import Task

T = TypeVar("T")
# Settings of a stage that its trainer reads under the same name.
_OF_THE_TRAINER = (
    "batch_size", "grad_accum", "num_epochs", "max_steps", "device", "dtype", "seed",
    "log_interval", "save_interval", "keep_last", "on_nan", "eval_interval",
    "tensorboard", "wandb", "mlflow", "out_dir", "optim",
)  # fmt: skip

# Those that only some stages have, and what the others get: they show no samples.
_OF_SOME_STAGES = {"sample_interval": 0, "eval_tokens": 20_000}


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
        "chat: control tokens of the tokenizer; alpaca: plain headings; auto: that of --from, or "
        "chat where the tokenizer has <|user|>, <|assistant|> and <|end|>",
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
            found.append(no_effect_without("--resume_step", "--resume"))
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
        length = self.seq_length or context_length
        if length > context_length:
            what = f"got {length}, but the model of --from has a context of {context_length}"
            raise UserError(Problem("--seq_length", what, fix="leave it out, or lower it"))
        values = {name: getattr(self, name) for name in _OF_THE_TRAINER}
        for name, otherwise in _OF_SOME_STAGES.items():
            values[name] = getattr(self, name, otherwise)
        return dataclasses.replace(base, **values, seq_length=length)

    def saved(self) -> dict[str, Any]:
        """The settings as JSON, for a checkpoint: without those of a single call."""
        return to_json(dataclasses.replace(self, resume=False, resume_step=None))

    def max_tokens(self, base: RunConfig) -> int:
        """The longest conversation. A model reads all tokens but the last."""
        return self.as_run(base).seq_length + 1


def validate_records(config: Any, what: str) -> list[Problem]:
    """Problems of `data` and `valid_fraction`; what  the records that a stage learns from"""
    found = []
    if not config.data and not config.resume:
        found.append(Problem("--data", "is missing", fix=f"name files of {what}"))
    if not 0 < config.valid_fraction < 1:
        given = f"got {config.valid_fraction}"
        found.append(Problem("--valid_fraction", given, "more than 0 and less than 1"))
    elif config.valid_data and config.valid_fraction != type(config).valid_fraction:
        what = "has no effect with --valid_data"
        found.append(Problem("--valid_fraction", what, fix="leave out one of the two"))
    return found


class StageTask(Task):
    """What the tasks of all stages do alike.

    A subclass sets `stage`, its command, and `data_hash`, which a resumed run must have again.
    """

    stage: str
    data_hash: str

    @property
    def program(self) -> str:
        return f"-m cs_lm {self.stage}"

    def __init__(
        self, config: StageConfig, base: RunConfig, tokenizer: BPETokenizer, model: nn.Module
    ):
        """base  settings of the run with the model to start from"""
        self.config, self.run_config, self.tokenizer = config, config.as_run(base), tokenizer
        self.template = template_of(tokenizer, config.template)
        self.model, self.optimizer = model, adamw_of(model, config.optim)
        self.flops_per_token = flops_per_token(base.model, self.run_config.seq_length)

    def begin_with(self, weights: Mapping[str, Tensor]) -> None:
        """Takes the state dict of the model that a new run starts from."""
        restore({"model": dict(weights)}, self.saved_model)

    def numbers_of_step(self, step: int) -> range:
        """The numbers of the micro-batches of an update."""
        first = step * self.config.grad_accum
        return range(first, first + self.config.grad_accum)

    def save(self) -> dict[str, Any]:
        return {
            "tokenizer_fingerprint": self.tokenizer.fingerprint,
            "stage": {"name": self.stage, "config": self.config.saved()},
            "template": self.template.name,
            "data_sha256": self.data_hash,
        }

    def load(self, extras: dict[str, Any]) -> None:
        if extras["tokenizer_fingerprint"] != self.tokenizer.fingerprint:
            raise UserError("--resume: the tokenizer is not the one that the run began with")
        if extras.get("data_sha256") != self.data_hash:
            raise UserError(
                "--resume: --data or --valid_data hold other records than when the run began; "
                "restore the files, or start a new run in another --out_dir"
            )

    def start(self, folder: RunFolder) -> None:
        """Writes the tokenizer; the template's end of an answer ends a text from here on."""
        end = self.tokenizer.decode([self.template.end_id])
        if end not in self.tokenizer.end_tokens:
            self.tokenizer.end_tokens = [*self.tokenizer.end_tokens, end]
        folder.save_tokenizer(self.tokenizer)

    def facts(self) -> dict[str, Any]:
        num_parameters = sum(parameter.numel() for parameter in self.model.parameters())
        template = self.template.name
        return {"stage": self.stage, "num_parameters": num_parameters, "template": template}


def language_model_of(
    config: StageConfig, base: RunConfig, device: torch.device | str
) -> LanguageModel:
    """A model of the shape of `base`, for the weights that a stage starts from."""
    generator = torch.Generator().manual_seed(config.seed)
    return build_model(base.model, OPS[base.ops], generator=generator, device=device)


def hash_of(value: Any) -> str:
    """SHA-256 of how the value is written."""
    return hashlib.sha256(repr(value).encode("utf-8")).hexdigest()


def hash_of_weights(weights: Mapping[str, Tensor]) -> str:
    """SHA-256 of all weights, with their names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(weights.items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def changed_weights(source: str) -> UserError:
    """The weights that a run began with are needed to resume it, and are not the same any more."""
    return UserError(
        f"--resume: {source!r} holds other weights than when the run began; restore them, or start "
        "a new run in another --out_dir"
    )


def split_by_prompt(
    records: Sequence[T], fraction: float, prompt_of: Callable[[T], Any], flag: str = "--data"
) -> tuple[list[T], list[T]]:
    """Training and validation: records with the same prompt fall on the same side.

    The hashes of the prompts decide, so the order in the file does not matter. At least one prompt
    falls on each side.
    Raises: UserError for fewer than two prompts.
    """
    hashes = [hash_of(prompt_of(one)) for one in records]
    prompts = sorted(set(hashes))
    if len(prompts) < 2:
        raise UserError(f"{flag}: got a single prompt, which leaves none for validation; give more")
    count = min(max(1, round(fraction * len(prompts))), len(prompts) - 1)
    kept = set(prompts[:count])
    sides: tuple[list, list] = [], []
    for one, found in zip(records, hashes):
        sides[found in kept].append(one)
    return sides
