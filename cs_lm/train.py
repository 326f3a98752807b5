"""Training: one step, and the loop around it that logs, validates, samples and saves."""

import math
import platform
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import Tensor

from cs_lm.batches import BatchSource, Prefetcher
from cs_lm.checkpoint import restore
from cs_lm.compiling import Compiled
from cs_lm.config import RunConfig, to_json
from cs_lm.decoding import DecodingConfig, generate_text
from cs_lm.device import describe, keep_freed_memory, matrix_flops_per_s, resolve_device
from cs_lm.evaluation import Evaluation, evaluate, gzip_bits_per_byte, token_byte_lengths
from cs_lm.fast_ops import FAST
from cs_lm.metrics import (
    Display,
    MetricsLog,
    Stopwatch,
    format_duration,
    open_tensorboard,
    plot_losses,
)
from cs_lm.model import TransformerLM, flops_per_token, next_token_loss, num_parameters
from cs_lm.ops import CLEAR, IGNORE_INDEX
from cs_lm.optim import AdamW, clip_gradients, parameter_groups
from cs_lm.prepare import PreparedData
from cs_lm.run_folder import RunFolder
from cs_lm.schedule import learning_rate
from cs_lm.stop_signals import StopSignals

OPS = {"clear": CLEAR, "fast": FAST}
SAMPLE_TOKENS = 80

Batch = tuple[Tensor, Tensor]
LossFunction = Callable[[TransformerLM, Tensor, Tensor], tuple[Tensor, Tensor]]


def num_training_steps(config: RunConfig, num_tokens: int) -> int:
    """Updates that make `num_epochs` passes over the tokens, at least 1, at most `max_steps`."""
    steps = max(1, round(config.num_epochs * num_tokens / config.tokens_per_step))
    return steps if config.max_steps is None else min(steps, config.max_steps)


def autocast(device: torch.device, dtype: str) -> AbstractContextManager:
    """Matrix products in bfloat16 where asked; weights, sums and the optimizer stay float32."""
    if dtype == "bfloat16":
        return torch.autocast(device.type, torch.bfloat16)
    return nullcontext()


def train_step(
    model: TransformerLM,
    optimizer: torch.optim.Optimizer,
    batches: list[Batch],
    max_norm: float,
    loss_function: LossFunction = next_token_loss,
    precision: AbstractContextManager | None = None,
) -> tuple[Tensor, Tensor]:
    """One update from one or more micro-batches, as if they were a single batch.

    Returns the mean loss [nats per token] before the update and the gradient norm before
    clipping, both scalars on the device: nothing here waits for the device.
    """
    num_targets = sum((y != IGNORE_INDEX).sum() for _, y in batches).clamp(min=1)
    optimizer.zero_grad(set_to_none=True)
    loss = torch.zeros((), device=model.lm_head.weight.device)
    for x, y in batches:
        with precision or nullcontext():
            loss_sum, _ = loss_function(model, x, y)
        share = loss_sum / num_targets
        share.backward()
        loss += share.detach()
    norm = clip_gradients(model.parameters(), max_norm)
    optimizer.step()
    return loss, norm


