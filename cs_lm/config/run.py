"""Every setting of a run: one frozen dataclass field each, with its default, unit and flag.

Command-line flags are generated from these fields (flags.py), checkpoints store them as JSON.
"""

import math
from dataclasses import dataclass, field
from typing import NamedTuple

from cs_lm.config.fields import is_unicode, not_positive, not_unicode, setting
from cs_lm.config.shared import (
    CORPUS_HELP,
    STANDARD_INPUT,
    as_paths,
    device_setting,
    document_separator_setting,
    encoding_errors_setting,
    special_tokens_setting,
    text_field_setting,
)

DTYPES = ("float32", "bfloat16")
NUM_BYTE_TOKENS = 256
MOST_CONTEXT = 1 << 22  # tokens; tables of positions are as long, whatever the weights
MAX_CHUNK_SIZE = 1 << 30  # tokens; one chunk is held in memory while it is written


class GPTSize(NamedTuple):
    """A row of a paper's table."""

    num_layers: int
    d_model: int
    num_heads: int
    lr: float | None = None  # None: GPT-2's is not published
    tokens_per_step: float | None = None


DEFAULT_MODEL = "transformer"
# Sources: Radford et al. 2019, table 2; Brown et al. 2020, table 2.1, dense attention throughout.
# Of that table, two rows do not divide: 1.3B has 24 heads of 128 in a width of 2,048 (here 16 of
# 128, which gives the 1.3 G), 13B has 40 heads in a width of 5,140 (here 5,120).
GPT_SIZES = {
    "gpt2-small": GPTSize(12, 768, 12),
    "gpt2-medium": GPTSize(24, 1024, 16),
    "gpt2-large": GPTSize(36, 1280, 20),
    "gpt2-xl": GPTSize(48, 1600, 25),
    "gpt3-125M": GPTSize(12, 768, 12, 6e-4, 0.5e6),
    "gpt3-350M": GPTSize(24, 1024, 16, 3e-4, 0.5e6),
    "gpt3-760M": GPTSize(24, 1536, 16, 2.5e-4, 0.5e6),
    "gpt3-1.3B": GPTSize(24, 2048, 16, 2e-4, 1e6),
    "gpt3-2.7B": GPTSize(32, 2560, 32, 1.6e-4, 1e6),
    "gpt3-6.7B": GPTSize(32, 4096, 32, 1.2e-4, 2e6),
    "gpt3-13B": GPTSize(40, 5120, 40, 1e-4, 2e6),
    "gpt3-175B": GPTSize(96, 12288, 96, 0.6e-4, 3.2e6),
}


def _problems_of_shape(config: "ModelConfig | GPT2Config") -> list[str]:
    found = not_positive(config)
    if not 0 < config.norm_eps < 1:
        found.append(f"norm_eps: got {config.norm_eps}, need above 0 and below 1")
    if config.d_model > 0 and config.num_heads > 0 and config.d_model % config.num_heads:
        found.append(
            f"--num_heads: got {config.num_heads}, need a divisor of --d_model "
            f"({config.d_model}); change one of the two"
        )
    return found


@dataclass(frozen=True)
class ModelConfig:
    """What the shape of a model follows from."""

    d_model: int = setting(512, "width of the residual stream")
    num_heads: int = setting(8, "attention heads; must divide d_model into even parts")
    d_ff: int = setting(1344, "width inside the feed-forward layers")
    vocab_size: int = setting(32000, "token ids; a new tokenizer is trained to this size")
    num_layers: int = setting(6, "Transformer blocks")
    context_length: int = setting(
        512, "longest sequence the model can see", "tokens", flag="--max_seq_length"
    )
    rope_theta: float = setting(100000.0, "base of the rotary angles", flag="--theta")
    norm_eps: float = field(default=1e-5)

    def problems(self) -> list[str]:
        found = _problems_of_shape(self)
        is_shape = self.d_model > 0 and self.num_heads > 0
        if is_shape and self.d_model % (2 * self.num_heads) == self.num_heads:  # odd parts
            found.append(
                f"--num_heads: got {self.num_heads}, which makes the head size "
                f"{self.d_model // self.num_heads}; need an even one for rotary positions"
            )
        return found


