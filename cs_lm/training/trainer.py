"""The training loop: steps, saves and evaluations, until the end, a stop signal or an error."""

import json
import logging
import math
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from cs_lm.config.fields import from_json
from cs_lm.config.run import RunConfig
from cs_lm.data.batches import step_seed
from cs_lm.distributed.ranks import ALONE, RankLostError, Ranks
from cs_lm.distributed.sharing import Sharing
from cs_lm.errors import UserError
from cs_lm.optim.param_groups import set_learning_rate
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
from cs_lm.training.other_ranks import NoReporter, NoSaver
from cs_lm.training.reporter import Reporter
from cs_lm.training.run_dir import RunFolder
from cs_lm.training.sharded_checkpoint import part_of
from cs_lm.training.signals import StopRequested, StopSignals
from cs_lm.training.state import TrainState
from cs_lm.training.step import train_step
from cs_lm.training.task import Task

# After an error: how long to wait for the device, which may hang after a lost rank [s].
_DEVICE_WAIT_S = 60.0
# How long a rank waits for its saver before it tells the others that it is there [s].
_SAVING_WAIT_S = 1.0
NOT_SAVED = 4  # exit status: the last step could not be saved
_log = logging.getLogger("cs_lm")


class RanksDifferError(UserError):
    """The weights or moments are not the same on all ranks; nobody knows which are right."""


