"""Curves as SVG inside a page, with a script that shows the values under the pointer."""

import json
import math
from collections.abc import Sequence
from typing import NamedTuple

from cs_lm.reports.page import escaped

_WIDTH, _HEIGHT = 760, 300
_LEFT, _RIGHT, _TOP, _BOTTOM = 62, 12, 12, 40
_MOST_POINTS = 2000

STYLE = """\
.chart { width: 100%; height: auto; font: 12px system-ui, sans-serif; touch-action: pan-y; }
@media (max-width: 40rem) { .chart { font-size: 20px; } }
.chart .frame { fill: none; stroke: var(--line); }
.chart .grid { stroke: var(--line); stroke-width: .5; }
.chart text { fill: var(--dim); }
.chart polyline { fill: none; stroke-width: 1.6; vector-effect: non-scaling-stroke; }
.chart .c0 { stroke: var(--accent); fill: var(--accent); }
.chart .c1 { stroke: var(--second); fill: var(--second); }
.chart polyline.c0, .chart polyline.c1 { fill: none; }
.chart .cursor { stroke: var(--dim); stroke-dasharray: 3 3; visibility: hidden; }
.chart .event { stroke: #d97706; stroke-dasharray: 2 2; }
.tip { min-height: 1.5em; color: var(--dim); font-variant-numeric: tabular-nums; }
.key::before { content: "\\25cf "; } .key.c0::before { color: var(--accent); }
.key.c1::before { color: var(--second); } .key { margin-right: 1rem; }
"""

SCRIPT = """\
for (const figure of document.querySelectorAll("figure[data-chart]")) {
  const chart = JSON.parse(document.getElementById(figure.dataset.chart).textContent);
  const svg = figure.querySelector("svg"), tip = figure.querySelector(".tip");
  const cursor = svg.querySelector(".cursor");
  const format = (v) => Math.abs(v) >= 1e5 || (v !== 0 && Math.abs(v) < 1e-3)
    ? v.toExponential(2) : String(+v.toPrecision(5));
  const move = (event) => {
    const box = svg.getBoundingClientRect();
    const at = (event.clientX - box.left) / box.width * chart.width;
    const x = chart.x0 + (at - chart.left) / chart.plot * (chart.x1 - chart.x0);
    let parts = [], nearest = null;
    for (const series of chart.series) {
      let best = null;
      for (const point of series.points)
        if (best === null || Math.abs(point[0] - x) < Math.abs(best[0] - x)) best = point;
      if (best === null) continue;
      if (nearest === null || Math.abs(best[0] - x) < Math.abs(nearest - x)) nearest = best[0];
      parts.push(series.name + " " + format(best[1]));
    }
    if (nearest === null) return;
    const place = chart.left + (nearest - chart.x0) / (chart.x1 - chart.x0) * chart.plot;
    cursor.setAttribute("x1", place); cursor.setAttribute("x2", place);
    cursor.style.visibility = "visible";
    tip.textContent = chart.x + " " + format(nearest) + ": " + parts.join(", ");
  };
  svg.addEventListener("pointermove", move);
  svg.addEventListener("pointerdown", move);
  svg.addEventListener("pointerleave", () => {
    cursor.style.visibility = "hidden"; tip.textContent = "";
  });
}
"""


class Series(NamedTuple):
    name: str
    points: Sequence[tuple[float, float]]
    markers: bool = False


