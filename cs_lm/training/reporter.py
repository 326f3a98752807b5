"""Output of a run while it trains: terminal display, metrics log, trackers."""

import logging
import math
from collections import deque
from collections.abc import Iterable
from contextlib import ExitStack
from typing import Any

from cs_lm.config.fields import to_json
from cs_lm.config.run import RunConfig
from cs_lm.device import describe, measured_speed, versions
from cs_lm.distributed.ranks import ALONE, Ranks
from cs_lm.training.console import Display, Stopwatch, format_duration, log_to
from cs_lm.training.metrics_log import MetricsLog
from cs_lm.training.plots import plotted
from cs_lm.training.run_dir import RunFolder
from cs_lm.training.task import Task
from cs_lm.training.throughput import SpeedMeter
from cs_lm.training.trackers import Trackers, names_of

_log = logging.getLogger("cs_lm")


class LossSpikeDetector:
    """True for a loss that is more than 10 % above each of the last 20 logged losses."""

    def __init__(self, earlier: Iterable[float | None] = ()):
        self._recent = deque((loss for loss in earlier if loss is not None), maxlen=20)

    def __call__(self, loss: float) -> bool:
        highest = max(self._recent, default=math.inf)
        is_spike = loss > highest + 0.1 * abs(highest)
        self._recent.append(loss)
        return is_spike


class Reporter:
    """Sends every number and message of a run to the display, the log and the trackers.

    logged  the records of the log up to the step that the run is resumed from
    watch   stopwatch of training time; evaluations and saves do not count
    """

    def __init__(self, config: RunConfig, task: Task, folder: RunFolder, ranks: Ranks = ALONE):
        self._config, self._task, self._folder, self._ranks = config, task, folder, ranks
        self.log = MetricsLog(folder.metrics)
        self._trackers = Trackers(names_of(config), folder.path, to_json(config))
        self.logged: list[dict[str, Any]] = []
        self._elapsed_before_s = 0.0
        self._display: Display | None = None  # between `begin` and `close`
        self._entered = ExitStack()

    def begin(self, step: int, elapsed_s: float, is_resumed: bool) -> None:
        """Starts the display and the log. Log messages appear on the display until `close`.

        elapsed_s  training time before the resume [s]
        """
        config, task = self._config, self._task
        self._elapsed_before_s = elapsed_s
        self._display = Display(task.num_steps, step)
        self._entered.enter_context(log_to(self._display.write_line))
        if is_resumed:
            self.logged = self.log.discard_after(step)
        else:
            self.log.clear()  # left by a run that ended before its first checkpoint
        losses = (r.get("loss_nats") for r in self.logged if r["kind"] == "train")
        self._is_spike = LossSpikeDetector(losses)
        device = next(task.model.parameters()).device
        peak_flops_per_s, speed = measured_speed(device, config.dtype)
        shared = {}
        if self._ranks.size > 1:
            shared = {"parallel": config.parallel, "ranks": self._ranks.names}
            if peak_flops_per_s is not None:  # all ranks together
                peak_flops_per_s *= self._ranks.size
        self._meter = SpeedMeter(task, step, peak_flops_per_s)
        self.log.write(
            "resume" if is_resumed else "config",
            step=step,
            num_steps=task.num_steps,
            **task.facts(),
            config=to_json(config),
            versions=versions(),
            device=describe(device),
            peak_flops_per_s=peak_flops_per_s,
            **shared,
        )
        num_parameters = sum(p.numel() for p in task.model.parameters())
        _log.info(
            "%s: %.2f M parameters on %s%s, %s (matrix products: %s), %s ops; steps %d to %d of %s "
            "tokens; %s",
            "resuming" if is_resumed else "training",
            num_parameters / 1e6,
            describe(device),
            f" in each of {self._ranks.size} processes" if shared else "",
            config.dtype,
            speed,
            config.ops,
            step,
            task.num_steps,
            f"{task.tokens_per_step:,}",
            self._folder.path,
        )

    def start_watch(self) -> None:
        """From here on, time is time of training."""
        self.watch = Stopwatch()

    @property
    def elapsed_s(self) -> float:
        """Training time [s], including the time before a resume."""
        return self._elapsed_before_s + self.watch.elapsed_s

    def update(self, step: int) -> None:
        """Call it after each step."""
        self._display.update(step)

    def report(
        self, step: int, tokens: int, loss: float, lr: float, norm: float, more: dict[str, Any]
    ) -> None:
        """Call it every `--log_interval` steps. `more` are further numbers for the log."""
        speed = self._meter.look(step, self.watch.elapsed_s)
        self._display.report(step, loss, lr, norm, speed)
        spike = {"spike": True} if math.isfinite(loss) and self._is_spike(loss) else {}
        self.record(
            "train",
            step,
            tokens,
            loss_nats=loss,
            lr=lr,
            grad_norm=norm,
            tokens_per_s=speed.tokens_per_s,
            model_flops_per_s=speed.model_flops_per_s,
            utilisation=speed.matmul_utilisation,
            elapsed_s=self.elapsed_s,
            **spike,
            **more,
        )

    def record(self, kind: str, step: int, tokens: int, **values: Any) -> None:
        self.log.write(kind, step=step, tokens=tokens, **values)
        self._trackers.write(kind, step, values)

    def end(self, step: int, tokens: int, found: dict[str, Any] | None) -> None:
        """Writes the last record, the closing lines and the plot.

        found  result of the last evaluation
        """
        summary = self._task.summary(found) if found else {}
        self.log.write("end", step=step, elapsed_s=self.elapsed_s, **summary)
        _log.info(
            "done: %d steps, %s tokens, %s of training",
            step,
            f"{tokens:,}",
            format_duration(self.elapsed_s),
        )
        for line in self._task.closing_lines(found):
            _log.info("%s", line)
        best = "".join(
            f", the best is step {one}" for one in self._folder.checkpoints.steps("best")
        )
        _log.info("checkpoints: %s%s", self._folder.checkpoints.path(step), best)
        self.plot()
        if command := self._task.next_command(str(self._folder.path)):
            _log.info("%s", command)

    def plot(self) -> None:
        _log.info("%s", plotted(self._folder.metrics, self._folder.plot))

    def close(self) -> None:
        self._entered.close()
        if self._display is not None:
            self._display.close()
        self._trackers.close()
