"""Every setting of a run: one frozen dataclass field each, with its default, unit and flag.

`flags.py` generates the command-line flags from these fields. Checkpoints store them as JSON.
"""

from dataclasses import dataclass, field
from typing import Any

from cs_lm.config.data import DataConfig
from cs_lm.config.fields import is_unicode, not_positive, not_unicode, setting
from cs_lm.config.model import ArchitectureConfig, ModelConfig
from cs_lm.config.optim import OptimConfig
from cs_lm.config.presets import DEFAULT_MODEL, GPT_SIZES, model_names, named_model
from cs_lm.config.shared import (
    device_setting,
)
from cs_lm.errors import Problem, no_effect_without

DTYPES = ("float32", "bfloat16")
PARALLEL = ("none", "ddp", "fsdp")
NUM_BYTE_TOKENS = 256
MAX_CONTEXT_LENGTH = 1 << 22  # tokens; position tables have this many rows, even for small weights


@dataclass(frozen=True)
class RunConfig:
    """One training run."""

    model: ArchitectureConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    model_name: str = setting(
        DEFAULT_MODEL,
        "transformer: RMS norms, rotary positions and SwiGLU; or a size of GPT-2 or GPT-3, whose "
        "settings are then the defaults of the other flags (--dry_run shows what comes out)",
        flag="--model",
        choices=model_names,
    )
    seq_length: int = setting(256, "length of a training window", "tokens")
    batch_size: int = setting(32, "windows in one forward pass")
    grad_accum: int = setting(1, "forward passes per update (gradient accumulation)")
    num_epochs: float = setting(10.0, "passes over the training tokens; sets the number of updates")
    max_steps: int | None = setting(
        None, "at most this many updates, whatever --num_epochs", "steps"
    )
    device: str = device_setting()
    dtype: str = setting(
        "float32",
        "bfloat16: matrix products in bfloat16, weights and sums in float32",
        choices=DTYPES,
    )
    compile: bool = setting(False, "compile the model and the optimizer's step with torch.compile")
    activation_checkpointing: bool = setting(
        False, "less memory for more time: blocks are computed again in the backward pass"
    )
    ops: str = setting(
        "fast", "clear: the definitions; fast: the quicker versions", choices=("clear", "fast")
    )
    parallel: str = setting(
        "none",
        "how the processes that torchrun started share the work; each has a part of every batch. "
        "ddp: and the whole model; fsdp: and a part of every weight. --batch_size is that of all "
        "of them together",
        choices=PARALLEL,
    )
    replicas: int = setting(
        1, "with --parallel fsdp: so many groups of processes, each of which has the whole model"
    )
    optimizer_sharding: bool = setting(
        False, "with --parallel ddp: each process has a part of the optimizer's moments"
    )
    tensor_parallel: int = setting(
        1,
        "with --parallel, --model transformer: so many processes share each weight matrix; they "
        "compute the same rows",
    )
    context_parallel: int = setting(
        1,
        "with --parallel, --model transformer: so many processes share each row; each has a part "
        "of its positions",
    )
    pipeline_parallel: int = setting(
        1,
        "with --parallel ddp, --model transformer: so many processes share the layers; "
        "--grad_accum forward passes follow each other through them",
    )
    dist_timeout_s: float = setting(
        120.0, "with --parallel: a process that does not answer for so long ends the run", "s"
    )
    check_interval: int = setting(
        500,
        "with --parallel: compare weights and moments of all processes every N steps; 0: never",
        "steps",
        minimum=0,
    )
    seed: int = setting(0, "random seed of weights, batches and samples", minimum=0)
    log_interval: int = setting(10, "write to metrics.jsonl every N steps", "steps")
    save_interval: int = setting(
        500, "save a checkpoint every N steps; 0: only at the end", "steps", minimum=0
    )
    keep_last: int = setting(
        2, "checkpoints that stay besides the best one", minimum=2
    )  # one may be damaged
    on_nan: str = setting(
        "stop",
        "a loss or gradient that is not finite: stop with the weights from before it, or leave "
        "the step out, at most 10 in a row",
        choices=("stop", "skip"),
    )
    eval_interval: int = setting(
        250, "validate every N steps; 0: only at the end", "steps", minimum=0
    )
    eval_first: bool = setting(False, "validate after the first step, too")
    eval_tokens: int = setting(100_000, "validation text in each validation", "tokens")
    eval_train: bool = setting(
        False, "also compute the loss on as much training text, without dropout"
    )
    sample_interval: int = setting(
        500, "print a sample every N steps; 0: only at the end", "steps", minimum=0
    )
    prompt: str = setting("The ", "how each sample begins")
    out_dir: str | None = setting(
        None, "folder of the run: log, checkpoints, plot; default: runs/<label>"
    )
    tensorboard: bool = setting(False, "also write TensorBoard event files")
    wandb: bool = setting(
        False, "also write a Weights & Biases run, offline unless WANDB_MODE says online"
    )
    mlflow: bool = setting(
        False, "also write an MLflow run, in the folder unless MLFLOW_TRACKING_URI names a server"
    )
    init_from: str | None = setting(
        None,
        "a new run that begins with these weights: folder of a run, one of its checkpoints, or "
        "pretrained weights; shape and tokenizer come from there",
    )
    resume: bool = setting(False, "continue the run in --out_dir with its saved settings")
    resume_step: int | None = setting(
        None, "with --resume: from the checkpoint of this step, not the newest", "step", minimum=0
    )
    dry_run: bool = setting(False, "check all settings, print estimates, and stop")

    def validate(self) -> list[Problem]:
        """All problems of the settings."""
        return [
            *self.model.validate(),
            *self._validate_name(),
            *self.data.validate(),
            *self.optim.validate(),
            *not_positive(self),
            *self._validate_lengths(),
            *self._validate_options(),
        ]

    def _validate_name(self) -> list[Problem]:
        is_known = self.model_name in model_names()
        if is_known and type(named_model(self.model_name)) is not type(self.model):
            return [Problem("--model", f"got {self.model_name!r} with settings of another model")]
        return []

    def _validate_lengths(self) -> list[Problem]:
        found = []
        context, vocab_size = self.model.context_length, self.model.vocab_size
        if self.seq_length > context:
            need = f"at most --max_seq_length ({context})"
            fix = "lower --seq_length or raise --max_seq_length"
            found.append(Problem("--seq_length", f"got {self.seq_length}", need, fix))
        num_special = len(set(self.data.special_tokens))
        if 0 < vocab_size < NUM_BYTE_TOKENS + num_special:
            sum_ = f"({NUM_BYTE_TOKENS} bytes + {num_special} special tokens)"
            need = f"at least {NUM_BYTE_TOKENS + num_special} {sum_}"
            found.append(Problem("--vocab_size", f"got {vocab_size}", need, "raise it"))
        if not self.prompt:
            found.append(Problem("--prompt", "got an empty text", "at least one character"))
        elif not is_unicode(self.prompt):
            found.append(not_unicode("--prompt", self.prompt))
        return found

    def _validate_options(self) -> list[Problem]:
        """Problems of settings that have no effect together with other settings."""
        found = []
        if self.resume_step is not None and not self.resume:
            found.append(no_effect_without("--resume_step", "--resume"))
        if self.init_from is not None and self.data.vocab_path is not None:
            what = "has no effect beside --init_from, whose tokenizer is used"
            found.append(Problem("--vocab_path", what))
        if self.replicas != 1 and self.parallel != "fsdp":
            found.append(no_effect_without("--replicas", "--parallel fsdp"))
        if self.optimizer_sharding and self.parallel != "ddp":
            found.append(no_effect_without("--optimizer_sharding", "--parallel ddp"))
        found += self._validate_model_parallel()
        shares = self.tensor_parallel * self.context_parallel * self.pipeline_parallel > 1
        if self.compile and (self.parallel == "fsdp" or shares):
            what = "cannot be used with --parallel fsdp or a model that processes share"
            found.append(Problem("--compile", what, fix="leave one of the two out"))
        if self.compile and self.activation_checkpointing:
            what = "cannot be used with --compile, which decides itself what to recompute"
            fix = "leave one of the two out"
            found.append(Problem("--activation_checkpointing", what, fix=fix))
        return found

    def _validate_model_parallel(self) -> list[Problem]:
        tensor, context, found = self.tensor_parallel, self.context_parallel, []
        stages = self.pipeline_parallel
        given = {"--tensor_parallel": tensor, "--context_parallel": context,
                 "--pipeline_parallel": stages}  # fmt: skip
        if stages > self.model.num_layers:
            need = f"at most --num_layers ({self.model.num_layers})"
            found.append(Problem("--pipeline_parallel", f"got {stages}", need))
        for flag, count in given.items():
            if count > 1 and self.parallel == "none":
                found.append(no_effect_without(flag, "--parallel ddp or fsdp"))
            if count > 1 and not isinstance(self.model, ModelConfig):
                found.append(
                    Problem(flag, f"got {count}", "1 with another --model than transformer")
                )
            if count > 1 and self.replicas > 1:
                found.append(Problem(flag, "cannot be used with --replicas", fix="leave one out"))
        parts = {
            "--num_heads": (self.model.num_heads, tensor, "--tensor_parallel"),
            "--d_ff": (self.model.d_ff, tensor, "--tensor_parallel"),
            "--seq_length": (self.seq_length, tensor * context,
                             "--tensor_parallel x --context_parallel"),
        }  # fmt: skip
        for flag, (size, count, by) in parts.items():
            if count > 0 and size % count:
                need = f"a multiple of {by} ({count})"
                found.append(Problem(flag, f"got {size}", need, "change one of the two"))
        return found

    @property
    def tokens_per_step(self) -> int:
        return self.batch_size * self.seq_length * self.grad_accum

    def num_steps(self, num_tokens: int) -> int:
        """Updates for `num_epochs` passes over the tokens: at least 1, at most `max_steps`."""
        steps = max(1, round(self.num_epochs * num_tokens / self.tokens_per_step))
        return steps if self.max_steps is None else min(steps, self.max_steps)


