"""Plots of a fitted scaling law: equal compute, the frontier, and fitted against measured."""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from cs_lm.scaling.fits import IsoflopFit, ParametricFit, budgets_of
from cs_lm.scaling.points import Point
from cs_lm.training.figures import figure_of, save

_BAND = 0.15  # opacity of an interval


def plot_isoflop(points: Sequence[Point], fit: IsoflopFit, path: Path) -> Path:
    """The runs of each budget, their parabola and its minimum."""
    figure, axes = figure_of()
    budgets = {flops: own for flops, own in budgets_of(points).items() if flops in fit.parabolas}
    for number, (flops, own) in enumerate(budgets.items()):
        color = f"C{number % 10}"
        own = sorted(own)
        sizes = np.geomspace(own[0].size, own[-1].size, 100)
        axes.plot(sizes, np.polyval(fit.parabolas[flops], np.log(sizes)), color=color, lw=1)
        label = f"{flops:.2g} FLOPs"
        axes.plot([p.size for p in own], [p.loss for p in own], "o", ms=4, color=color, label=label)
    inside = [one for one in fit.minima if one.is_inside]
    axes.plot([m.size for m in inside], [m.loss for m in inside], "k*", ms=9, label="minimum")
    axes.set_xscale("log")
    axes.set(xlabel="size N", ylabel="loss [nats per token]", title="runs of equal compute")
    axes.legend(fontsize="small", ncols=2)
    return save(figure, path)


def plot_frontier(
    points: Sequence[Point],
    isoflop: IsoflopFit | None,
    parametric: ParametricFit,
    predicted: Sequence[float],
    path: Path,
) -> Path:
    """Best size and its loss against compute, as far as the predictions, with their intervals."""
    figure, (left, right) = figure_of(width=12, columns=2)
    lowest = min(one.flops for one in points)
    highest = max([one.flops for one in points] + [2 * flops for flops in predicted])
    compute = np.geomspace(lowest, highest, 60)
    best = [parametric.optimum(flops) for flops in compute]
    _band(left, compute, [size for _, size, _ in best], "C0", "parametric law")
    _band(right, compute, [loss for _, _, loss in best], "C0", "parametric law")
    right.plot([p.flops for p in points], [p.loss for p in points], ".", color="0.6", label="runs")
    if isoflop is not None:
        _band(left, compute, [isoflop.size(flops) for flops in compute], "C1", "equal compute")
        _band(right, compute, [isoflop.loss(flops) for flops in compute], "C1", "equal compute")
        inside = [one for one in isoflop.minima if one.is_inside]
        left.plot([m.flops for m in inside], [m.size for m in inside], "k*", label="minimum")
        right.plot([m.flops for m in inside], [m.loss for m in inside], "k*", label="minimum")
    for axes in (left, right):
        for flops in predicted:
            axes.axvline(flops, color="0.5", ls=":", lw=1)
        axes.set_xscale("log")
        axes.set_xlabel("compute [FLOPs]")
        axes.legend(fontsize="small")
    left.set_yscale("log")
    left.set(ylabel="best size N", title=f"N ~ C^{parametric.law.exponent:.3f}")
    right.set(ylabel="loss [nats per token]", title=f"loss falls to {parametric.law.E:.3f}")
    return save(figure, path)


def _band(axes, compute: np.ndarray, intervals: Sequence, color: str, label: str) -> None:
    style = "-" if color == "C0" else "--"
    axes.plot(compute, [one.value for one in intervals], style, color=color, label=label)
    low, high = [one.low for one in intervals], [one.high for one in intervals]
    axes.fill_between(compute, low, high, color=color, alpha=_BAND, lw=0)


def plot_fit(points: Sequence[Point], fit: ParametricFit, path: Path) -> Path:
    """Measured losses against those of the law; colours are the tokens for each unit of size."""
    figure, axes = figure_of(width=7)
    fitted = [fit.law.loss(one.size, one.tokens) for one in points]
    measured = [one.loss for one in points]
    ratios = [math.log10(one.tokens / one.size) for one in points]
    ends = [min(fitted + measured), max(fitted + measured)]
    axes.plot(ends, ends, color="0.6", lw=1)
    dots = axes.scatter(fitted, measured, c=ratios, s=18, cmap="viridis", zorder=3)
    figure.colorbar(dots, label="log10 of tokens / size")
    error = float(np.abs(fit.residuals).mean())
    axes.set(
        xlabel="loss of the law [nats per token]",
        ylabel="measured loss",
        title=f"{len(points)} runs, mean error {error:.2%}",
    )
    return save(figure, path)
