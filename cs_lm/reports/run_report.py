"""The report of a run: one page with its curves, samples, settings, environment and faults."""

import datetime
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from cs_lm.config.fields import flat
from cs_lm.reports.curves import SCRIPT, STYLE, Series, chart
from cs_lm.reports.page import escaped, page

Record = Mapping[str, Any]
_STYLE = """\
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 30rem), 1fr));
  gap: 1.5rem; }
.facts td:first-child { color: var(--dim); white-space: nowrap; }
details { margin: .5rem 0; } summary { cursor: pointer; }
"""
_FAULTS = {
    "bad_step": "the loss or a gradient was not finite; the step was saved to {file}",
    "resume": "the run was resumed",
}


def run_report(name: str, records: Iterable[Record]) -> str:
    """The page, from the records of the run's metrics log."""
    records = list(records)
    begun = next((r for r in reversed(records) if r["kind"] in ("config", "resume")), {})
    of_kind = {
        kind: [r for r in records if r["kind"] == kind] for kind in ("train", "valid", "sample")
    }
    faults = list(_faults(records))
    body = "\n".join(
        [
            _facts(begun, records, of_kind),
            "<h2>Curves</h2>",
            _charts(of_kind, [r["step"] for r in records if r["kind"] in _FAULTS]),
            "<h2>Faults</h2>",
            _list(faults) if faults else "<p>None.</p>",
            "<h2>Samples through time</h2>",
            _samples(of_kind["sample"]),
            "<h2>Settings</h2>",
            _table(flat(begun.get("config", {}))),
            "<h2>Environment</h2>",
            _table({"device": begun.get("device", "unknown"), **begun.get("versions", {})}),
        ]
    )
    return page(name, body, STYLE + _STYLE, SCRIPT)


def _facts(begun: Record, records: Sequence[Record], of_kind: Mapping[str, list[Record]]) -> str:
    facts: dict[str, str] = {}
    if "num_parameters" in begun:
        facts["parameters"] = f"{begun['num_parameters']:,}"
    for key, label in (("train_tokens", "training tokens"), ("valid_tokens", "validation tokens")):
        if begun.get(key):
            facts[label] = f"{begun[key]:,}"
    steps = [r["step"] for r in records]
    if steps:
        facts["steps"] = f"{max(steps):,} of {begun.get('num_steps', 0):,}"
    last = next((r for r in reversed(records) if r.get("elapsed_s")), None)
    if last:
        seconds = datetime.timedelta(seconds=round(last["elapsed_s"]))
        facts["training time"] = f"{seconds} h:min:s"
    scored = [r for r in of_kind["valid"] if r.get("loss_nats") is not None]
    if scored:
        best = min(scored, key=lambda r: r["loss_nats"])
        facts["best validation loss"] = f"{best['loss_nats']:.4f} nats at step {best['step']:,}"
        if best.get("bits_per_byte") is not None:
            facts["bits per byte there"] = f"{best['bits_per_byte']:.4f}"
    facts["finished"] = "yes" if records and records[-1]["kind"] == "end" else "no"
    return _table(facts)


def _charts(of_kind: Mapping[str, list[Record]], events: Sequence[float]) -> str:
    def points(kind: str, key: str) -> list[tuple[float, float]]:
        return [(r["step"], r[key]) for r in of_kind[kind] if r.get(key) is not None]

    losses = [
        Series("training", points("train", "loss_nats")),
        Series("validation", points("valid", "loss_nats"), markers=True),
    ]
    charts = [chart("loss", "step", "loss [nats per token]", losses, events)]
    for key, label in (
        ("lr", "learning rate"),
        ("grad_norm", "gradient norm"),
        ("tokens_per_s", "tokens per second"),
    ):
        charts.append(chart(key, "step", label, [Series(label, points("train", key))], events))
    return '<div class="charts">\n' + "\n".join(charts) + "\n</div>"


def _faults(records: Iterable[Record]) -> Iterable[str]:
    for record in records:
        kind = record["kind"]
        if kind in _FAULTS:
            what = _FAULTS[kind].format(file=record.get("file", "a file"))
            yield f"step {record['step']:,}: {what}"
        elif record.get("spike"):
            yield f"step {record['step']:,}: the loss rose by more than 10 %"
        elif kind == "train" and record.get("loss_nats") is None:
            yield f"step {record['step']:,}: the loss was not finite"


def _samples(samples: Sequence[Record]) -> str:
    if not samples:
        return "<p>None were drawn.</p>"
    parts = []
    for number, record in enumerate(samples):
        is_open = " open" if number in (0, len(samples) - 1) else ""
        text = f"<b>{escaped(record.get('prompt', ''))}</b>{escaped(record.get('text', ''))}"
        parts.append(
            f"<details{is_open}><summary>step {record['step']:,}</summary>"
            f'<div class="text">{text}</div></details>'
        )
    return "\n".join(parts)


def _table(rows: Mapping[str, Any]) -> str:
    cells = "".join(
        f"<tr><td>{escaped(key)}</td><td>{escaped(_shown(value))}</td></tr>\n"
        for key, value in rows.items()
    )
    return f'<div class="scroll"><table class="facts">\n{cells}</table></div>'


def _shown(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return " ".join(map(str, value)) or "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "none" if value is None else str(value)


def _list(lines: Sequence[str]) -> str:
    return "<ul>" + "".join(f"<li>{escaped(line)}</li>" for line in lines) + "</ul>"