@dataclass(frozen=True)
class GPT2Config:
    """What only the models of the GPT-2 family have."""

    d_model: int = setting(768, "width of the residual stream")
    num_heads: int = setting(12, "attention heads; must divide d_model")
    d_ff: int = setting(3072, "width inside the feed-forward layers")
    vocab_size: int = setting(50257, "token ids; a new tokenizer is trained to this size")
    num_layers: int = setting(12, "Transformer blocks")
    context_length: int = setting(
        1024, "longest sequence the model can see", "tokens", flag="--max_seq_length"
    )
    drop_rate: float = setting(
        0.1, "part of numbers that dropout sets to 0 in training", flag="--dropout"
    )
    qkv_bias: bool = setting(True, "biases of queries, keys and values")
    tied_head: bool = setting(
        True, "scores are made with the embedding, not with a head of its own"
    )
    init: str = setting(
        "gpt2",
        "how weights begin: as GPT-2's, or as those of torch's own layers",
        choices=("gpt2", "torch"),
    )
    norm_eps: float = field(default=1e-5)

    def problems(self) -> list[str]:
        found = [line for line in _problems_of_shape(self) if "--dropout" not in line]
        if not 0 <= self.drop_rate <= 0.99:
            found.append(f"--dropout: got {self.drop_rate}, need 0 to 0.99")
        return found


@dataclass(frozen=True)
class DataConfig:
    """Where the text comes from and how it becomes tokens."""

    corpus_path: tuple[str, ...] = setting(
        (), f"text to train on: {CORPUS_HELP}; without it, the Python language manual"
    )
    valid_path: tuple[str, ...] = setting(
        (), "text to validate on, instead of a part; as --corpus_path"
    )
    valid_fraction: float = setting(
        0.1, "part of the corpus, at its end, kept for validation", "of tokens"
    )
    corpus_size: str | None = setting(
        None,
        "label of the corpus: its store is data/<label>_chunks-<fingerprint>/; default: the first "
        "file's name; alone, it names a store that is there",
    )
    chunk_size: int = setting(500_000, "length of a file of the token store", "tokens")
    vocab_path: str | None = setting(
        None, "tokenizer's vocab.json; trained and written there if missing"
    )
    merges_path: str | None = setting(None, "tokenizer's merges.txt, beside --vocab_path")
    special_tokens: tuple[str, ...] = special_tokens_setting()
    encoding_errors: str = encoding_errors_setting()
    text_field: str = text_field_setting()
    document_separator: str | None = document_separator_setting()
    sampling: str = setting(
        "random", "windows: any start, or each window once an epoch", choices=("random", "epoch")
    )

    def __post_init__(self):
        for name in ("corpus_path", "valid_path"):  # a single path, or None, is taken too
            object.__setattr__(self, name, as_paths(getattr(self, name)))

    def problems(self) -> list[str]:
        found = not_positive(self)
        if STANDARD_INPUT in self.corpus_path and STANDARD_INPUT in self.valid_path:
            found.append("--corpus_path, --valid_path: got - for both; standard input is one text")
        if not 0 < self.valid_fraction < 1:
            found.append(
                f"--valid_fraction: got {self.valid_fraction}, need a number between 0 and 1"
            )
        if self.valid_path and self.valid_fraction != DataConfig.valid_fraction:
            found.append("--valid_fraction: has no effect beside --valid_path; give one of the two")
        if (self.vocab_path is None) != (self.merges_path is None):
            given, other = ("--vocab_path", "--merges_path")
            if self.vocab_path is None:
                given, other = other, given
            found.append(f"{given}: got it without {other}; give both or none")
        if self.chunk_size > MAX_CHUNK_SIZE:
            found.append(f"--chunk_size: got {self.chunk_size}, need at most {MAX_CHUNK_SIZE}")
        if any(not token for token in self.special_tokens):
            found.append("--special_tokens: got an empty one; need at least one character each")
        if self.corpus_size is not None and not self.corpus_size.strip("."):
            found.append(f"--corpus_size: got {self.corpus_size!r}, need a name for the store")
        elif self.corpus_size is not None and set(self.corpus_size) & set('/\\:*?"<>|\0'):
            found.append(
                f"--corpus_size: got {self.corpus_size!r}, need a label without path characters"
            )
        return found


