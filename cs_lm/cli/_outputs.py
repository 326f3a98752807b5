"""Checks the files that a command shall write, before its work begins."""

import contextlib
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from cs_lm.errors import Problem
from cs_lm.storage.atomic import temporary_name


class FileKind(NamedTuple):
    """Files of one kind that commands write. mark: in lower case; stands near their beginning."""

    name: str
    endings: tuple[str, ...]
    mark: bytes


PAGE = FileKind("a page of this program", (".html", ".htm"), b'content="cs_lm"')
PLOT = FileKind("a plot", (".png", ".svg"), b"matplotlib")
RESULTS = FileKind("results of eval", (".jsonl",), b'"num_shots_fitted"')
COMPARISON = FileKind("results of compare", (".jsonl",), b'"compared_runs"')
_HEAD_BYTES = 1 << 14


def output_problems(
    flag: str, path: str | None, kind: FileKind, inputs: Iterable[str] = ()
) -> list[Problem]:
    """Why the command cannot write the file, or would lose something by it. None: no file.

    An existing file may be replaced if it is of the same kind and none of the inputs.
    """
    if path is None:
        return []
    if Path(path).suffix.lower() not in kind.endings:
        need = f"a name that ends in {' or '.join(kind.endings)}"
        return [Problem(flag, f"got {path!r}", need)]
    if found := unwritable(flag, path) or is_an_input(flag, path, inputs):
        return found
    if os.path.exists(path) and not _is_of(kind, path):
        what = f"got {path!r}, which holds something else than {kind.name}"
        return [Problem(flag, what, fix="name another file, or move that one away")]
    return []


@contextlib.contextmanager
def growing_file(path: str | None) -> Iterator[Callable[[bytes], None]]:
    """A function that appends to the file. The file has another name until all is written.

    If something stops the command, what was written keeps that other name, and the path is told.
    None: nothing is written.
    """
    if path is None:
        yield lambda content: None
        return
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    writing = temporary_name(Path(path))
    file = open(writing, "wb")  # noqa: SIM115  closed below

    def append(content: bytes) -> None:
        file.write(content)
        file.flush()

    try:
        yield append
        file.close()
        os.replace(writing, path)
    except BaseException:
        with contextlib.suppress(OSError):
            file.close()
        if writing.stat().st_size:
            print(f"results  those so far are in {writing}", file=sys.stderr)
        else:
            writing.unlink()
        raise


def unwritable(flag: str, path: str) -> list[Problem]:
    """A folder, a device, or a file in a place where none can be made."""
    if os.path.isdir(path):
        return [Problem(flag, f"got {path!r}, which is a folder", fix="name a file in it")]
    if os.path.lexists(path) and not os.path.isfile(path):
        return [Problem(flag, f"got {path!r}, which is no regular file", fix="name a file")]
    return no_place(flag, path, Path(path).absolute().parent)


def no_place(flag: str, path: str, folder: Path) -> list[Problem]:
    """The folder, or the nearest one above it that is there, cannot be written to.

    path  what the user gave, for the message
    """
    place = next(one for one in (folder, *folder.absolute().parents) if one.exists())
    if place.is_dir() and os.access(place, os.W_OK | os.X_OK):
        return []
    why = "is not writable" if place.is_dir() else "is a file"
    what = f"got {path!r}, but {os.path.relpath(place)!r} {why}"
    return [Problem(flag, what, fix="name another folder")]


def is_an_input(flag: str, path: str, inputs: Iterable[str]) -> list[Problem]:
    existing = filter(os.path.exists, inputs)
    if os.path.exists(path) and any(os.path.samefile(one, path) for one in existing):
        what = f"got {path!r}, which the command reads"
        return [Problem(flag, what, fix="name another file")]
    return []


def _is_of(kind: FileKind, path: str) -> bool:
    with open(path, "rb") as file:
        head = file.read(_HEAD_BYTES)
    return not head or kind.mark in head.lower()
