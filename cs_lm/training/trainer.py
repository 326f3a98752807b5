"""Training: the loop around the step, that logs, validates, samples and saves."""

import functools
import math
from contextlib import suppress
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from cs_lm.config.fields import from_json, to_json
from cs_lm.config.run import OF_ONE_CALL, RunConfig
from cs_lm.data.batches import BatchSource, seed_of_step
from cs_lm.data.prefetch import steps_ahead
from cs_lm.data.prepare import PreparedData
from cs_lm.data.token_store import Tokens
from cs_lm.device import describe, measured_speed, resolve_device, versions
from cs_lm.inference.evaluate import Evaluation, evaluate, token_byte_lengths
from cs_lm.models.base import LanguageModel, next_token_loss
from cs_lm.models.registry import build_model
from cs_lm.models.stats import num_parameters
from cs_lm.ops.compile import Compiled
from cs_lm.ops.fused import OPS
from cs_lm.optim.adamw import AdamW
from cs_lm.optim.param_groups import parameter_groups
from cs_lm.optim.schedule import learning_rate
from cs_lm.training.async_checkpoint import BackgroundSaver
from cs_lm.training.best_measure import begin_best_anew, is_comparable, measure_of
from cs_lm.training.checkpoint import checkpoint_content, restore
from cs_lm.training.console import Display, Stopwatch, format_duration
from cs_lm.training.malloc import keep_freed_memory
from cs_lm.training.metrics_log import MetricsLog, SpikeMark
from cs_lm.training.nonfinite import BadNumbers, StepFlags, advice, are_finite, write_bad_step
from cs_lm.training.plots import plotted
from cs_lm.training.reporting import closing_lines, opening_line, sample_text
from cs_lm.training.run_dir import RunFolder
from cs_lm.training.signals import Stopped, StopSignals
from cs_lm.training.step import LossFunction, autocast, train_step
from cs_lm.training.tensorboard import TensorBoardLog
from cs_lm.training.throughput import SpeedMeter

NOT_SAVED = 4  # exit status