@dataclass(frozen=True)
class OptimConfig:
    """AdamW, its learning rate over time, and the gradient clipper."""

    lr: float = setting(1e-4, "highest learning rate, after warm-up")
    lr_min: float = setting(1e-5, "learning rate after the cosine")
    warmup_ratio: float = setting(0.1, "linear warm-up", "of steps")
    warmfix_ratio: float = setting(0.9, "end of the cosine; constant after it", "of steps")
    weight_decay: float = setting(0.01, "decoupled decay; not for norms and embeddings")
    betas: tuple[float, float] = setting((0.9, 0.95), "decay of the two running averages")
    eps: float = setting(1e-8, "added to the root of the second average")
    max_norm: float = setting(1.0, "gradients are scaled down to this L2 norm; inf: never")

    def problems(self) -> list[str]:
        found = []
        for name, most in (("lr", 1e3), ("eps", 1e3), ("max_norm", math.inf)):
            if not 0 < getattr(self, name) <= most:
                need = "more than 0" + (f", at most {most:g}" if most < math.inf else "")
                found.append(f"--{name}: got {getattr(self, name)}, need {need}")
        if not 0 <= self.lr_min <= self.lr:
            found.append(f"--lr_min: got {self.lr_min}, need 0 to --lr ({self.lr})")
        if not 0 <= self.warmup_ratio <= self.warmfix_ratio <= 1:
            found.append(
                f"--warmup_ratio, --warmfix_ratio: got {self.warmup_ratio} and "
                f"{self.warmfix_ratio}, need 0 <= warmup_ratio <= warmfix_ratio <= 1"
            )
        if not 0 <= self.weight_decay <= 1e3:
            found.append(f"--weight_decay: got {self.weight_decay}, need 0 to 1000")
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            shown = " ".join(map(str, self.betas))
            found.append(f"--betas: got {shown}, need two numbers from 0 to below 1")
        return found