class Trainer:
    """Trains a task, from the first step or from a checkpoint.

    checkpoint  content from `RunFolder.read`, to resume
    weights     state dict with the initial weights of a new run
    ranks       the processes that share each update; rank 0 logs and saves
    Raises: UserError for a checkpoint that does not fit the task.
    """

    def __init__(
        self,
        config: RunConfig,
        task: Task,
        folder: RunFolder,
        checkpoint: dict[str, Any] | None = None,
        weights: dict[str, Tensor] | None = None,
        ranks: Ranks = ALONE,
    ):
        self.config, self.task, self.folder, self.ranks = config, task, folder, ranks
        self.sharing = task.sharing or Sharing.alone(task.model, task.optimizer)
        self.state = TrainState(task.saved_model, task.optimizer, self.sharing)
        self.signals = StopSignals(ranks.max if ranks.size > 1 else None)
        self.monitor = NonFiniteMonitor()
        device = next(task.model.parameters()).device
        stops = config.on_nan == "stop"
        self._all_finite = torch.ones((), dtype=torch.bool, device=device) if stops else None
        folder.checkpoints.keep_last = config.keep_last
        self.reporter = Reporter(config, task, folder, ranks) if ranks.is_first else NoReporter()
        self.saver: BackgroundSaver | NoSaver | None = None  # while it trains
        self.valid: dict[str, Any] | None = None  # result of the last evaluation
        self._is_comparable = True  # whether new losses compare with the best one
        self._is_resumed = checkpoint is not None
        if checkpoint is not None:
            self._load(checkpoint)
        elif weights is not None:
            self._begin_with(weights)
        self.sharing.begin()

    def _begin_with(self, weights: dict[str, Tensor]) -> None:
        if self.ranks.size > 1:
            for name, part in self.sharing.held().items():
                part.tensor.copy_(part_of(weights[name], part))
        else:
            restore({"model": weights}, self.task.saved_model)

    def _load(self, checkpoint: dict[str, Any]) -> None:
        extras = checkpoint["extras"]
        self.task.load(extras)
        self.state.load(checkpoint)
        before = from_json(RunConfig, extras["config"])
        checkpoints = self.folder.checkpoints
        self._is_comparable = is_comparable(checkpoints, self.task.measure, before, self.config)

    @property
    def num_steps(self) -> int:
        return self.task.num_steps

    @property
    def step(self) -> int:
        """Number of updates so far."""
        return self.state.step

    @property
    def has_ended(self) -> bool:
        """Whether nothing is left to do: the last step is done and logged as "end", or exceeded."""
        is_done = self.step == self.num_steps and self.num_steps in self.folder.ends()
        return is_done or self.step > self.num_steps

    # ---- the loop ----

    def fit(self) -> int:
        """Trains to the last step or to a stop signal; returns the exit status for the process.

        Raises: NonFiniteError when a loss, gradient or weight is not finite and the run cannot
        continue, RankLostError when another process has ended.
        """
        with self.signals:
            try:
                self._begin()
                return self._train()
            except RankLostError:
                if self.saver is not None and self.sharing.saves_parts:
                    self.saver.abandon()
                raise
            finally:
                if self.saver is not None:
                    self.saver.wait()
                self.reporter.close()

    def _begin(self) -> None:
        if not self.sharing.can_generate:
            _log.info("no samples: the model cannot write while its layers are shared")
        by_all = self.ranks.branch() if self.sharing.saves_parts else None
        resumed = self._is_resumed
        if not self.ranks.is_first:
            self.saver = NoSaver()
            if by_all is not None:
                saved = self.step if resumed else -1
                self.saver = BackgroundSaver(self.folder.checkpoints, saved, ranks=by_all)
            return
        self.folder.checkpoints.discard_after(self.step)
        self.reporter.begin(self.step, self.state.elapsed_s, resumed)
        if not resumed:
            self.task.start(self.folder)
        self.saver = BackgroundSaver(
            self.folder.checkpoints, self.step if resumed else -1, self.reporter.log.sync, by_all
        )
        if not self._is_comparable:
            start_best_anew(self.folder.checkpoints)
        self.reporter.start_watch()

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
        except (NonFiniteError, RanksDifferError):
            raise  # what is saved already is better than the state now
        except Exception:
            self._rescue()
            raise

    def _one_step(self) -> None:
        config, state = self.config, self.state
        self.lr = learning_rate(state.step, self.num_steps, config.optim)
        set_learning_rate(state.optimizer, self.lr)
        state.begin_update()
        self._seed(state.step)
        self.loss, self.norm = train_step(
            self.task.model,
            state.optimizer,
            self.task.batches_of_step(state.step),
            config.optim.max_norm,
            self._loss_unless_stopped,
            self._all_finite,
            self.task.clipped_apart,
            self.sharing,
        )
        self.monitor.add(state.step, self.loss.isfinite() & self.norm.isfinite())
        state.end_update(self.task.tokens_per_step)

    def _seed(self, step: int) -> None:
        """Seeds all random numbers of the step from the run's seed and the step's number."""
        seed = step_seed(self.config.seed, step)
        torch.manual_seed(seed)
        if hasattr(self.task.model, "seed_dropout"):
            self.task.model.seed_dropout(seed)

    def _loss_unless_stopped(self, model: torch.nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
        self.signals.check_alone()
        return self.task.loss(model, batch)

    def _after_step(self, is_last: bool) -> None:
        """Logs and saves, then evaluates and samples: these may fail, so the save comes first."""
        config = self.config
        records = self.task.after_step(self.step)
        for kind, values in records:
            self._record(kind, **values)
        self.reporter.update(self.step)
        reports = self._is_due(config.log_interval, is_last) or self.step == 1
        evaluates = self._evaluation_is_due(is_last)
        samples = self._is_due(config.sample_interval, is_last)
        saves = self._is_due(config.save_interval, is_last) or evaluates or samples
        waits = reports or saves or bool(records)
        saves |= reports and bool(self.ranks.max(self.saver.has_failed))
        if waits or self.ranks.size == 1:  # several ranks must find a bad step at the same time
            self._look_for_bad_steps(math.inf if waits else 0.0)
        if reports:
            loss, norm = self.loss.item(), self.norm.item()
            lost = self._lost_to_ranks()
            self.reporter.report(self.step, self.state.trained_tokens, loss, self.lr, norm, lost)
        with self.reporter.watch.pause():
            checks = self._is_due(config.check_interval, is_last) or self.step == 1
            if checks and config.check_interval:
                self._compare_ranks()
            if saves:
                self._wait_for_savers()
                self._save()
            if evaluates:
                self._evaluate()
            if samples:
                self._sample()

    def _is_any(self, own: bool) -> bool:
        """Whether it is so at this process or, where all save together, at another one."""
        return bool(self.ranks.max(own)) if self.sharing.saves_parts else own

    def _wait_for_savers(self) -> None:
        """Until no rank is saving an earlier step: all wait, so that nobody is taken for lost."""
        while self.ranks.max(self.saver.is_saving(_SAVING_WAIT_S)):
            pass

    def _lost_to_ranks(self) -> dict[str, Any]:
        """Of the steps since the last call: seconds that a rank waited, on average.

        The slowest rank waits least: what it waits is communication, the rest is lost to it.
        """
        if self.ranks.size == 1:
            return {}
        waits = [float(text) for text in self.ranks.texts(repr(self.sharing.take_waited_s()))]
        least = min(waits)
        return {
            "communication_s": least,
            "slowest_rank_s": sum(waits) / len(waits) - least,
            "slowest_rank": waits.index(least),
        }

    def _compare_ranks(self) -> None:
        """Raises: RanksDifferError if weights or moments are not the same bits on all ranks."""
        found = [json.loads(t) for t in self.ranks.texts(json.dumps(self.sharing.differences()))]
        if names := sorted({name for of_rank in found for name in of_rank}):
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise RanksDifferError(
                f"training: after step {self.step}, the ranks differ in {names[0]}{more}, which "
                f"must be equal on all {self.ranks.size}: a processor or its memory is "
                "faulty, or the ranks do not run the same program; this step is not saved; "
                f"{self.saver.kept}: resume from it, or from an older one with --resume_step"
            )

    def _is_due(self, interval: int, is_last: bool) -> bool:
        return is_last or (interval > 0 and self.step % interval == 0)

    def _evaluation_is_due(self, is_last: bool) -> bool:
        if self.task.measure is None:
            return False
        is_first = self.config.eval_first and self.step == 1
        return is_first or self._is_due(self.config.eval_interval, is_last)

    def _run_missed_evaluations(self) -> None:
        """Evaluates and samples at the resumed step, if that was due and the log lacks it."""
        if self.step == 0:
            return
        at_step = {r["kind"]: r for r in self.reporter.logged if r["step"] == self.step}
        at_step = json.loads(self.ranks.from_first(json.dumps(at_step)))
        is_last = self.step == self.num_steps
        with self.reporter.watch.pause():
            if "valid" in at_step and self._is_comparable:
                self.valid = at_step["valid"]
                self._keep_if_best()
            elif self._evaluation_is_due(is_last):
                self._evaluate()
            if "sample" not in at_step and self._is_due(self.config.sample_interval, is_last):
                self._sample()

    # ---- after a step ----

    def _save(self) -> None:
        """Saves this step once. Raises: NonFiniteError for weights that are not finite."""
        if self.step == self.saver.asked_step:
            return
        if self._is_any(not are_finite(self.sharing.parameters().values())):
            self.saver.wait()
            raise NonFiniteError(
                f"training: a weight is not finite any more at step {self.step}; "
                f"{self.saver.kept}; start again with a lower --lr or --max_norm in another "
                "--out_dir"
            )
        elapsed_s = self.reporter.elapsed_s
        self.saver.save(self.state.content(self.config, elapsed_s, **self.task.save()))

    def _evaluate(self) -> None:
        with self.sharing.computing():
            self.valid = self.task.evaluate(self.signals.check)
        self._record("valid", **self.valid)
        best = " | best so far" if self._keep_if_best() else ""
        _log.info("step %d | %s%s", self.step, self.task.describe_evaluation(self.valid), best)

    def _keep_if_best(self) -> bool:
        if not self.ranks.is_first:
            return False
        loss, measure = self.task.selected_by(self.valid), self.task.measure
        is_best = loss is not None and self.folder.checkpoints.is_better(loss, measure)
        if is_best:
            self.saver.save_best(self.step, loss, measure)
        return is_best

    def _sample(self) -> None:
        is_needed = self.ranks.is_first or self.sharing.computes_together
        if not is_needed or not self.sharing.can_generate:
            return
        with self.sharing.computing():
            record, shown = self.task.sample(self.signals.check_alone)
        if record is not None:
            self._record("sample", **record)
        if shown:
            _log.info("step %d | sample: %s\n", self.step, shown)

    def _record(self, kind: str, **values: Any) -> None:
        self.reporter.record(kind, self.step, self.state.trained_tokens, **values)

    # ---- end of the run ----

    def _finish(self) -> int:
        if not self.saver.save_surely(self._save):
            return NOT_SAVED
        self.reporter.end(self.step, self.state.trained_tokens, self.valid)
        return 0

    def _stop(self, stop: StopRequested) -> int:
        self._look_for_bad_steps(math.inf)
        if not self.saver.save_surely(self._save):
            return NOT_SAVED
        _log.info(
            "stopped by %s after step %d of %d: saved; run the same command with --resume "
            "to continue",
            stop,
            self.step,
            self.num_steps,
        )
        self.reporter.plot()
        return stop.exit_status

    def _rescue(self) -> None:
        """Saves the state after an unexpected exception, unless an update is incomplete."""
        if self.step == 0:
            return  # no work to lose; without a checkpoint, the same command works again
        if self.sharing.saves_parts:  # without the others, there is only a part
            self.saver.abandon()
            _log.error("the ranks save together, so this step is not saved; %s", self.saver.kept)
            return
        self.saver.wait()  # what is kept is known only when no save runs
        if self.state.is_within_update:
            _log.error(
                "the exception interrupted an update, so the weights are not saved: %s",
                self.saver.kept,
            )
            return
        try:
            self._look_for_bad_steps(_DEVICE_WAIT_S)
            if self.saver.save_surely(self._save):
                _log.info(
                    "step %d of %d is saved: --resume goes on from it", self.step, self.num_steps
                )
        except Exception as error:  # it must not hide the first one
            _log.error("step %d could not be saved (%s); %s", self.step, error, self.saver.kept)

    # ---- steps that are not finite ----

    def _look_for_bad_steps(self, wait_s: float) -> None:
        """Reports steps that were not finite. Raises: NonFiniteError if the run has to stop."""
        for step in self.monitor.bad_steps(wait_s):
            whose = "" if self.ranks.is_first else f"_rank{self.ranks.rank}"
            path = self.folder.path / f"bad_step_{step + 1:08d}{whose}.json"
            with suppress(OSError):  # a full disk must not end the run
                self._seed(step)
                write_bad_step(path, step, self.lr, self.task, self.sharing)
            _log.warning(
                "step %d | loss or gradient is not finite: the step is skipped; details in %s",
                step + 1,
                path,
            )
            self.reporter.log.write("bad_step", step=step + 1, file=path.name)
            if self.config.on_nan == "stop" or self.monitor.are_too_many:
                self._stop_before(step)

    def _stop_before(self, step: int) -> None:
        """Saves the weights from before the bad step. A resume repeats it, unless it was skipped.

        Raises: NonFiniteError, always.
        """
        if self._all_finite is not None:  # on CUDA, later steps were launched, without effect
            self.state.rewind(step, self.task.tokens_per_step)
        self.saver.save_surely(self._save)
        raise NonFiniteError(
            f"training: the loss or gradient of step {step + 1} is not finite; the saved "
            f"weights are those from before it; {self.saver.kept}\n"
            f"{advice(self.folder.path, self.config.on_nan, self.task.program)}"
        )
