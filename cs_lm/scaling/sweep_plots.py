"""Plots of a sweep: the loss against each setting, and all settings side by side."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cs_lm.scaling.sweep import BUDGET, shown_value
from cs_lm.scaling.sweep_results import Result, is_number, ranked, setting_names
from cs_lm.training.figures import figure_of, save

_LOG_RATIO = 8  # values that differ by more are drawn on a logarithmic axis


def plot_sweep(results: Sequence[Result], folder: Path) -> list[Path]:
    """Draws what has ended; returns the paths. Raises: UserError without matplotlib."""
    done = ranked(results)
    varied = [n for n in setting_names(done) if len(_values(done, n)) > 1]
    if not varied or len(done) < 2:
        return []
    paths = [_against(done, name, varied, folder / f"loss-{name}.png") for name in varied]
    if len(varied) > 1:
        paths.append(_side_by_side(done, varied, folder / "settings.png"))
    if BUDGET in varied:
        paths.append(_isoflop(done, folder / "isoflop.png"))
    return paths


def _values(results: Sequence[Result], name: str) -> list[Any]:
    """The different values of a setting, in order; numbers by size."""
    found = {}
    for one in sorted(results, key=lambda one: one.run.name):
        value = one.run.settings.get(name)
        found[shown_value("" if value is None else value)] = value
    values = list(found.values())
    return sorted(values) if all(is_number(value) for value in values) else values


def _axis(results: Sequence[Result], name: str):
    """Function from a value to its place on the axis, whether it is logarithmic, and labels."""
    values = _values(results, name)
    if all(is_number(value) for value in values):
        low, high = values[0], values[-1]
        return lambda value: value, low > 0 and high >= _LOG_RATIO * low, None
    places = {shown_value(value): place for place, value in enumerate(values)}
    return lambda value: places[shown_value(value)], False, list(places)


def _against(done: Sequence[Result], name: str, varied: Sequence[str], path: Path) -> Path:
    """One line for each choice of the other settings, if these are few."""
    figure, axes = figure_of()
    place, is_log, labels = _axis(done, name)
    others = [one for one in varied if one != name]
    lines: dict[str, list[Result]] = {}
    for one in done:
        key = ", ".join(f"{n} {shown_value(one.run.settings.get(n, ''))}" for n in others)
        lines.setdefault(key, []).append(one)
    has_lines = len(lines) <= 12 and any(len(line) > 1 for line in lines.values())
    for key, line in sorted(lines.items()):
        points = sorted((place(one.run.settings[name]), one.loss) for one in line)
        style = "o-" if has_lines else "o"
        axes.plot(*zip(*points), style, ms=4, color=None if has_lines else "C0", label=key)
    if has_lines and others:
        axes.legend(fontsize="small")
    axes.set(xlabel=name, ylabel="validation loss [nats per token]")
    if is_log:
        axes.set_xscale("log")
    if labels is not None:
        axes.set_xticks(range(len(labels)), labels, rotation=30 if len(labels) > 4 else 0)
    best = done[0]
    axes.plot(place(best.run.settings[name]), best.loss, "*", ms=12, color="C3", zorder=3)
    axes.set_title(f"best: {name} {shown_value(best.run.settings[name])}, loss {best.loss:.4f}")
    return save(figure, path)


def _side_by_side(done: Sequence[Result], varied: Sequence[str], path: Path) -> Path:
    """Parallel coordinates: a line for each run, from setting to setting to its loss."""
    figure, axes = figure_of(width=2.2 * len(varied) + 3)
    low, high = done[0].loss, done[-1].loss
    colors = _colors(low, high)
    for one in reversed(done):  # the best ones on top
        heights = []
        for name in varied:
            place, is_log, _ = _axis(done, name)
            ends = [place(value) for value in _values(done, name)]
            heights.append(_share(place(one.run.settings[name]), min(ends), max(ends), is_log))
        heights.append(_share(one.loss, low, high, False))
        axes.plot(heights, color=colors(one.loss), lw=2.5 if one is done[0] else 1, alpha=0.8)
    for column, name in enumerate(varied):
        place, is_log, _ = _axis(done, name)
        values = _values(done, name)
        ends = [place(value) for value in values]
        shown = values if len(values) <= 8 else [values[0], values[-1]]
        for value in shown:
            height = _share(place(value), min(ends), max(ends), is_log)
            axes.text(
                column - 0.03, height, shown_value(value), ha="right", va="center", fontsize=8
            )
    for value in (low, high):
        axes.text(
            len(varied) + 0.03,
            _share(value, low, high, False),
            f"{value:.3f}",
            va="center",
            fontsize=8,
        )
    axes.set_xticks(range(len(varied) + 1), [*varied, "loss"])
    axes.set_yticks([])
    for column in range(len(varied) + 1):
        axes.axvline(column, color="0.6", lw=0.8)
    axes.set_xlim(-0.4, len(varied) + 0.4)
    axes.set_title(f"{len(done)} runs; the thick line is the best one")
    for side in ("left", "right", "top"):
        axes.spines[side].set_visible(False)
    return save(figure, path)


def _share(value: float, low: float, high: float, is_log: bool) -> float:
    if low == high:
        return 0.5
    if is_log:
        value, low, high = math.log(value), math.log(low), math.log(high)
    return (value - low) / (high - low)


def _colors(low: float, high: float):
    from matplotlib import colormaps

    scale = colormaps["viridis"]
    return lambda loss: scale(0.9 * _share(loss, low, high, False))


def _isoflop(done: Sequence[Result], path: Path) -> Path:
    figure, axes = figure_of()
    for number, budget in enumerate(_values(done, BUDGET)):
        own = sorted(
            (one.parameters, one.loss) for one in done if one.run.settings[BUDGET] == budget
        )
        axes.plot(*zip(*own), "o-", ms=4, color=f"C{number}", label=f"{budget:.2g} FLOPs")
    axes.set_xscale("log")
    axes.set(xlabel="parameters", ylabel="validation loss [nats per token]", title="equal compute")
    axes.legend(fontsize="small")
    return save(figure, path)