def chart(
    name: str, x_label: str, y_label: str, series: Sequence[Series], events: Sequence[float] = ()
) -> str:
    """A figure with up to two series; `name` is unique on the page.

    events  places on the lower axis that are marked with a dashed line
    """
    series = [one._replace(points=_thinned(one.points)) for one in series if one.points]
    if not series:
        return f'<p class="dim">{escaped(y_label)}: nothing was logged</p>'
    every = [point for one in series for point in one.points]
    x0, x1 = min(x for x, _ in every), max(x for x, _ in every)
    y0, y1 = min(y for _, y in every), max(y for _, y in every)
    x1 = x1 if x1 > x0 else x0 + 1
    y1 = y1 if y1 > y0 else y0 + (abs(y0) or 1)
    plot, tall = _WIDTH - _LEFT - _RIGHT, _HEIGHT - _TOP - _BOTTOM

    def across(x: float) -> float:
        return round(_LEFT + (x - x0) / (x1 - x0) * plot, 1)

    def down(y: float) -> float:
        return round(_TOP + (y1 - y) / (y1 - y0) * tall, 1)

    parts = [f'<rect class="frame" x="{_LEFT}" y="{_TOP}" width="{plot}" height="{tall}"/>']
    for tick in ticks(y0, y1):
        parts.append(
            f'<line class="grid" x1="{_LEFT}" x2="{_LEFT + plot}" y1="{down(tick)}" '
            f'y2="{down(tick)}"/><text x="{_LEFT - 6}" y="{down(tick) + 4}" '
            f'text-anchor="end">{short(tick)}</text>'
        )
    for tick in ticks(x0, x1):
        parts.append(
            f'<text x="{across(tick)}" y="{_TOP + tall + 16}" '
            f'text-anchor="middle">{short(tick)}</text>'
        )
    for place in events:
        if x0 <= place <= x1:
            at = across(place)
            parts.append(
                f'<line class="event" x1="{at}" x2="{at}" y1="{_TOP}" y2="{_TOP + tall}"/>'
            )
    for number, one in enumerate(series):
        line = " ".join(f"{across(x)},{down(y)}" for x, y in one.points)
        parts.append(f'<polyline class="c{number}" points="{line}"/>')
        if one.markers:
            parts += [
                f'<circle class="c{number}" cx="{across(x)}" cy="{down(y)}" r="3"/>'
                for x, y in one.points
            ]
    parts.append(f'<line class="cursor" y1="{_TOP}" y2="{_TOP + tall}"/>')
    parts.append(
        f'<text x="{_LEFT + plot / 2}" y="{_HEIGHT - 6}" text-anchor="middle">'
        f"{escaped(x_label)}</text>"
    )
    keys = "".join(
        f'<span class="key c{n}">{escaped(one.name)}</span>' for n, one in enumerate(series)
    )
    data = {
        "x": x_label, "width": _WIDTH, "left": _LEFT, "plot": plot, "x0": x0, "x1": x1,
        "series": [{"name": one.name, "points": one.points} for one in series],
    }  # fmt: skip
    label = escaped(f"{y_label} against {x_label}")
    lines = [
        f'<figure data-chart="{name}" style="margin:0">',
        f"<figcaption>{escaped(y_label)} &ensp; {keys}</figcaption>",
        f'<svg class="chart" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{label}">',
        *parts,
        '</svg>\n<div class="tip"></div>',
        json_data(name, data),
        "</figure>",
    ]
    return "\n".join(lines)


def json_data(name: str, data: object) -> str:
    """A script element with the data; no text inside can end it."""
    text = json.dumps(data, allow_nan=False).replace("<", "\\u003c")
    return f'<script type="application/json" id="{name}">{text}</script>'


def ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Round numbers between the bounds: multiples of 1, 2 or 5 times a power of ten."""
    step = 10.0 ** math.floor(math.log10((high - low) / most))
    step *= next(factor for factor in (1, 2, 5, 10) if (high - low) / (factor * step) <= most)
    first = math.ceil(low / step - 1e-9)
    return [round(i * step, 12) for i in range(first, math.floor(high / step + 1e-9) + 1)]


def short(number: float) -> str:
    """1500000 as 1.5M; small numbers with a power of ten."""
    size = abs(number)
    for power, letter in ((12, "T"), (9, "G"), (6, "M"), (3, "k")):
        if size >= 10**power:
            return f"{number / 10**power:g}{letter}"
    return f"{number:g}" if size >= 1e-3 or not size else f"{number:.0e}"


def _thinned(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most 2,000 of the points, evenly spaced, with the last one."""
    points = list(points)
    if len(points) <= _MOST_POINTS:
        return points
    step = (len(points) - 1) / (_MOST_POINTS - 1)
    return [points[round(i * step)] for i in range(_MOST_POINTS)]