@dataclass(frozen=True)
class RunConfig:
    """One training run."""

    model: ModelConfig | GPT2Config = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    model_name: str = setting(
        DEFAULT_MODEL,
        "transformer: RMS norms, rotary positions and SwiGLU; or a size of GPT-2 or GPT-3, whose "
        "settings are then the defaults of the other flags (--dry_run shows what comes out)",
        flag="--model",
        choices=(DEFAULT_MODEL, *GPT_SIZES),
    )
    seq_length: int = setting(256, "length of a training window", "tokens")
    batch_size: int = setting(32, "windows in one forward pass")
    grad_accum: int = setting(1, "forward passes to one update")
    num_epochs: float = setting(10.0, "updates follow from this many passes over the store")
    max_steps: int | None = setting(None, "at most this many updates", "steps")
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
    seed: int = setting(0, "weights, batches and samples follow from it")
    log_interval: int = setting(10, "a record in metrics.jsonl", "steps")
    save_interval: int = setting(500, "a checkpoint; 0: only at the end", "steps")
    keep_last: int = setting(2, "checkpoints that stay besides the best one, 2 or more")
    on_nan: str = setting(
        "stop",
        "a loss or gradient that is not finite: stop with the weights from before it, or leave "
        "the step out, at most 10 in a row",
        choices=("stop", "skip"),
    )
    eval_interval: int = setting(250, "validation; 0: only at the end", "steps")
    eval_first: bool = setting(False, "validation after the first step, too")
    eval_tokens: int = setting(100_000, "validation text in each validation", "tokens")
    eval_train: bool = setting(
        False, "each validation scores as much of the training text, too: without dropout"
    )
    sample_interval: int = setting(500, "a sample of the model's text; 0: only at the end", "steps")
    prompt: str = setting("The ", "how each sample begins")
    out_dir: str | None = setting(
        None, "folder of the run: log, checkpoints, plot; default: runs/<label>"
    )
    tensorboard: bool = setting(False, "also write TensorBoard event files")
    init_from: str | None = setting(
        None,
        "a new run that begins with these weights: folder of a run, one of its checkpoints, or "
        "pretrained weights; shape and tokenizer come from there",
    )
    resume: bool = setting(False, "continue the run in --out_dir with its saved settings")
    resume_step: int | None = setting(
        None, "with --resume: from the checkpoint of this step, not the newest", "step"
    )
    dry_run: bool = setting(False, "check all settings, print estimates, and stop")

    def problems(self) -> list[str]:
        """Everything wrong with the settings, one readable line each."""
        may_be_zero = ("save_interval", "eval_interval", "sample_interval", "seed", "resume_step")
        found = [
            *self.model.problems(),
            *self._problems_of_name(),
            *self.data.problems(),
            *self.optim.problems(),
        ]
        found += not_positive(self, may_be_zero)
        if self.seq_length > self.model.context_length:
            found.append(
                f"--seq_length: got {self.seq_length}, need at most --max_seq_length "
                f"({self.model.context_length}); shorten the one or raise the other"
            )
        least = NUM_BYTE_TOKENS + len(set(self.data.special_tokens))
        if 0 < self.model.vocab_size < least:
            found.append(
                f"--vocab_size: got {self.model.vocab_size}, need at least {least} "
                f"({NUM_BYTE_TOKENS} bytes + {least - NUM_BYTE_TOKENS} special tokens); raise it"
            )
        if self.resume_step is not None and not self.resume:
            found.append("--resume_step: has no effect without --resume; add it, or leave it out")
        if self.init_from is not None and self.data.vocab_path is not None:
            found.append("--vocab_path: has no effect beside --init_from, whose tokenizer is used")
        if self.compile and self.activation_checkpointing:
            found.append(
                "--activation_checkpointing: does not go with --compile, which chooses itself what "
                "to compute again; leave one of the two out"
            )
        if not self.prompt:
            found.append("--prompt: got an empty text, need at least one character")
        elif not is_unicode(self.prompt):
            found.append(not_unicode("--prompt", self.prompt))
        return found

    def _problems_of_name(self) -> list[str]:
        is_gpt2 = isinstance(self.model, GPT2Config)
        if self.model_name in (DEFAULT_MODEL, *GPT_SIZES) and is_gpt2 == (
            self.model_name == DEFAULT_MODEL
        ):
            return [f"--model: got {self.model_name!r} with settings of another model"]
        return []

    @property
    def tokens_per_step(self) -> int:
        return self.batch_size * self.seq_length * self.grad_accum


def named_run(model_name: str) -> RunConfig:
    """The defaults of a run with that model; for an unknown name, those of a run without one."""
    if model_name not in GPT_SIZES:
        return RunConfig()
    size = GPT_SIZES[model_name]
    is_gpt2 = size.lr is None
    model = GPT2Config(
        d_model=size.d_model, num_heads=size.num_heads, d_ff=4 * size.d_model,
        num_layers=size.num_layers, context_length=GPT2Config.context_length if is_gpt2 else 2048,
        drop_rate=GPT2Config.drop_rate if is_gpt2 else 0.0,
    )  # fmt: skip
    if is_gpt2:
        return RunConfig(model_name=model_name, model=model)
    seq_length = model.context_length
    grad_accum = max(1, round(size.tokens_per_step / (RunConfig.batch_size * seq_length)))
    optim = OptimConfig(lr=size.lr, lr_min=size.lr / 10, weight_decay=0.1)
    return RunConfig(
        model_name=model_name, model=model, optim=optim, seq_length=seq_length,
        grad_accum=grad_accum,
    )  # fmt: skip


# Settings of one call of run_clm.py, which are not the run's, and what they are in its checkpoints.
OF_ONE_CALL = {"resume": False, "resume_step": None, "dry_run": False}
