"""Trained models as points of a scaling law, from files of results."""

import csv
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from cs_lm.errors import MissingError, Problem, UserError

SIZES = ("parameters", "flops")


class Point(NamedTuple):
    """A trained model: its size, tokens, compute [FLOPs] and loss [nats per token]."""

    size: float
    tokens: float
    flops: float
    loss: float


def read_points(path: str | Path, size: str = "parameters") -> list[Point]:
    """Points from results.csv of a sweep, or from a JSON list of objects.

    JSON objects have parameters, loss or final_loss, and compute_budget, flops or tokens; compute
    is 6 N D where one of the last two is missing.
    size  what N is: "parameters", or "flops": FLOPs a token / 6, so that C = 6 N D holds exactly
          for small models, too, whose attention and embeddings are a large part. Source of this
          choice: DeepSeek-AI 2024, DeepSeek LLM, section 3.2
    Raises: UserError naming the file and what is wrong in it.
    """
    if not Path(path).is_file():
        what = "is a folder; name a file in it" if Path(path).is_dir() else "does not exist"
        raise MissingError(Problem("--data", f"{str(path)!r} {what}"))
    is_json = Path(path).suffix.lower() == ".json"
    try:
        rows = list(_json_rows(path) if is_json else _csv_rows(path))
        found = [_point(row, size) for row in rows]
    except (ValueError, ArithmeticError, LookupError, TypeError, AttributeError, OSError,
            RecursionError, csv.Error) as error:  # fmt: skip
        why = (
            f"it lacks {error}"
            if isinstance(error, KeyError)
            else f"{type(error).__name__}: {error}"
        )
        what = f"{str(path)!r} cannot be read ({why})"
        need = "results.csv of a sweep, or a JSON list of objects"
        raise UserError(Problem("--data", what, need)) from None
    for number, point in enumerate(found, 1):
        if not all(0 < value < math.inf for value in point):
            what = f"{str(path)!r}: row {number} is {tuple(point)}"
            raise UserError(Problem("--data", what, "numbers above 0"))
    if not found:
        raise UserError(Problem("--data", f"{str(path)!r} has no run that has ended"))
    return found


def _csv_rows(path: str | Path) -> Iterator[dict[str, Any]]:
    with open(path, newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            if row["state"] == "done" and row["loss"]:
                yield {
                    "parameters": row["parameters"],
                    "tokens": row["trained_tokens"],
                    "flops": row["flops"],
                    "loss": row["loss"],
                }


def _json_rows(path: str | Path) -> Sequence[dict[str, Any]]:
    return json.loads(Path(path).read_text(encoding="utf-8"))


def _point(row: dict[str, Any], size: str) -> Point:
    parameters = float(row["parameters"])
    loss = float(row["loss"] if "loss" in row else row["final_loss"])
    flops = row.get("flops", row.get("compute_budget"))
    if "tokens" in row:
        tokens = float(row["tokens"])
        flops = 6 * parameters * tokens if flops is None else float(flops)
    else:
        flops = float(flops)
        tokens = flops / 6 / parameters
    own = parameters if size == "parameters" else flops / 6 / tokens
    return Point(own, tokens, flops, loss)
