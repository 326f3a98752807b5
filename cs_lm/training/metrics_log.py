"""What a run reports: a JSON-lines log, a progress display, TensorBoard events, the plot."""

import contextlib
import json
import math
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TextIO

from cs_lm.storage.atomic import write_whole
from cs_lm.training.throughput import Speed

SPARE_HELP = "install the extra with: pip install 'cs_lm[ui]'"


class MetricsLog:
    """`metrics.jsonl`: one object a line, the first one the run's config and versions.

    A record that the disk does not take is kept in memory, told to `say` once, and written before
    the next one.
    """

    def __init__(self, path: str | Path, say: Callable[[str], None] = print):
        self.path, self._say = Path(path), say
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
                self._say(f"WARNING: {str(self.path)!r} cannot be written ({error}); trying again")

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

    def records(self) -> Iterator[dict[str, Any]]:
        """What a crash did not cut short; `say` is told of lines that are no record any more."""
        lines = self.path.read_bytes().split(b"\n")[:-1] if self.path.is_file() else []
        for number, line in enumerate(lines, start=1):
            record = _as_record(line)
            if record is None:
                self._say(f"SKIPPED line {number} of {str(self.path)!r}: it is damaged")
            else:
                yield record

    def clear(self) -> None:
        self.path.unlink(missing_ok=True)

    def drop_after(self, step: int) -> list[dict[str, Any]]:
        """Removes what was logged beyond the checkpoint that a run goes on from; returns the rest.

        Damaged lines go too.
        """
        kept = [r for r in self.records() if r["step"] <= step and r["kind"] != "end"]
        write_whole(self.path, b"".join(map(_as_line, kept)))
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
            raise ValueError(f"metrics: line {number} of {str(path)!r} is not JSON") from None


class SpikeMark:
    """Tells of a loss that is a tenth above every one of the last 20 that were logged."""

    def __init__(self, earlier: Iterable[float | None] = ()):
        self._recent = deque((loss for loss in earlier if loss is not None), maxlen=20)

    def __call__(self, loss: float) -> bool:
        is_spike = bool(self._recent) and loss > 1.1 * max(self._recent)
        self._recent.append(loss)
        return is_spike


class Stopwatch:
    """Seconds, of which those inside `pause()` do not count."""

    def __init__(self):
        self._start = time.perf_counter()
        self._paused_s = 0.0

    @property
    def elapsed_s(self) -> float:
        return time.perf_counter() - self._start - self._paused_s

    def pause(self) -> "_Pause":
        return _Pause(self)

    def add_pause(self, seconds: float) -> None:
        self._paused_s += seconds


class _Pause:
    def __init__(self, watch: Stopwatch):
        self._watch = watch

    def __enter__(self) -> None:
        self._start = time.perf_counter()

    def __exit__(self, *_exception) -> None:
        self._watch.add_pause(time.perf_counter() - self._start)


class Display:
    """A progress bar on a terminal that has tqdm, plain lines anywhere else."""

    def __init__(self, num_steps: int, first_step: int, file: TextIO | None = None):
        self._file = file or sys.stdout
        self._num_steps = num_steps
        self._bar = None
        if self._file.isatty():
            try:
                from tqdm import tqdm
            except ImportError:
                return
            self._bar = tqdm(
                total=num_steps, initial=first_step, file=self._file, unit="step",
                dynamic_ncols=True,
            )  # fmt: skip

    def update(self, step: int) -> None:
        if self._bar is not None:
            self._bar.update(step - self._bar.n)

    def report(self, step: int, loss: float, lr: float, norm: float, speed: Speed) -> None:
        part = f"{speed.model_flops_per_s / 1e9:,.1f} GFLOP/s"
        if speed.utilisation is not None:
            part = f"{speed.utilisation:.0%} of peak"
        shown = (
            f"loss {loss:.4f} | lr {lr:.2e} | norm {norm:.2f} | {speed.tokens_per_s:,.0f} tokens/s "
            f"({part})"
        )
        if self._bar is not None:
            self._bar.set_postfix_str(shown)
        else:
            self.say(
                f"step {step}/{self._num_steps} | {shown} | ETA {format_duration(speed.eta_s)}"
            )

    def say(self, text: str) -> None:
        try:
            if self._bar is not None:
                self._bar.write(text, file=self._file)
            else:
                print(text, file=self._file, flush=True)
        except UnicodeEncodeError:  # what a model writes may have characters that no console shows
            self.say(shown_on(self._file, text))
        except BrokenPipeError:  # nobody reads any more: that is no reason to stop training
            os.dup2(os.open(os.devnull, os.O_WRONLY), self._file.fileno())
        except OSError:  # a terminal that is gone, a full disk
            pass

    def close(self) -> None:
        with contextlib.suppress(OSError):
            if self._bar is not None:
                self._bar.close()


def shown_on(file: TextIO, text: str) -> str:
    """The text with codes in the place of characters that the file's encoding does not have."""
    encoding = file.encoding or "ascii"
    return text.encode(encoding, "backslashreplace").decode(encoding)


def format_duration(seconds: float) -> str:
    """1:02:03, or 2:03 below an hour."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02d}:{second:02d}" if hours else f"{minute}:{second:02d}"


def format_bytes(num_bytes: float) -> str:
    """1.23 MB; a kB is 1,000 bytes."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if num_bytes < 1000 or unit == "TB":
            return f"{num_bytes:.3g} {unit}"
        num_bytes /= 1000
    raise AssertionError


class TensorBoardLog:
    """TensorBoard event files, until the disk takes no more; needs the package tensorboard.

    folder  None: nothing is written
    """

    def __init__(self, folder: Path | None, say: Callable[[str], None]):
        self._writer: Any = None
        self._say = say
        if folder is not None:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(folder))

    def write(self, kind: str, step: int, values: dict[str, Any]) -> None:
        """The numbers among the values."""
        for name, value in values.items():
            if isinstance(value, float):
                self._attempt(lambda name=name, value=value: self._writer.add_scalar(
                    f"{kind}/{name}", value, step))  # fmt: skip

    def close(self) -> None:
        self._attempt(lambda: self._writer.close())

    def _attempt(self, action: Callable[[], None]) -> None:
        if self._writer is None:
            return
        try:
            action()
        except OSError as error:
            self._writer = None
            self._say(f"WARNING: no more TensorBoard events ({error}); training goes on")
