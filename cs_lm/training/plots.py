"""Plots of loss and perplexity as PNG files. matplotlib is an extra, imported only when needed."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from cs_lm.errors import UserError, missing_package
from cs_lm.storage.atomic import atomic_open
from cs_lm.training.metrics_log import read_metrics

Record = dict[str, Any]
AGAINST = ("step", "epoch", "tokens")
SHOWN = ("loss", "perplexity")


class _Axis(NamedTuple):
    """The lower axis: progress of the run in steps, epochs or tokens."""

    label: str
    value: Callable[[Record], float]
    tokens_each: float  # trained tokens per unit


def plotted(metrics_path: Path, png_path: Path) -> str:
    """Draws the losses; returns a line with the path or the error, which does not end the run."""
    try:
        return f"plot: {plot_losses(metrics_path, png_path)}"
    except (ValueError, OSError) as error:
        return str(error)


def plot_losses(
    metrics_path: str | Path, png_path: str | Path, against: str = "step", show: str = "loss"
) -> Path:
    """Draws training and validation losses, or perplexities, with tokens on the upper axis.

    against  one of AGAINST: the lower axis
    show     one of SHOWN; perplexities are drawn on a logarithmic axis
    Raises: UserError when matplotlib is missing or the log holds no loss yet.
    """
    records = list(read_metrics(metrics_path))
    train, valid = (_of_kind(records, kind) for kind in ("train", "valid"))
    if not train and not valid:
        raise UserError(f"plot: {str(metrics_path)!r} holds no loss yet; train some steps first")
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError(missing_package("plot", "matplotlib", "ui")) from None
    x = _axis(against, records, train + valid)
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    _draw(axes, x, show, train, valid)
    unit = "loss [nats per token]" if show == "loss" else "perplexity"
    axes.set(xlabel=x.label, ylabel=unit, title=Path(metrics_path).parent.name)
    axes.grid(alpha=0.3)
    axes.legend()
    if show == "perplexity":
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(_thousands_formatter())
        lowest, highest = axes.get_ylim()
        if highest < 10 * lowest:  # minor labels have no room beyond one decade
            axes.yaxis.set_minor_formatter(_thousands_formatter())
    if against == "tokens":
        axes.xaxis.set_major_formatter(_thousands_formatter())
    else:
        _add_tokens(axes, x.tokens_each)
    with atomic_open(png_path) as file:
        figure.savefig(file, format="png", dpi=120)
    return Path(png_path)


def _of_kind(records: list[Record], kind: str) -> list[Record]:
    return [r for r in records if r["kind"] == kind and r["loss_nats"] is not None]


def _axis(against: str, records: list[Record], points: list[Record]) -> _Axis:
    if against == "tokens":
        return _Axis("trained tokens", lambda r: r["tokens"], 1)
    if against == "step":
        per_step = next(r["tokens"] / r["step"] for r in points if r["step"])
        return _Axis("step", lambda r: r["step"], per_step)
    per_epoch = next((r["train_tokens"] for r in records if r.get("train_tokens")), None)
    if per_epoch is None:
        raise UserError("plot: the log does not say how long an epoch is; draw against step")
    return _Axis("epoch", lambda r: r["tokens"] / per_epoch, per_epoch)


def _draw(axes, x: _Axis, show: str, train: list[Record], valid: list[Record]) -> None:
    def line(records: list[Record], key: str, values: list[float] | None = None, **style) -> None:
        losses = [r[key] for r in records] if values is None else values
        heights = losses if show == "loss" else [math.exp(min(loss, 700.0)) for loss in losses]
        axes.plot([x.value(r) for r in records], heights, **style)

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
