"""What a run reports: a JSON-lines log, a progress display, TensorBoard events, the plot."""

import contextlib
import json
import logging
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cs_lm.errors import UserError
from cs_lm.storage.atomic import atomic_write

_log = logging.getLogger("cs_lm")
INSTALL_HINT = "install the extra with: pip install 'cs_lm[ui]'"


class MetricsLog:
    """`metrics.jsonl`: one object a line, the first one the run's config and versions.

    A record that the disk does not take is kept in memory, with one warning, and written before
    the next one.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self._held = b""

    def write(self, kind: str, **values: Any) -> None:
        """Appends one record; a number that is not finite becomes null, as JSON has none."""
        was_held = bool(self._held)
        self._held += _as_line({"kind": kind, **values})
        try:
            self._append(self._held)
            self._held = b""
        except OSError as error:
            if not was_held:
                _log.warning("%r cannot be written (%s); trying again", str(self.path), error)

    def _append(self, lines: bytes) -> None:
        """All of the lines or, after an error, none of them."""
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
        """Waits until all of it is on the disk, as far as the disk takes it."""
        with contextlib.suppress(OSError), open(self.path, "ab") as file:
            os.fsync(file.fileno())

    def records(self, warn: bool = True) -> Iterator[dict[str, Any]]:
        """What a crash did not cut short; a warning for each line that is no record any more."""
        for number, record in self._lines():
            if record is None and not warn:
                continue
            if record is None:
                _log.warning("SKIPPED line %d of %r: it is damaged", number, str(self.path))
            else:
                yield record

    def damaged_lines(self) -> list[int]:
        """The numbers of the lines that are no record any more."""
        return [number for number, record in self._lines() if record is None]

    def _lines(self) -> Iterator[tuple[int, dict[str, Any] | None]]:
        lines = self.path.read_bytes().split(b"\n")[:-1] if self.path.is_file() else []
        return enumerate(map(_as_record, lines), start=1)

    def clear(self) -> None:
        self.path.unlink(missing_ok=True)

    def discard_after(self, step: int) -> list[dict[str, Any]]:
        """Removes what was logged after the step of a checkpoint; returns the rest.

        Damaged lines go too.
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
    """The records of a log; a last line that a crash cut short is left out.

    Raises: FileNotFoundError, or ValueError naming a line in the middle that is no JSON.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"metrics: got {str(path)!r}, which is not a file; check the path")
    lines = Path(path).read_bytes().split(b"\n")
    for number, line in enumerate(lines, start=1):
        if not line:
            continue
        try:
            yield json.loads(line.decode("utf-8"))
        except ValueError:
            if number == len(lines):
                return
            raise UserError(f"metrics: line {number} of {str(path)!r} is not JSON") from None
