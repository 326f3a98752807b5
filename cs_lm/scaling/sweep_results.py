"""The table of a sweep: of each run its settings, its size, what it took and its loss."""

import csv
import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from cs_lm.models.stats import flops_per_token, num_parameters
from cs_lm.scaling.sweep import BUDGET, TOKENS, PlannedRun, shown_value
from cs_lm.scaling.sweep_runs import DIVERGED, DONE, SweepFolder
from cs_lm.scaling.text_table import text_table
from cs_lm.storage.atomic import atomic_write
from cs_lm.training.metrics_log import MetricsLog


class Result(NamedTuple):
    """What is known of a run.

    state   waiting, begun, done, diverged, or failed with its exit status
    flops   of training, `flops_per_token` times tokens
    loss    of the last validation [nats per token]; best: the lowest one
    epochs  passes over the training text
    """

    run: PlannedRun
    state: str
    parameters: int
    trained_tokens: int | None = None
    flops: float | None = None
    epochs: float | None = None
    loss: float | None = None
    best: float | None = None
    bits_per_byte: float | None = None
    seconds: float | None = None

    @property
    def is_done(self) -> bool:
        return self.state == "done" and self.loss is not None


_NUMBERS = Result._fields[2:]


def results_of(runs: Sequence[PlannedRun], folder: SweepFolder) -> list[Result]:
    statuses = folder.statuses()
    return [result_of(run, folder, statuses.get(run.name)) for run in runs]


def result_of(run: PlannedRun, folder: SweepFolder, status: int | None) -> Result:
    """status: the exit status of its last try, if there was one."""
    records = list(MetricsLog(folder.run(run.name).metrics).records(warn=False))
    valid = [r for r in records if r["kind"] == "valid" and r.get("loss_nats") is not None]
    train = [r for r in records if r["kind"] == "train"]
    states = {DONE: "done", DIVERGED: "diverged", None: "begun" if records else "waiting"}
    result = Result(
        run, states.get(status, f"failed with status {status}"), num_parameters(run.config.model)
    )
    if not valid:
        return result
    tokens = valid[-1]["tokens"]
    text = next((r["train_tokens"] for r in records if r.get("train_tokens")), math.nan)
    return result._replace(
        trained_tokens=tokens,
        flops=float(flops_per_token(run.config.model, run.config.seq_length) * tokens),
        epochs=round(tokens / text, 3),
        loss=valid[-1]["loss_nats"],
        best=min(r["loss_nats"] for r in valid),
        bits_per_byte=valid[-1].get("bits_per_byte"),
        seconds=next((r["elapsed_s"] for r in reversed(train) if r.get("elapsed_s")), None),
    )


def setting_names(results: Sequence[Result]) -> list[str]:
    return list(dict.fromkeys(name for one in results for name in one.run.settings))


def write_results(results: Sequence[Result], path: Path) -> None:
    """As CSV: name, state, settings, numbers; what is not known is empty."""
    settings = setting_names(results)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["run", "state", *settings, *_NUMBERS])
    for one in results:
        own = [_cell(one.run.settings.get(name)) for name in settings]
        writer.writerow(
            [one.run.name, one.state, *own, *(_cell(getattr(one, n)) for n in _NUMBERS)]
        )
    atomic_write(path, text.getvalue().encode("utf-8"))


def _cell(value: Any) -> str:
    return "" if value is None else repr(value) if type(value) is float else shown_value(value)


def ranked(results: Sequence[Result]) -> list[Result]:
    """Those that ended with a loss, the lowest one first."""
    return sorted((one for one in results if one.is_done), key=lambda one: one.loss)


def at_an_end(results: Sequence[Result]) -> list[tuple[str, str]]:
    """Numbers of the best run that are the lowest or highest of three or more that were tried."""
    done, found = ranked(results), []
    for name in setting_names(done):
        values = {
            one.run.settings.get(name) for one in done if is_number(one.run.settings.get(name))
        }
        best = done[0].run.settings.get(name)
        if len(values) >= 3 and name not in (TOKENS, BUDGET) and best in (min(values), max(values)):
            found.append((name, "lowest" if best == min(values) else "highest"))
    return found


def is_number(value: Any) -> bool:
    return type(value) in (int, float)


def table(results: Sequence[Result], at_most: int = 20) -> str:
    """The best runs and all that failed, as text."""
    settings = setting_names(results)
    best = ranked(results)
    others = [one for one in results if one.state.startswith(("failed", "diverged"))]
    head = [*settings, "parameters", "tokens", "FLOPs", "loss", "seconds", ""]
    rows = [head] + [
        [
            *(shown_value(one.run.settings.get(name, "")) for name in settings),
            f"{one.parameters:,}",
            "" if one.trained_tokens is None else f"{one.trained_tokens:,}",
            "" if one.flops is None else f"{one.flops:.3g}",
            "" if one.loss is None else f"{one.loss:.4f}",
            "" if one.seconds is None else f"{one.seconds:.0f}",
            "" if one.is_done else one.state,
        ]
        for one in [*best[:at_most], *others]
    ]
    lines = [text_table(rows)]
    if len(best) > at_most:
        lines.append(f"({len(best) - at_most} more in the file of results)")
    return "\n".join(lines)
