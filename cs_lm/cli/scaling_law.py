"""`python -m cs_lm scaling-law`: fits scaling laws to trained models, and predicts larger ones.

Two methods: parabolas through runs of equal compute, whose minima follow a power law; and
L = E + A / N^alpha + B / D^beta through all runs. N is a model's size, D its tokens.

    cs-lm scaling-law --data sweeps/iso/results.csv --predict 1e15
    cs-lm scaling-law --data runs.json --at_size 1e6 --at_tokens 25e6
"""

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cs_lm.cli._errors import readable_errors
from cs_lm.cli._outputs import no_place
from cs_lm.config.fields import setting
from cs_lm.config.flags import parse_config
from cs_lm.errors import Problem, UserError, missing, no_effect_without
from cs_lm.scaling.fit_plots import plot_fit, plot_frontier, plot_isoflop
from cs_lm.scaling.fits import (
    Interval,
    IsoflopFit,
    ParametricFit,
    best_of_each,
    fit_isoflop,
    fit_parametric,
)
from cs_lm.scaling.laws import Parametric
from cs_lm.scaling.points import SIZES, Point, read_points
from cs_lm.scaling.text_table import amount, text_table
from cs_lm.storage.atomic import atomic_write

_FAR = 20  # times the largest compute: predictions beyond deserve a warning


@dataclass(frozen=True)
class ScalingLawConfig:
    data: tuple[str, ...] = setting(
        (), "results of sweeps (results.csv), or JSON lists of runs; required"
    )
    predict: tuple[float, ...] = setting((), "compute to predict the best model for", "FLOPs")
    at_size: float | None = setting(None, "predict the loss of one run: its size N")
    at_tokens: float | None = setting(None, "predict the loss of one run: its tokens")
    size: str = setting(
        "parameters",
        "what N is: the parameters, or FLOPs a token / 6, which suits small models better",
        choices=SIZES,
    )
    least_flops: float = setting(0.0, "leave out runs with less compute", "FLOPs", minimum=0)
    num_samples: int = setting(1000, "samples of the bootstrap, for the intervals of 95%")
    seed: int = setting(0, "random seed of the bootstrap", minimum=0)
    out_dir: str | None = setting(None, "folder for scaling-law.json and plots; default: none")

    def validate(self) -> list[Problem]:
        found = missing({"--data": self.data})
        for flag, values in (
            ("--predict", self.predict),
            ("--at_size", (self.at_size,)),
            ("--at_tokens", (self.at_tokens,)),
        ):
            wrong = [one for one in values if one is not None and not 0 < one < math.inf]
            found += [Problem(flag, f"got {one}", "a number above 0") for one in wrong]
        for flag, value in (("--least_flops", self.least_flops), ("--seed", self.seed)):
            if not 0 <= value < math.inf:
                found.append(Problem(flag, f"got {value}", "0 or more"))
        if (self.at_size is None) != (self.at_tokens is None):
            flags = ("--at_size", "--at_tokens")
            found.append(no_effect_without(*(flags if self.at_tokens is None else flags[::-1])))
        if not 20 <= self.num_samples <= 100_000:
            found.append(Problem("--num_samples", f"got {self.num_samples}", "20 to 100000"))
        if self.out_dir is not None:
            found += no_place("--out_dir", self.out_dir, Path(self.out_dir))
        return found


@readable_errors
def main(argv: Sequence[str] | None = None) -> int:
    config = parse_config(ScalingLawConfig, "python -m cs_lm scaling-law", __doc__, argv)
    every = [point for path in config.data for point in read_points(path, config.size)]
    points = best_of_each([one for one in every if one.flops >= config.least_flops])
    if len(points) < len(every):
        print(f"{len(every) - len(points)} of {len(every)} runs left out: too little compute, or "
              "another run with the same size and tokens is better\n")  # fmt: skip
    parametric = fit_parametric(points, config.num_samples, config.seed)
    isoflop = None
    try:
        isoflop = fit_isoflop(points, config.num_samples, config.seed)
    except UserError as error:  # runs of other kinds can be fitted all the same
        print(f"no parabolas: {error}\n")
    for line in _lines(config, points, isoflop, parametric):
        print(line)
    if config.out_dir is not None:
        _write(config, points, isoflop, parametric)
    return 0


