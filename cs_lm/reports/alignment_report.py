"""The report of a chain of alignment: models side by side, curves, calibration, answers."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from cs_lm.reports.curves import SCRIPT, STYLE, Series, chart
from cs_lm.reports.page import escaped, page

_STYLE = """\
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 28rem), 1fr));
  gap: 1.5rem; }
.narrow { max-width: 36rem; }
th { white-space: nowrap; } td.number { white-space: nowrap; font-variant-numeric: tabular-nums; }
"""


class ModelRow(NamedTuple):
    """One model. `wins` and `kl` are those beside the first model; None: not defined.

    kl             mean exact divergence of an answer [nats]
    bits_per_byte  of the text that the first model was trained on
    """

    name: str
    gold: float
    proxy: float | None
    right: float
    liked: float
    wins: tuple[float, float, float] | None
    kl: float | None
    length: float
    ended: float
    bits_per_byte: float


class Run(NamedTuple):
    """A run of PPO: the records of its iterations."""

    name: str
    rollouts: Sequence[Mapping[str, Any]]


COLUMNS = (
    "model", "gold reward", "reward model", "right", "liked style", "wins over SFT (95 %)",
    "KL [nats]", "length", "ended", "text [bits/byte]",
)  # fmt: skip


def cells_of(row: ModelRow) -> list[str]:
    """The row as text, in the order of COLUMNS."""
    wins = "-" if row.wins is None else "{:.3f} ({:.3f} to {:.3f})".format(*row.wins)
    return [
        row.name, f"{row.gold:.3f}", "-" if row.proxy is None else f"{row.proxy:.3f}",
        f"{row.right:.3f}", f"{row.liked:.3f}", wins, "-" if row.kl is None else f"{row.kl:.2f}",
        f"{row.length:.1f}", f"{row.ended:.3f}", f"{row.bits_per_byte:.3f}",
    ]  # fmt: skip


def alignment_report(
    title: str,
    facts: Sequence[str],
    rows: Sequence[ModelRow],
    runs: Sequence[Run],
    calibration: Sequence[Mapping[str, float]],
    answers: Sequence[tuple[str, Mapping[str, str]]],
    seconds: Mapping[str, float],
) -> str:
    """The page.

    facts        sentences above the table
    calibration  bins of the reward model: `expected` and `right`, shares of pairs
    answers      prompts, and the answer of each model by its name
    seconds      time of each stage
    """
    body = [
        *(f"<p>{escaped(fact)}</p>" for fact in facts),
        "<h2>The models</h2>",
        _table(COLUMNS, [cells_of(row) for row in rows]),
        "<h2>Reward against divergence</h2>",
        '<p class="dim">Each point is an iteration, on the prompts of the training: what the '
        "reward model says of its answers, and what they are really worth, against how far the "
        "policy is from where it began.</p>",
        '<div class="charts">',
        *(_kl_chart(number, run) for number, run in enumerate(runs)),
        "</div>",
        "<h2>Calibration of the reward model</h2>",
        _calibration(calibration),
        "<h2>Answers to the same prompts</h2>",
        _answers(answers),
        "<h2>Time</h2>",
        _table(("stage", "seconds"), [(name, f"{s:.0f}") for name, s in seconds.items()]),
        *(_shares(run) for run in runs),
    ]
    return page(title, "\n".join(body), STYLE + _STYLE, SCRIPT)


def _kl_chart(number: int, run: Run) -> str:
    def points(key: str) -> list[tuple[float, float]]:
        return [(r["kl_exact"], r[key]) for r in run.rollouts if r.get(key) is not None]

    series = [Series("reward model", points("score"), True), Series("gold", points("gold"), True)]
    return chart(f"kl{number}", "KL [nats per answer]", f"{run.name}: reward", series)


def _calibration(bins: Sequence[Mapping[str, float]]) -> str:
    found = [(one["expected"], one["right"]) for one in bins]
    ideal = [(0.5, 0.5), (1.0, 1.0)]
    series = [Series("share of right pairs", found, True), Series("ideal", ideal)]
    figure = chart("calibration", "expected share", "right", series)
    return (
        '<p class="dim">Pairs of the validation rankings, in bins of the margin between both '
        "scores: how often the better answer has the higher score, against how often the model "
        f'expects it.</p>\n<div class="narrow">{figure}</div>'
    )


def _answers(answers: Sequence[tuple[str, Mapping[str, str]]]) -> str:
    names = list(answers[0][1]) if answers else []
    rows = [[prompt, *(by_model[name] for name in names)] for prompt, by_model in answers]
    return _table(("prompt", *names), rows)


def _shares(run: Run) -> str:
    """Where the time of an iteration goes."""
    parts = {
        part: sum(r[f"{part}_s"] for r in run.rollouts)
        for part in ("sampling", "scoring", "updating")
    }
    total = sum(parts.values()) or 1.0
    shown = ", ".join(f"{part} {100 * s / total:.0f} %" for part, s in parts.items())
    return f'<p class="dim">{escaped(run.name)}, an iteration: {shown}.</p>'


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    def cell(text: str) -> str:
        is_number = text[:1].isdigit() or text[:1] == "-"
        return (
            f'<td class="number">{escaped(text)}</td>' if is_number else f"<td>{escaped(text)}</td>"
        )

    head = "".join(f"<th>{escaped(one)}</th>" for one in heads)
    lines = "".join(f"<tr>{''.join(map(cell, row))}</tr>\n" for row in rows)
    return f'<div class="scroll"><table>\n<tr>{head}</tr>\n{lines}</table></div>'
