"""Figures of matplotlib, which is an extra and is imported only when one is drawn."""

from pathlib import Path
from typing import Any

from cs_lm.errors import UserError, missing_package
from cs_lm.storage.atomic import atomic_open


def figure_of(width: float = 8.0, height: float = 5.0, columns: int = 1) -> tuple[Any, Any]:
    """A figure and its axes [inches]. Raises: UserError when matplotlib is missing."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError(missing_package("plot", "matplotlib", "ui")) from None
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots(1, columns)
    for one in [axes] if columns == 1 else axes:
        one.grid(alpha=0.3)
    return figure, axes


def save(figure: Any, path: Path) -> Path:
    """Writes the figure in the format of the path's ending."""
    with atomic_open(path) as file:
        figure.savefig(file, format=path.suffix[1:].lower(), dpi=120)
    return path
