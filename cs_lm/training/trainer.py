"""The training loop: steps, and what follows them, until the end, a stop signal or a fault."""

import logging
import math
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from cs_lm.config.fields import from_json
from cs_lm.config.run import RunConfig
from cs_lm.data.batches import step_seed
from cs_lm.optim.schedule import learning_rate
from cs_lm.training.async_checkpoint import BackgroundSaver
from cs_lm.training.best_measure import is_comparable, start_best_anew
from cs_lm.training.checkpoint import restore
from cs_lm.training.nonfinite import (
    NonFiniteError,
    NonFiniteMonitor,
    advice,
    are_finite,
    write_bad_step,
)
from cs_lm.training.reporter import Reporter
from cs_lm.training.run_dir import RunFolder
from cs_lm.training.signals import StopRequested, StopSignals
from cs_lm.training.state import TrainState
from cs_lm.training.step import train_step
from cs_lm.training.task import Task

NOT_SAVED = 4  # exit status
_log = logging.getLogger("cs_lm")


class Trainer:
    """Trains a task, from the first step or from a checkpoint.

    checkpoint  what `RunFolder.read` gave, to resume
    weights     to begin a new run with
    Raises: UserError for a checkpoint of something else.
    """

    def __init__(
        self,
        config: RunConfig,
        task: Task,
        folder: RunFolder,
        checkpoint: dict[str, Any] | None = None,
        weights: dict[str, Tensor] | None = None,
    ):
        self.config, self.task, self.folder = config, task, folder
        self.state = TrainState(task.model, task.optimizer)
        self.num_steps = task.num_steps
        self.signals = StopSignals()
        self.monitor = NonFiniteMonitor()
        device = next(task.model.parameters()).device
        stops = config.on_nan == "stop"
        self._all_finite = torch.ones((), dtype=torch.bool, device=device) if stops else None
        folder.checkpoints.keep_last = config.keep_last
        self.reporter = Reporter(config, task, folder)
        self.valid: dict[str, Any] | None = None  # what the last evaluation found
        self._is_comparable = True  # the best loss so far, with those to come
        self._is_resumed = checkpoint is not None
        if checkpoint is not None:
            self._load(checkpoint)
        elif weights is not None:
            restore({"model": weights}, task.model)

    def _load(self, checkpoint: dict[str, Any]) -> None:
        extras = checkpoint["extras"]
        self.task.load(extras)
        self.state.load(checkpoint)
        before = from_json(RunConfig, extras["config"])
        checkpoints = self.folder.checkpoints
        self._is_comparable = is_comparable(checkpoints, self.task.measure, before, self.config)

    @property
    def step(self) -> int:
        """Updates so far."""
        return self.state.step

    @property
    def has_ended(self) -> bool:
        """Whether there is nothing left to do, not even what follows the last step."""
        return self.step > self.num_steps or self.step == self.num_steps in self.folder.ends()

    # ---- the loop ----

    def fit(self) -> int:
        """Trains to the last step or to a stop signal; returns the exit status for the process.

        Raises: NonFiniteError when a loss, gradient or weight is not finite and the run cannot
        go on.
        """
        self._begin()
        with self.signals:
            try:
                return self._train()
            finally:
                self.saver.wait()
                self.reporter.close()

    def _begin(self) -> None:
        resumed = self._is_resumed
        self.folder.checkpoints.discard_after(self.step)
        self.reporter.begin(self.step, self.state.elapsed_s, resumed)
        if not resumed:
            self.task.start(self.folder)
        self.saver = BackgroundSaver(
            self.folder.checkpoints, self.step if resumed else -1, self.reporter.log.sync
        )
        if not self._is_comparable:
            start_best_anew(self.folder.checkpoints)

    def _train(self) -> int:
        try:
            self._run_missed_evaluations()
            while self.step < self.num_steps:
                self._one_step()
                self._after_step(is_last=self.step == self.num_steps)
                self.signals.check()
            return self._finish()
        except StopRequested as stop:
            return self._stop(stop)
        except NonFiniteError:
            raise
        except Exception:
            self._rescue()
            raise

    def _one_step(self) -> None:
        config, state = self.config, self.state
        self.lr = learning_rate(state.step, self.num_steps, config.optim)
        for group in state.optimizer.param_groups:
            group["lr"] = self.lr
        state.begin_update()
        self._seed(state.step)
        self.loss, self.norm = train_step(
            state.model,
            state.optimizer,
            self.task.batches_of_step(state.step),
            config.optim.max_norm,
            self._loss_unless_stopped,
            self._all_finite,
        )
        self.monitor.add(state.step, self.loss.isfinite() & self.norm.isfinite())
        state.end_update(self.task.tokens_per_step)

    def _seed(self, step: int) -> None:
        """All that the step draws follows from the seed and its number."""
        seed = step_seed(self.config.seed, step)
        torch.manual_seed(seed)
        if hasattr(self.task.model, "seed_dropout"):
            self.task.model.seed_dropout(seed)

    def _loss_unless_stopped(self, model: torch.nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
        self.signals.check()
        return self.task.loss(model, batch)

    def _after_step(self, is_last: bool) -> None:
        """Saves before it validates and samples: what can fail comes after the work is safe."""
        config = self.config
        self.reporter.update(self.step)
        reports = self._is_due(config.log_interval, is_last) or self.step == 1
        evaluates = self._evaluation_is_due(is_last)
        samples = self._is_due(config.sample_interval, is_last)
        saves = self._is_due(config.save_interval, is_last) or evaluates or samples
        saves |= self.saver.has_failed and reports
        self._look_for_bad_steps(wait=reports or saves)
        if reports:
            loss, norm = self.loss.item(), self.norm.item()
            self.reporter.report(self.step, self.state.trained_tokens, loss, self.lr, norm)
        with self.reporter.watch.pause():
            if saves:
                self._save()
            if evaluates:
                self._evaluate()
            if samples:
                self._sample()

    def _is_due(self, interval: int, is_last: bool) -> bool:
        return is_last or (interval > 0 and self.step % interval == 0)

    def _evaluation_is_due(self, is_last: bool) -> bool:
        if self.task.measure is None:
            return False
        is_first = self.config.eval_first and self.step == 1
        return is_first or self._is_due(self.config.eval_interval, is_last)

    def _run_missed_evaluations(self) -> None:
        """What should have followed the step that a run is resumed from, and is not in its log."""
        if self.step == 0:
            return
        at_step = {r["kind"]: r for r in self.reporter.logged if r["step"] == self.step}
        is_last = self.step == self.num_steps
        with self.reporter.watch.pause():
            if "valid" in at_step and self._is_comparable:
                self.valid = at_step["valid"]
                self._keep_if_best()
            elif self._evaluation_is_due(is_last):
                self._evaluate()
            if "sample" not in at_step and self._is_due(self.config.sample_interval, is_last):
                self._sample()

    # ---- what follows a step ----

    def _save(self) -> None:
        """Raises: NonFiniteError when the weights are not finite: they are not worth keeping."""
        if self.step == self.saver.asked_step:
            return
        if not are_finite(self.task.model):
            self.saver.wait()
            raise NonFiniteError(
                f"training: a weight is not finite any more at step {self.step}; "
                f"{self.saver.kept}; start again with a lower --lr or --max_norm in another "
                "--out_dir"
            )
        elapsed_s = self.reporter.elapsed_s
        self.saver.save(self.state.content(self.config, elapsed_s, **self.task.save()))

    def _evaluate(self) -> None:
        self.valid = self.task.evaluate(self.signals.check)
        self._record("valid", **self.valid)
        best = " | best so far" if self._keep_if_best() else ""
        _log.info("step %d | %s%s", self.step, self.task.describe_evaluation(self.valid), best)

    def _keep_if_best(self) -> bool:
        loss, best = self.valid["loss_nats"], self.folder.checkpoints.best()
        is_best = loss is not None and math.isfinite(loss) and (best is None or loss < best.loss)
        return is_best and self.saver.save_best(self.step, loss, self.task.measure)

    def _sample(self) -> None:
        record, shown = self.task.sample(self.signals.check)
        if record is not None:
            self._record("sample", **record)
        if shown:
            _log.info("step %d | sample: %s\n", self.step, shown)

    def _record(self, kind: str, **values: Any) -> None:
        self.reporter.record(kind, self.step, self.state.trained_tokens, **values)

    # ---- ends ----

    def _finish(self) -> int:
        if not self.saver.save_surely(self._save):
            return NOT_SAVED
        self.reporter.end(self.step, self.state.trained_tokens, self.valid)
        return 0

    def _stop(self, stop: StopRequested) -> int:
        self._look_for_bad_steps(wait=True)
        if not self.saver.save_surely(self._save):
            return NOT_SAVED
        _log.info(
            "stopped by %s after step %d of %d: saved; the same command with --resume goes on",
            stop,
            self.step,
            self.num_steps,
        )
        self.reporter.plot()
        return stop.exit_status

    def _rescue(self) -> None:
        """Saves what an unexpected exception has left whole, if it came between two updates."""
        if self.step == 0:
            return  # nothing is lost, and no run stands in the way of the next attempt
        if self.state.is_within_update:
            _log.error("the exception came within an update of weights: %s", self.saver.kept)
            return
        try:
            self._look_for_bad_steps(wait=True)
            if self.saver.save_surely(self._save):
                _log.info(
                    "step %d of %d is saved: --resume goes on from it", self.step, self.num_steps
                )
        except Exception as error:  # the first one is what has to be shown
            _log.error("step %d could not be saved (%s); %s", self.step, error, self.saver.kept)

    # ---- steps that are not finite ----

    def _look_for_bad_steps(self, wait: bool) -> None:
        """Raises: NonFiniteError after a step that was not finite, where the run has to stop."""
        for step in self.monitor.bad_steps(wait):
            path = self.folder.path / f"bad_step_{step + 1:08d}.json"
            with suppress(OSError):  # what a full disk does not take is no reason to lose the run
                self._seed(step)
                write_bad_step(path, step, self.lr, self.task)
            _log.warning(
                "step %d | loss or gradient is not finite: left out; see %s", step + 1, path
            )
            self.reporter.log.write("bad_step", step=step + 1, file=path.name)
            if self.config.on_nan == "stop" or self.monitor.are_too_many:
                self._stop_before(step)

    def _stop_before(self, step: int) -> None:
        """Saves the weights that the bad step found; it is yet to be made, unless it was skipped.

        Raises: NonFiniteError.
        """
        if self._all_finite is not None:  # on CUDA, a few more were launched, with no effect
            self.state.rewind(step, self.task.tokens_per_step)
        self.saver.save_surely(self._save)
        raise NonFiniteError(
            f"training: the loss or gradient of step {step + 1} is not finite; the weights are "
            f"those that it found; {self.saver.kept}\n"
            f"{advice(self.folder.path, self.config.on_nan)}"
        )
