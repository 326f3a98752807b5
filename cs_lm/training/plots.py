"""Plots of one or several runs as PNG or SVG. matplotlib is an extra, imported only when needed."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from cs_lm.errors import UserError
from cs_lm.training.figures import figure_of, save
from cs_lm.training.metrics_log import read_metrics

Record = dict[str, Any]
AGAINST = ("step", "epoch", "tokens", "flops", "time")
SHOWN = ("loss", "perplexity", "lr", "grad_norm", "throughput")
_OF_TRAINING = {  # what is shown -> its key in the log, and the label of the axis
    "lr": ("lr", "learning rate"),
    "grad_norm": ("grad_norm", "gradient norm"),
    "throughput": ("tokens_per_s", "tokens per second"),
}


class _Axis(NamedTuple):
    """The lower axis: progress of a run in steps, epochs, tokens, FLOPs or seconds."""

    label: str
    value: Callable[[Record], float]
    tokens_each: float | None = None  # trained tokens per unit, where that is one number


class _Run(NamedTuple):
    name: str
    records: list[Record]

    def of_kind(self, kind: str) -> list[Record]:
        return [r for r in self.records if r["kind"] == kind and r["loss_nats"] is not None]


def plotted(metrics_path: Path, path: Path) -> str:
    """Draws the losses; returns a line with the path or the error, which does not end the run."""
    try:
        return f"plot: {plot_runs([metrics_path], path)}"
    except (ValueError, OSError) as error:
        return str(error)


def plot_runs(
    metrics_paths: Sequence[str | Path],
    path: str | Path,
    against: str = "step",
    show: str = "loss",
) -> Path:
    """Draws the runs of the metrics logs; the ending of the path, .png or .svg, is the format.

    against  one of AGAINST: the lower axis. FLOPs are those of the model: tokens times the
             operations that a token takes in forward and backward
    show     one of SHOWN; perplexities are drawn on a logarithmic axis. Losses are those of
             training (thin) and validation (with markers)
    Raises: UserError when matplotlib is missing, or a log holds no loss yet.
    """
    runs = [_Run(Path(p).parent.name, list(read_metrics(p))) for p in metrics_paths]
    for run, given in zip(runs, metrics_paths):
        if not run.of_kind("train") and not run.of_kind("valid"):
            raise UserError(f"plot: {str(given)!r} holds no loss yet; train some steps first")
    figure, axes = figure_of()
    longest_s = max(
        (r["elapsed_s"] for run in runs for r in run.of_kind("train") if r.get("elapsed_s")),
        default=0.0,
    )
    places = [_axis(against, run, longest_s) for run in runs]
    for number, (run, place) in enumerate(zip(runs, places)):
        if show in _OF_TRAINING:
            _draw_training(axes, place, show, run)
        elif len(runs) == 1:
            _draw_losses(axes, place, show, run)
        else:
            _draw_compared(axes, place, show, run, f"C{number}")
    title = runs[0].name if len(runs) == 1 else f"{len(runs)} runs"
    axes.set(xlabel=places[0].label, ylabel=_label(show), title=title)
    if show not in _OF_TRAINING or len(runs) > 1:
        axes.legend()
    _format_axes(axes, against, show)
    if len(runs) == 1 and places[0].tokens_each is not None:
        _add_tokens(axes, places[0].tokens_each)
    return save(figure, Path(path))


def _label(show: str) -> str:
    if show in _OF_TRAINING:
        return _OF_TRAINING[show][1]
    return "loss [nats per token]" if show == "loss" else "perplexity"


def _format_axes(axes, against: str, show: str) -> None:
    if show == "perplexity":
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(_thousands_formatter())
        lowest, highest = axes.get_ylim()
        if highest < 10 * lowest:  # minor labels have no room beyond one decade
            axes.yaxis.set_minor_formatter(_thousands_formatter())
    if show == "throughput":
        axes.yaxis.set_major_formatter(_thousands_formatter())
        axes.set_ylim(bottom=0)
    if against in ("tokens", "flops"):
        axes.xaxis.set_major_formatter(_thousands_formatter())


def _axis(against: str, run: _Run, longest_s: float) -> _Axis:
    """longest_s  training time of the longest run in the plot, which sets the unit [s]"""
    points = run.of_kind("train") + run.of_kind("valid")
    if against == "tokens":
        return _Axis("trained tokens", lambda r: r["tokens"])
    if against == "step":
        per_step = next((r["tokens"] / r["step"] for r in points if r["step"]), None)
        return _Axis("step", lambda r: r["step"], per_step)
    if against == "epoch":
        each = next((r["train_tokens"] for r in run.records if r.get("train_tokens")), None)
        if each is None:
            raise UserError("plot: the log does not say how long an epoch is; draw against step")
        return _Axis("epoch", lambda r: r["tokens"] / each, each)
    timed = [r for r in run.of_kind("train") if r.get("elapsed_s") and r.get("tokens_per_s")]
    if not timed:
        raise UserError(f"plot: the log of {run.name!r} has no times; draw against step")
    if against == "flops":
        per_token = timed[-1]["model_flops_per_s"] / timed[-1]["tokens_per_s"]
        return _Axis("training FLOPs", lambda r: r["tokens"] * per_token)
    # an evaluation happens at the time of its step
    steps, seconds = [0, *(r["step"] for r in timed)], [0.0, *(r["elapsed_s"] for r in timed)]
    units = {"s": 1, "min": 60, "h": 3600}
    label = next((name for name, unit in units.items() if longest_s < 120 * unit), "h")
    unit = units[label]
    return _Axis(
        f"training time [{label}]", lambda r: float(np.interp(r["step"], steps, seconds)) / unit
    )


def _heights(losses: Sequence[float], show: str) -> list[float]:
    return list(losses) if show == "loss" else [math.exp(min(loss, 700.0)) for loss in losses]


def _draw_training(axes, x: _Axis, show: str, run: _Run) -> None:
    key = _OF_TRAINING[show][0]
    records = [r for r in run.of_kind("train") if r.get(key) is not None]
    axes.plot([x.value(r) for r in records], [r[key] for r in records], lw=1, label=run.name)


def _draw_compared(axes, x: _Axis, show: str, run: _Run, color: str) -> None:
    """Training thin and smoothed, validation with markers; the label has the best one."""
    train, valid = run.of_kind("train"), run.of_kind("valid")
    losses = _smoothed([r["loss_nats"] for r in train])
    label = run.name
    if valid:
        best = _heights([min(r["loss_nats"] for r in valid)], show)[0]
        label += f" (best validation {best:.4g})"
        heights = _heights([r["loss_nats"] for r in valid], show)
        axes.plot([x.value(r) for r in valid], heights, marker="o", ms=4, color=color, label=label)
    style = {"lw": 0.8, "alpha": 0.5} if valid else {"label": label}
    axes.plot([x.value(r) for r in train], _heights(losses, show), color=color, **style)


def _draw_losses(axes, x: _Axis, show: str, run: _Run) -> None:
    train, valid = run.of_kind("train"), run.of_kind("valid")

    def line(records: list[Record], key: str, values: list[float] | None = None, **style) -> None:
        losses = [r[key] for r in records] if values is None else values
        axes.plot([x.value(r) for r in records], _heights(losses, show), **style)

    line(train, "loss_nats", lw=0.8, alpha=0.5, label="train")
    if len(train) >= 20:
        smoothed = _smoothed([r["loss_nats"] for r in train])
        line(train, "loss_nats", smoothed, color="C0", label="train, smoothed")
    if on_train := [r for r in valid if r.get("train_loss_nats") is not None]:
        line(
            on_train,
            "train_loss_nats",
            marker="s",
            color="C2",
            ms=4,
            label="training text",
        )
    if valid:
        last = valid[-1]
        last_loss = f"{last['loss_nats']:.3f} nats"
        if show == "perplexity":
            last_loss = f"{math.exp(min(last['loss_nats'], 700.0)):.1f}"
        if "bits_per_byte" in last:  # only for tasks that score a text
            last_loss += f", {last['bits_per_byte']:.3f} bits/byte"
        label = f"validation (last: {last_loss})"
        line(valid, "loss_nats", marker="o", color="C1", ms=4, label=label)


def _add_tokens(axes, tokens_each: float) -> None:
    upper = axes.secondary_xaxis(
        "top", functions=(lambda at: at * tokens_each, lambda tokens: tokens / tokens_each)
    )
    upper.set_xlabel("trained tokens")
    upper.xaxis.set_major_formatter(_thousands_formatter())


def _smoothed(values: list[float]) -> list[float]:
    """Mean over a window around each value; the window is narrower at both ends."""
    reach = max(1, len(values) // 50)
    around = [values[max(0, i - reach) : i + reach + 1] for i in range(len(values))]
    return [sum(window) / len(window) for window in around]


def _thousands_formatter():
    from matplotlib.ticker import EngFormatter

    return EngFormatter(sep="")