def as_in_a_run(name: str, **changes: Any) -> Any:
    """The setting of that name, for the config of another command.

    changes  `default`, or another part of the setting
    """
    each = RunConfig.__dataclass_fields__[name]
    default = changes.pop("default", each.default)
    return field(default=default, metadata={**each.metadata, **changes})


def named_run(model_name: str) -> RunConfig:
    """The defaults of a run with that model: for GPT-3's sizes, the published ones.

    Raises: KeyError for a name that is not among `model_names()`.
    """
    model = named_model(model_name)
    size = GPT_SIZES.get(model_name)
    if size is None or size.lr is None:
        return RunConfig(model_name=model_name, model=model)
    tokens = RunConfig.batch_size * model.context_length
    return RunConfig(
        model_name=model_name,
        model=model,
        optim=OptimConfig(lr=size.lr, lr_min=size.lr / 10, weight_decay=0.1),
        seq_length=model.context_length,
        grad_accum=max(1, round(size.tokens_per_step / tokens)),
    )


# Settings of one call of run_clm.py, not of the run: checkpoints always store these values.
NOT_SAVED_SETTINGS = {
    "resume": False,
    "resume_step": None,
    "dry_run": False,
    "parallel": "none",
    "replicas": 1,
    "optimizer_sharding": False,
    "tensor_parallel": 1,
    "context_parallel": 1,
    "pipeline_parallel": 1,
    "dist_timeout_s": RunConfig.dist_timeout_s,
    "check_interval": RunConfig.check_interval,
}
