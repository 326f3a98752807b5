"""The log of a run, `metrics.jsonl`. It survives a crash and a full disk."""

import contextlib
import json
import logging
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cs_lm.errors import MissingError, Problem
from cs_lm.storage.atomic import atomic_write

_log = logging.getLogger("cs_lm")


class MetricsLog:
    """`metrics.jsonl`: one JSON object per line; the first has the run's config and versions.

    If the disk cannot store a record, it is kept in memory, with one warning, and written before
    the next one.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self._held = b""

    def write(self, kind: str, **values: Any) -> None:
        """Appends one record; NaN and infinity become null, because JSON has neither."""
        was_held = bool(self._held)
        self._held += _as_line({"kind": kind, **values})
        try:
            self._append(self._held)
            self._held = b""
        except OSError as error:
            if not was_held:
                _log.warning("%r cannot be written (%s); trying again", str(self.path), error)

    def _append(self, lines: bytes) -> None:
        """Appends all of the lines or, after an error, none of them."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path, "ab", buffering=0) as file:
            before = file.tell()
            try:
                if file.write(lines) != len(lines):
                    raise OSError("only a part could be written")
            except OSError:
                file.truncate(before)
                raise

    def sync(self) -> None:
        """Waits until the log is on the disk; ignores disk errors."""
        with contextlib.suppress(OSError), open(self.path, "ab") as file:
            os.fsync(file.fileno())

    def records(self, warn: bool = True) -> Iterator[dict[str, Any]]:
        """The records, without a last line that a crash cut short; warns of damaged lines."""
        for number, record in self._lines():
            if record is None and not warn:
                continue
            if record is None:
                _log.warning("SKIPPED line %d of %r: it is damaged", number, str(self.path))
            else:
                yield record

    def damaged_lines(self) -> list[int]:
        """The line numbers of damaged records."""
        return [number for number, record in self._lines() if record is None]

    def _lines(self) -> Iterator[tuple[int, dict[str, Any] | None]]:
        lines = self.path.read_bytes().split(b"\n")[:-1] if self.path.is_file() else []
        return enumerate(map(_as_record, lines), start=1)

    def clear(self) -> None:
        self.path.unlink(missing_ok=True)

    def discard_after(self, step: int) -> list[dict[str, Any]]:
        """Removes the records after the step of a checkpoint; returns the rest.

        Also removes the "end" record and damaged lines.
        """
        kept = [r for r in self.records() if r["step"] <= step and r["kind"] != "end"]
        atomic_write(self.path, b"".join(map(_as_line, kept)))
        return kept


def _as_record(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line.decode("utf-8"))
        return record if isinstance(record["step"], int) and record["kind"] else None
    except (ValueError, TypeError, KeyError, RecursionError):
        return None


def _as_line(record: dict[str, Any]) -> bytes:
    text = json.dumps(_finite(record), ensure_ascii=False, allow_nan=False)
    return text.encode("utf-8") + b"\n"


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def read_metrics(path: str | Path) -> Iterator[dict[str, Any]]:
    """The records of a log; a warning for each damaged line.

    Raises: MissingError where there is no log.
    """
    if not Path(path).is_file():
        what = f"got {str(path)!r}, which is not a file"
        raise MissingError(Problem("metrics", what, fix="check the path"))
    return MetricsLog(path).records()
