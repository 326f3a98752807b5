"""Tables of text, and numbers with a unit prefix."""

from collections.abc import Sequence


def text_table(rows: Sequence[Sequence[str]], has_head: bool = True) -> str:
    """Columns with equal widths: the first one to the left, numbers to the right."""
    columns = list(zip(*rows))
    widths = [max(map(len, column)) for column in columns]
    lines = []
    for row in rows:
        cells = [f"{row[0]:<{widths[0]}}"]
        for cell, width, column in zip(row[1:], widths[1:], columns[1:]):
            is_number = all(_is_number(one) for one in column[has_head:])
            cells.append(f"{cell:>{width}}" if is_number else f"{cell:<{width}}")
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def _is_number(text: str) -> bool:
    return not text or text[0].isdigit() or text[0] in "+-"


def amount(number: float) -> str:
    """Three digits and a prefix: 70.1 B, 1.4 T; B for billions, as models are named."""
    for limit, prefix in ((1e15, ""), (1e12, " T"), (1e9, " B"), (1e6, " M"), (1e3, " k")):
        if number >= 0.9995 * limit:  # three digits of it round up
            return f"{number:.3g}" if limit == 1e15 else f"{number / limit:.3g}{prefix}"
    return f"{number:.3g}"