class Trainer:
    """A run: model, optimizer and data, from the first step or from its last checkpoint.

    checkpoint  what `RunFolder.read` gave, to go on from
    weights     to begin a new run with
    Raises: ValueError when the checkpoint was trained with another tokenizer.
    """

    def __init__(
        self,
        config: RunConfig,
        data: PreparedData,
        folder: RunFolder,
        checkpoint: dict[str, Any] | None = None,
        weights: dict[str, Tensor] | None = None,
    ):
        self.config, self.data, self.folder = config, data, folder
        self.device = resolve_device(config.device)
        if self.device.type == "cpu":
            keep_freed_memory()
        generator = torch.Generator().manual_seed(config.seed)
        self.model = build_model(
            config.model, OPS[config.ops], generator, self.device, config.activation_checkpointing
        )
        optim = config.optim
        groups = parameter_groups(self.model, optim.weight_decay)
        self.optimizer = AdamW(groups, lr=optim.lr, betas=optim.betas, eps=optim.eps)
        self.batch = BatchSource(
            data.train,
            config.batch_size,
            config.seq_length,
            config.seed,
            config.data.sampling,
            self.device,
        )
        self.batches_of_step = steps_ahead(self.batch, config.grad_accum)
        self.num_steps = config.num_steps(len(data.train))
        self.precision = autocast(self.device, config.dtype)
        self.loss_function: LossFunction = next_token_loss
        if config.compile:
            say_once = functools.cache(lambda text: self.say(text))
            self.loss_function = Compiled(next_token_loss, say_once)
            self.optimizer.compile(say_once)
        self.byte_lengths = token_byte_lengths(data.tokenizer.vocab)
        self.signals = StopSignals()
        self.flags = StepFlags()
        stops = config.on_nan == "stop"
        self.sound = torch.ones((), dtype=torch.bool, device=self.device) if stops else None
        self.say = print  # until there is a display
        self.log = MetricsLog(folder.metrics, lambda text: self.say(text))
        folder.checkpoints.keep_last = config.keep_last
        events = folder.tensorboard if config.tensorboard else None
        self.tensorboard = TensorBoardLog(events, lambda text: self.say(text))
        self._updates_before_step: set[int] = set()
        self.step, self.trained_tokens, self.trained_before_s = 0, 0, 0.0
        self.valid: dict[str, Any] | None = None  # what the last validation found
        self.measure, self._is_comparable = measure_of(config, data), True
        self._is_resumed = checkpoint is not None
        if checkpoint is not None:
            self._go_on_from(checkpoint)
        elif weights is not None:
            restore({"model": weights}, self.model)

    def fit(self) -> int:
        """Trains to the last step or to a stop signal; returns the exit status for the process.

        Raises: BadNumbers when a loss, gradient or weight is not finite and the run cannot go on.
        """
        self._begin()
        with self.signals:
            try:
                return self._train()
            finally:
                self.saver.wait()
                self.display.close()
                self.tensorboard.close()

    def _train(self) -> int:
        try:
            self._catch_up()
            while self.step < self.num_steps:
                self._one_step()
                self._after_step(is_last=self.step == self.num_steps)
                self.signals.check()
            return self._finish()
        except Stopped as stopped:
            return self._stop(stopped)
        except BadNumbers:
            raise
        except Exception:
            self._rescue()
            raise

    @property
    def has_ended(self) -> bool:
        """Whether there is nothing left to do, not even what follows the last step."""
        return self.step > self.num_steps or self.step == self.num_steps in self.folder.ends()

    # ---- begin and end ----

    def _go_on_from(self, checkpoint: dict[str, Any]) -> None:
        extras = checkpoint["extras"]
        if extras["tokenizer_fingerprint"] != self.data.tokenizer.fingerprint:
            raise ValueError(
                "--resume: the run was trained with another tokenizer than the one given now; use "
                "that one, or start a new run in another --out_dir"
            )
        restore(checkpoint, self.model, self.optimizer, keep_settings=True)
        before = from_json(RunConfig, extras["config"])
        checkpoints = self.folder.checkpoints
        self._is_comparable = is_comparable(checkpoints, self.measure, before, self.config)
        self._updates_before_step = self.optimizer.num_updates()
        self.step = checkpoint["iteration"]
        self.trained_tokens = extras["trained_tokens"]
        self.trained_before_s = extras["elapsed_s"]

    def _begin(self) -> None:
        config, resumed = self.config, self._is_resumed
        self.display = Display(self.num_steps, self.step)
        self.say = self.display.say
        self.folder.checkpoints.go_on_from(self.step)
        self.logged: list[dict[str, Any]] = []
        if resumed:
            self.logged = self.log.drop_after(self.step)
        else:
            self.log.clear()  # of a run that ended before its first checkpoint
            self.folder.save_tokenizer(self.data.tokenizer)
        self.is_spike = SpikeMark(r.get("loss_nats") for r in self.logged if r["kind"] == "train")
        self.saver = BackgroundSaver(
            self.folder.checkpoints, self.say, self.step if resumed else -1, self.log.sync
        )
        peak_flops_per_s, speed = measured_speed(self.device, config.dtype)
        self.meter = SpeedMeter(config, self.step, self.num_steps, peak_flops_per_s)
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
            peak_flops_per_s=peak_flops_per_s,
        )
        where = f"{describe(self.device)}, {config.dtype} (matrix products: {speed})"
        steps = self.step, self.num_steps
        opening = opening_line(config, "resuming" if resumed else "training", where, steps)
        self.say(f"{opening}; {self.folder.path}")
        if not self._is_comparable:
            begin_best_anew(self.folder.checkpoints, self.say)
        self.watch = Stopwatch()

    def _catch_up(self) -> None:
        """What should have followed the step that a run goes on from, and is not in its log."""
        if self.step == 0:
            return
        at_step = {r["kind"]: r for r in self.logged if r["step"] == self.step}
        is_last = self.step == self.num_steps
        with self.watch.pause():
            if "valid" in at_step and self._is_comparable:
                self.valid = at_step["valid"]
                self._keep_if_best()
            elif self._validation_is_due(is_last):
                self._validate()
            if "sample" not in at_step and self._is_due(self.config.sample_interval, is_last):
                self._sample()

    def _stop(self, stopped: Stopped) -> int:
        self._look_for_bad_steps(wait=True)
        if not self.saver.save_surely(self._save):
            return NOT_SAVED
        self.say(
            f"stopped by {stopped} after step {self.step} of {self.num_steps}: saved; the same "
            "command with --resume goes on"
        )
        self.say(plotted(self.folder.metrics, self.folder.plot))
        return stopped.exit_status

    def _rescue(self) -> None:
        """Saves what an unexpected exception has left whole, if it came between two updates."""
        if self.step == 0:
            return  # nothing is lost, and no run stands in the way of the next attempt
        if self.optimizer.num_updates() != self._updates_before_step:
            self.say(f"the exception came within an update of weights: {self.saver.kept}")
            return
        try:
            self._look_for_bad_steps(wait=True)
            if self.saver.save_surely(self._save):
                self.say(f"step {self.step} of {self.num_steps} is saved: --resume goes on from it")
        except Exception as error:  # the first one is what has to be shown
            self.say(f"step {self.step} could not be saved ({error}); {self.saver.kept}")

    def _finish(self) -> int:
        if not self.saver.save_surely(self._save):
            return NOT_SAVED
        elapsed_s = self.trained_before_s + self.watch.elapsed_s
        summary = {} if self.valid is None else {"bits_per_byte": self.valid["bits_per_byte"]}
        self.log.write("end", step=self.step, elapsed_s=elapsed_s, **summary)
        self.say(
            f"done: {self.step} steps, {self.trained_tokens:,} tokens, "
            f"{format_duration(elapsed_s)} of training"
        )
        about = self.config, self.data, self.folder, self.step, self.valid
        self.say("\n".join(closing_lines(*about)))
        return 0

    # ---- one step and what follows it ----

    def _one_step(self) -> None:
        config = self.config
        self.lr = learning_rate(self.step, self.num_steps, config.optim)
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr
        self._updates_before_step = self.optimizer.num_updates()
        seed = seed_of_step(config.seed, self.step)  # all that the step draws follows from it
        torch.manual_seed(seed)
        self.model.seed_dropout(seed)
        self.loss, self.norm = train_step(
            self.model,
            self.optimizer,
            self.batches_of_step(self.step),
            config.optim.max_norm,
            self._loss_unless_stopped,
            self.precision,
            self.sound,
        )
        self.flags.add(self.step, self.loss.isfinite() & self.norm.isfinite())
        self.step += 1
        self._updates_before_step = self.optimizer.num_updates()
        self.trained_tokens += config.tokens_per_step

    def _loss_unless_stopped(self, model: LanguageModel, x: Tensor, y: Tensor):
        self.signals.check()
        return self.loss_function(model, x, y)

    def _after_step(self, is_last: bool) -> None:
        """Saves before it validates and samples: what can fail comes after the work is safe."""
        config = self.config
        self.display.update(self.step)
        reports = self._is_due(config.log_interval, is_last) or self.step == 1
        validates = self._validation_is_due(is_last)
        samples = self._is_due(config.sample_interval, is_last)
        saves = self._is_due(config.save_interval, is_last) or validates or samples
        saves |= self.saver.has_failed and reports
        self._look_for_bad_steps(wait=reports or saves)
        if reports:
            self._report()
        with self.watch.pause():
            if saves:
                self._save()
            if validates:
                self._validate()
            if samples:
                self._sample()

    def _is_due(self, interval: int, is_last: bool) -> bool:
        return is_last or (interval > 0 and self.step % interval == 0)

    def _validation_is_due(self, is_last: bool) -> bool:
        is_first = self.config.eval_first and self.step == 1
        return is_first or self._is_due(self.config.eval_interval, is_last)

    def _report(self) -> None:
        loss, norm, elapsed_s = self.loss.item(), self.norm.item(), self.watch.elapsed_s
        speed = self.meter.look(self.step, elapsed_s)
        self.display.report(self.step, loss, self.lr, norm, speed)
        spike = {"spike": True} if math.isfinite(loss) and self.is_spike(loss) else {}
        self._record(
            "train",
            loss_nats=loss,
            lr=self.lr,
            grad_norm=norm,
            tokens_per_s=speed.tokens_per_s,
            model_flops_per_s=speed.model_flops_per_s,
            utilisation=speed.utilisation,
            elapsed_s=self.trained_before_s + elapsed_s,
            **spike,
        )

    def _look_for_bad_steps(self, wait: bool) -> None:
        """Raises: BadNumbers after a step that was not finite, where the run shall stop for it."""
        for step in self.flags.bad_steps(wait):
            path = self.folder.path / f"bad_step_{step + 1:08d}.json"
            numbers = range(step * self.config.grad_accum, (step + 1) * self.config.grad_accum)
            with suppress(OSError):  # what a full disk does not take is no reason to lose the run
                write_bad_step(
                    path,
                    step + 1,
                    self.lr,
                    self.batch,
                    numbers,
                    self.model,
                    self.loss_function,
                    self.precision,
                    seed_of_step(self.config.seed, step),
                )
            self.say(f"step {step + 1} | loss or gradient is not finite: left out; see {path}")
            self.log.write("bad_step", step=step + 1, file=path.name)
            if self.config.on_nan == "stop" or self.flags.are_too_many:
                self._stop_before(step)

    def _stop_before(self, step: int) -> None:
        """Saves the weights that the bad step found; it is yet to be made, unless it was skipped.

        Raises: BadNumbers.
        """
        if self.sound is not None:  # on CUDA, a few more were launched, with no effect
            made, self.step = self.step - step, step
            self.trained_tokens -= made * self.config.tokens_per_step
            for state in self.optimizer.state.values():
                state["step"] -= made
        self.saver.save_surely(self._save)
        raise BadNumbers(
            f"training: the loss or gradient of step {step + 1} is not finite; the weights are "
            f"those that it found; {self.saver.kept}\n"
            f"{advice(self.folder.path, self.config.on_nan)}"
        )

    def _save(self) -> None:
        """Raises: BadNumbers when the weights are not finite: they are not worth keeping."""
        if self.step == self.saver.asked_step:
            return
        if not are_finite(self.model):
            self.saver.wait()
            raise BadNumbers(
                f"training: a weight is not finite any more at step {self.step}; "
                f"{self.saver.kept}; start again with a lower --lr or --max_norm in another "
                "--out_dir"
            )
        content = checkpoint_content(
            self.model,
            self.optimizer,
            self.step,
            config=to_json(replace(self.config, **OF_ONE_CALL)),
            tokenizer_fingerprint=self.data.tokenizer.fingerprint,
            elapsed_s=self.trained_before_s + self.watch.elapsed_s,
            trained_tokens=self.trained_tokens,
        )
        self.saver.save(content)

    def _validate(self) -> None:
        result = self._evaluate(self.data.valid)
        self.valid, on_training = result.record(), ""
        if self.config.eval_train:
            self.valid["train_loss_nats"] = self._evaluate(self.data.train).loss_nats
            on_training = f" | training text {self.valid['train_loss_nats']:.4f}"
        self._record("valid", **self.valid)
        is_best = self._keep_if_best()
        self.say(
            f"step {self.step} | validation loss {result.loss_nats:.4f} | perplexity "
            f"{result.perplexity:.2f} | {result.bits_per_byte:.4f} bits/byte{on_training}"
            f"{' | best so far' if is_best else ''}"
        )

    def _evaluate(self, tokens: Tokens) -> Evaluation:
        config = self.config
        return evaluate(
            self.model,
            tokens,
            config.seq_length,
            config.batch_size,
            self.byte_lengths,
            config.eval_tokens,
            self.precision,
            self.signals.check,
        )

    def _keep_if_best(self) -> bool:
        loss, best = self.valid["loss_nats"], self.folder.checkpoints.best()
        is_best = loss is not None and math.isfinite(loss) and (best is None or loss < best.loss)
        return is_best and self.saver.save_best(self.step, loss, self.measure)

    def _sample(self) -> None:
        prompt = self.config.prompt
        text, problem = sample_text(
            self.model, self.data.tokenizer, prompt, self.config.seed, self.signals.check
        )
        if text is not None:
            self._record("sample", prompt=prompt, text=text)
        self.say(f"step {self.step} | sample: {problem or prompt + text}\n")

    def _record(self, kind: str, **values: Any) -> None:
        self.log.write(kind, step=self.step, tokens=self.trained_tokens, **values)
        self.tensorboard.write(kind, self.step, values)