def _lines(
    config: ScalingLawConfig,
    points: Sequence[Point],
    isoflop: IsoflopFit | None,
    parametric: ParametricFit,
) -> Iterator[str]:
    low, high = min(one.flops for one in points), max(one.flops for one in points)
    yield f"{len(points)} runs, {low:.3g} to {high:.3g} FLOPs; N is {config.size}"
    if isoflop is not None:
        yield ""
        yield "equal compute: the minimum of each budget's parabola"
        yield text_table(
            [("FLOPs", "best N", "loss", "")]
            + [
                (f"{one.flops:.3g}", amount(one.size), f"{one.loss:.4f}",
                 "" if one.is_inside else "outside of its runs: not used")
                for one in isoflop.minima
            ]
        )  # fmt: skip
        yield f"N ~ C^a with a = {_shown(isoflop.exponent)}"
        floor, factor, power = isoflop.loss_law
        yield f"loss = {floor:.4f} + {factor:.4g} C^-{power:.4f}"
        num_used = sum(one.is_inside for one in isoflop.minima)
        if num_used < 4:
            yield f"only {num_used} budgets: these two laws are rough guesses; train more budgets"
    yield ""
    yield "all runs: L = E + A / N^alpha + B / D^beta"
    rows = [("", "value", "interval of 95%")]
    for name in Parametric._fields:
        found = parametric.interval(lambda law, name=name: getattr(law, name))
        rows.append((name, f"{found.value:.4g}", f"{found.low:.4g} to {found.high:.4g}"))
    exponent = parametric.interval(lambda law: law.exponent)
    rows.append(
        ("a of N ~ C^a", f"{exponent.value:.4g}", f"{exponent.low:.4g} to {exponent.high:.4g}")
    )
    yield text_table(rows)
    yield f"mean error of a loss: {abs(parametric.residuals).mean():.2%}"
    if config.predict:
        yield ""
        yield text_table(_predictions(config, isoflop, parametric))
        if max(config.predict) > _FAR * high:
            ratio = max(config.predict) / high
            yield f"that is up to {ratio:.0f} times the compute of the largest run: be careful"
    if config.at_size is not None:
        found = parametric.loss(config.at_size, config.at_tokens, config.seed)
        yield ""
        yield (
            f"a run with N = {amount(config.at_size)} and {amount(config.at_tokens)} tokens: loss "
            f"{_shown(found)}"
        )


def _shown(one: Interval) -> str:
    return f"{one.value:.4f} ({one.low:.4f} to {one.high:.4f})"


def _predictions(
    config: ScalingLawConfig, isoflop: IsoflopFit | None, parametric: ParametricFit
) -> list[tuple[str, ...]]:
    rows = [("FLOPs", "method", "best N", "interval", "tokens", "loss", "interval ")]
    for flops in config.predict:
        found = []
        if isoflop is not None:
            found.append(("equal compute", isoflop.size(flops), isoflop.loss(flops)))
        _, size, loss = parametric.optimum(flops)
        found.append(("all runs", size, loss))
        for method, size, loss in found:
            rows.append(
                (f"{flops:.3g}", method, amount(size.value),
                 f"{amount(size.low)} to {amount(size.high)}", amount(flops / 6 / size.value),
                 f"{loss.value:.4f}", f"{loss.low:.4f} to {loss.high:.4f}")
            )  # fmt: skip
    return rows


def _write(
    config: ScalingLawConfig,
    points: Sequence[Point],
    isoflop: IsoflopFit | None,
    parametric: ParametricFit,
) -> None:
    folder = Path(config.out_dir)
    folder.mkdir(parents=True, exist_ok=True)
    content: dict[str, Any] = {
        "size": config.size,
        "num_runs": len(points),
        "parametric": {
            name: parametric.interval(lambda law, name=name: getattr(law, name))._asdict()
            for name in (*Parametric._fields, "exponent")
        },
    }
    if isoflop is not None:
        content["equal_compute"] = {
            "minima": [one._asdict() for one in isoflop.minima],
            "exponent": isoflop.exponent._asdict(),
            "loss_law": dict(zip(("floor", "factor", "power"), isoflop.loss_law)),
        }
    path = folder / "scaling-law.json"
    atomic_write(path, json.dumps(content, indent=1).encode("utf-8"))
    print(f"\nlaw      {path}")
    try:
        plots = [plot_fit(points, parametric, folder / "fit.png")]
        if isoflop is not None:
            plots.append(plot_isoflop(points, isoflop, folder / "isoflop.png"))
        plots.append(
            plot_frontier(points, isoflop, parametric, config.predict, folder / "frontier.png")
        )
        for one in plots:
            print(f"plot     {one}")
    except UserError as error:  # matplotlib is missing
        print(error)
