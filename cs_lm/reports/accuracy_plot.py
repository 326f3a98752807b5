"""Accuracy against the number of demonstrations, as a picture."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from cs_lm.errors import UserError, missing_package
from cs_lm.storage.atomic import atomic_open

Points = Sequence[tuple[int, float, float, float]]  # demonstrations, accuracy, lower, upper bound


def draw_accuracy(series: Mapping[str, Points], path: str | Path, chance: float | None) -> None:
    """One line for each name, with its 95% interval. The ending, .png or .svg, is the format.

    chance  accuracy of a blind guess, drawn as a dashed line
    Raises: UserError when matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError(missing_package("--plot_path", "matplotlib", "ui")) from None
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    every = sorted({point[0] for points in series.values() for point in points})
    places = {num_shots: place for place, num_shots in enumerate(every)}
    for name, points in series.items():
        x = [places[point[0]] for point in points]
        y = [point[1] for point in points]
        below = [point[1] - point[2] for point in points]
        above = [point[3] - point[1] for point in points]
        axes.errorbar(x, y, yerr=(below, above), marker="o", capsize=4, label=name)
    if chance is not None:
        axes.axhline(chance, color="0.5", linestyle="--", label="chance")
    axes.set_xticks(list(places.values()), [str(num_shots) for num_shots in every])
    axes.set(
        xlabel="demonstrations in the prompt", ylabel="accuracy (95% interval)", ylim=(0, 1.02)
    )
    axes.grid(alpha=0.3)
    axes.legend()
    with atomic_open(path) as file:
        figure.savefig(file, format=Path(path).suffix[1:].lower(), dpi=120)
