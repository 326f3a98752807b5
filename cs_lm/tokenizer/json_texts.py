"""The texts in JSON lines, or in JSON lists of records."""

import json
import re
from collections.abc import Iterator
from typing import Any

from cs_lm.errors import UserError
from cs_lm.tokenizer.pretokenizer import without_surrogates

_NEXT_VALUE = re.compile(r"[, \t\r\n]*")
_PART_BYTES = 1 << 20


def texts_of_records(parts: Iterator[str], shown: str, text_field: str) -> Iterator[str]:
    """The text of each record of JSON lines, or of a JSON list.

    Raises: UserError with the first record that is not JSON or has no text in that field.
    """
    for number, value in enumerate(_json_values(parts, shown), start=1):
        yield text_of_record(value, f"record {number} of {shown}", text_field)


def text_of_record(record: Any, shown: str, text_field: str) -> str:
    text = record.get(text_field) if isinstance(record, dict) else record
    if isinstance(text, str):
        return text if text.isascii() else without_surrogates(text)
    if isinstance(record, dict):
        names = [name for name, value in record.items() if isinstance(value, str)]
        has = f"it has text in {', '.join(names[:8]) or 'no field'}"
    else:
        has = f"it is a {type(record).__name__}"
    raise UserError(
        f"corpus: {shown} has no text in its field {text_field!r}; {has}; name the "
        "field with --text_field"
    )


def _json_values(parts: Iterator[str], shown: str) -> Iterator[Any]:
    held = ""
    for part in parts:
        held = (held + part).lstrip("\ufeff \t\r\n")
        if held:
            break
    if held.startswith("["):
        yield from _values_of_list(held, parts, shown)
        return
    number, is_ended = 0, False
    while not is_ended:
        part = next(parts, None)
        is_ended = part is None
        lines = (held + (part or "")).split("\n")
        held = "" if is_ended else lines.pop()
        for line in lines:
            number += 1
            if not line.strip():
                continue
            try:
                yield json.loads(line)
            except (ValueError, RecursionError):
                if number == 1 and line.strip() == "{":  # one object over several lines
                    rest = "\n".join([*lines, held])
                    yield from _values_of_list(rest, parts, shown)
                    return
                raise UserError(
                    f"corpus: line {number} of {shown} is no JSON; need one JSON object a line, or "
                    "one list of them"
                ) from None


def _values_of_list(held: str, parts: Iterator[str], shown: str) -> Iterator[Any]:
    """The values of JSON lists, or values one after the other.

    Cost: one value in memory at a time.
    """
    decoder, number, at, is_open = json.JSONDecoder(), 0, 0, False
    while True:
        at = _NEXT_VALUE.match(held, at).end()
        if at == len(held):
            part = next(parts, None)
            if part is None and is_open:
                raise UserError(f"corpus: the list in {shown} is cut short after record {number}")
            if part is None:
                return
            held, at = part, 0
            continue
        if held[at] == ("]" if is_open else "["):
            is_open, at = not is_open, at + 1
            continue
        number += 1
        while True:
            try:
                value, at = decoder.raw_decode(held, at)
                break
            except (ValueError, RecursionError):
                # it may be incomplete: double the text, so that a long value is parsed few times
                more = [part for _, part in zip(range(1 + len(held) // _PART_BYTES), parts)]
                if not more:
                    raise UserError(
                        f"corpus: record {number} of {shown} is no JSON, or is cut short"
                    ) from None
                held, at = "".join([held[at:], *more]), 0
        yield value