class Trainer:
    """A run: model, optimizer and data, from the first step or from its last checkpoint.

    checkpoint  what `RunFolder.read_last` gave, to go on from
    Raises: ValueError when the checkpoint was trained with another tokenizer.
    """

    def __init__(
        self,
        config: RunConfig,
        data: PreparedData,
        folder: RunFolder,
        checkpoint: dict[str, Any] | None = None,
    ):
        self.config, self.data, self.folder = config, data, folder
        self.device = resolve_device(config.device)
        if self.device.type == "cpu":
            keep_freed_memory()
        generator = torch.Generator().manual_seed(config.seed)
        self.model = TransformerLM(
            config.model, OPS[config.ops], generator, self.device, config.activation_checkpointing
        )
        optim = config.optim
        groups = parameter_groups(self.model, optim.weight_decay)
        self.optimizer = AdamW(groups, lr=optim.lr, betas=optim.betas, eps=optim.eps)
        self.batch = BatchSource(
            data.train, config.batch_size, config.seq_length, config.seed, config.data.sampling,
            self.device,
        )  # fmt: skip
        self.batches_of_step = Prefetcher(self._batches_of_step)
        self.num_steps = num_training_steps(config, len(data.train))
        self.precision = autocast(self.device, config.dtype)
        self.loss_function: LossFunction = next_token_loss
        if config.compile:
            self.loss_function = Compiled(next_token_loss, lambda text: self.say(text))
        self.byte_lengths = token_byte_lengths(data.tokenizer.vocab)
        self.log = MetricsLog(folder.metrics)
        self.tensorboard = open_tensorboard(folder.tensorboard) if config.tensorboard else None
        self.step = 0
        self.trained_tokens = 0
        self.trained_before_s = 0.0
        self.last_evaluation: Evaluation | None = None
        if checkpoint is not None:
            self._go_on_from(checkpoint)

    def fit(self) -> int:
        """Trains to the last step or to a stop signal; returns the exit status for the process."""
        self._begin()
        with StopSignals() as signals:
            try:
                while self.step < self.num_steps and signals.received is None:
                    self._one_step()
                    self._after_step(is_last=self.step == self.num_steps)
                if signals.received is not None and self.step < self.num_steps:
                    self._save()
                    self.say(
                        f"stopped by {signals.received.name} after step {self.step} of "
                        f"{self.num_steps}: saved; the same command with --resume goes on"
                    )
                    self.say(self._plot())
                    return 128 + signals.received
            finally:
                self.display.close()
                if self.tensorboard is not None:
                    self.tensorboard.close()
        self._finish()
        return 0

    # ---- begin and end ----

    def _go_on_from(self, checkpoint: dict[str, Any]) -> None:
        extras = checkpoint["extras"]
        if extras["tokenizer_fingerprint"] != self.data.tokenizer.fingerprint:
            raise ValueError(
                "--resume: the run was trained with another tokenizer than the one given now; use "
                "that one, or start a new run in another --out_dir"
            )
        settings = [
            {name: value for name, value in group.items() if name != "params"}
            for group in self.optimizer.param_groups
        ]
        restore(checkpoint, self.model, self.optimizer)
        for group, chosen in zip(self.optimizer.param_groups, settings):
            group.update(chosen)  # weight decay, betas and eps may be other ones from here on
        self.step = checkpoint["iteration"]
        self.trained_tokens = extras["trained_tokens"]
        self.trained_before_s = extras["elapsed_s"]

    def _begin(self) -> None:
        config = self.config
        resumed = self.step > 0
        self.display = Display(self.num_steps, self.step)
        self.say = self.display.say
        if resumed:
            self.log.drop_after(self.step)
        else:
            self.log.clear()  # of a run that ended before its first checkpoint
            self.folder.save_tokenizer(self.data.tokenizer)
        self.peak_flops_per_s = matrix_flops_per_s(self.device, getattr(torch, config.dtype))
        self.log.write(
            "resume" if resumed else "config",
            step=self.step,
            num_steps=self.num_steps,
            train_tokens=len(self.data.train),
            valid_tokens=len(self.data.valid),
            num_parameters=num_parameters(config.model),
            tokenizer_fingerprint=self.data.tokenizer.fingerprint,
            config=to_json(config),
            versions=versions(),
            device=describe(self.device),
            peak_flops_per_s=self.peak_flops_per_s,
        )
        self.say(
            f"{'resuming' if resumed else 'training'}: "
            f"{num_parameters(config.model) / 1e6:.2f} M parameters on {describe(self.device)}, "
            f"{config.dtype} (matrix products: {self.peak_flops_per_s / 1e9:,.0f} GFLOP/s), "
            f"{config.ops} ops; steps {self.step} to {self.num_steps} of "
            f"{config.tokens_per_step:,} tokens; {self.folder.path}"
        )
        self.watch = Stopwatch()
        self._session_first_step = self._logged_step = self.step
        self._logged_s = 0.0
        self._saved_step = self.step if resumed else -1

    def _finish(self) -> None:
        result, path = self.last_evaluation, self.folder.path
        elapsed_s = self.trained_before_s + self.watch.elapsed_s
        summary: dict[str, Any] = {"elapsed_s": elapsed_s}
        if result is not None:
            summary["bits_per_byte"] = result.bits_per_byte
        self.log.write("end", step=self.step, **summary)
        print(
            f"done: {self.step} steps, {self.trained_tokens:,} tokens, "
            f"{format_duration(elapsed_s)} of training"
        )
        if result is not None:
            print(
                f"validation: loss {result.loss_nats:.4f} nats/token, perplexity "
                f"{result.perplexity:.2f}, {result.bits_per_byte:.4f} bits/byte "
                f"(gzip -9 on the same text: {self._gzip_bits_per_byte():.4f})"
            )
        print(
            f"checkpoints: {self.folder.checkpoints.last_path} and "
            f"{self.folder.checkpoints.best_path}"
        )
        print(self._plot())
        print(f'more text: python -m cs_lm generate --out_dir {path} --prompt "The "', flush=True)

    def _plot(self) -> str:
        try:
            return f"plot: {plot_losses(self.folder.metrics, self.folder.plot)}"
        except ValueError as error:  # matplotlib is an extra: without it, the run is no failure
            return str(error)

    def _gzip_bits_per_byte(self) -> float:
        config, data = self.config, self.data
        return gzip_bits_per_byte(
            data.valid, data.tokenizer.vocab, config.seq_length, config.eval_tokens
        )

    # ---- one step and what follows it ----

    def _batches_of_step(self, step: int) -> list[Batch]:
        first = step * self.config.grad_accum
        return [self.batch(index) for index in range(first, first + self.config.grad_accum)]

    def _one_step(self) -> None:
        config = self.config
        self.lr = learning_rate(self.step, self.num_steps, config.optim)
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr
        self.loss, self.norm = train_step(
            self.model, self.optimizer, self.batches_of_step(self.step), config.optim.max_norm,
            self.loss_function, self.precision,
        )  # fmt: skip
        self.step += 1
        self.trained_tokens += config.tokens_per_step

    def _after_step(self, is_last: bool) -> None:
        """Saves before it validates and samples: what can fail comes after the work is safe."""
        config = self.config
        self.display.update(self.step)
        if self._is_due(config.log_interval, is_last) or self.step == 1:
            self._report()
        with self.watch.pause():
            if self._is_due(config.save_interval, is_last):
                self._save()
            if self._is_due(config.eval_interval, is_last):
                self._validate()
            if self._is_due(config.sample_interval, is_last):
                self._sample()

    def _is_due(self, interval: int, is_last: bool) -> bool:
        return is_last or (interval > 0 and self.step % interval == 0)

    def _report(self) -> None:
        loss, norm = self._finite_loss(), self.norm.item()
        elapsed_s = self.watch.elapsed_s
        steps = self.step - self._logged_step
        tokens_per_s = steps * self.config.tokens_per_step / (elapsed_s - self._logged_s)
        self._logged_step, self._logged_s = self.step, elapsed_s
        s_per_step = elapsed_s / (self.step - self._session_first_step)
        eta_s = (self.num_steps - self.step) * s_per_step
        model_flops_per_s = tokens_per_s * flops_per_token(
            self.config.model, self.config.seq_length
        )
        utilisation = model_flops_per_s / self.peak_flops_per_s
        self.display.report(self.step, loss, self.lr, norm, tokens_per_s, utilisation, eta_s)
        self._record(
            "train", loss_nats=loss, lr=self.lr, grad_norm=norm, tokens_per_s=tokens_per_s,
            model_flops_per_s=model_flops_per_s, utilisation=utilisation,
            elapsed_s=self.trained_before_s + elapsed_s,
        )  # fmt: skip

    def _finite_loss(self) -> float:
        """The last step's loss. Raises: ValueError when it is no number any more."""
        loss = self.loss.item()
        if not math.isfinite(loss):
            raise ValueError(self._diverged(f"the loss is {loss}"))
        return loss

    def _diverged(self, what: str) -> str:
        kept = "there is no checkpoint yet"
        if self._saved_step >= 0:
            kept = f"the checkpoint of step {self._saved_step} is kept"
        return (
            f"training: {what} at step {self.step}; {kept}; start again with a lower --lr or "
            "--max_norm in another --out_dir"
        )

    def _save(self) -> None:
        if self._saved_step == self.step:
            return
        self._finite_loss()
        finite = torch.stack([p.isfinite().all() for p in self.model.parameters()]).all()
        if not finite.item():
            raise ValueError(self._diverged("a weight is not finite any more"))
        self.folder.checkpoints.save(self.model, self.optimizer, self.step, **self._extras())
        self._saved_step = self.step

    def _extras(self) -> dict[str, Any]:
        return {
            "config": to_json(replace(self.config, resume=False, dry_run=False)),
            "tokenizer_fingerprint": self.data.tokenizer.fingerprint,
            "elapsed_s": self.trained_before_s + self.watch.elapsed_s,
            "trained_tokens": self.trained_tokens,
        }

    def _validate(self) -> None:
        config = self.config
        result = self.last_evaluation = evaluate(
            self.model, self.data.valid, config.seq_length, config.batch_size, self.byte_lengths,
            config.eval_tokens, self.precision,
        )  # fmt: skip
        self._record(
            "valid", loss_nats=result.loss_nats, perplexity=result.perplexity,
            bits_per_byte=result.bits_per_byte, num_scored_tokens=result.num_tokens,
        )  # fmt: skip
        is_best = self.folder.checkpoints.save_if_best(
            result.loss_nats, self.model, self.optimizer, self.step, **self._extras()
        )
        self.say(
            f"step {self.step} | validation loss {result.loss_nats:.4f} | perplexity "
            f"{result.perplexity:.2f} | {result.bits_per_byte:.4f} bits/byte"
            f"{' | best so far' if is_best else ''}"
        )

    def _sample(self) -> None:
        choice = DecodingConfig(max_new_tokens=SAMPLE_TOKENS, seed=self.config.seed)
        prompt = self.config.prompt
        text = generate_text(self.model, self.data.tokenizer, [prompt], choice)[0]
        self._record("sample", prompt=prompt, text=text)
        self.say(f"step {self.step} | sample: {prompt}{text}\n")

    def _record(self, kind: str, **values: Any) -> None:
        self.log.write(kind, step=self.step, tokens=self.trained_tokens, **values)
        if self.tensorboard is not None:
            for name, value in values.items():
                if isinstance(value, float):
                    self.tensorboard.add_scalar(f"{kind}/{name}", value, self.step)


def versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "torch": torch.__version__}
    for package in ("cs_lm", "numpy", "regex"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:  # used from its folder, without being installed
            pass
    return found
