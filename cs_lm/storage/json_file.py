"""One JSON value in a small file."""

import json
from pathlib import Path
from typing import Any

from cs_lm.errors import Problem, UserError
from cs_lm.storage.atomic import atomic_write

MAX_JSON_BYTES = 64 << 20
_KINDS = {dict: "object", list: "list"}


def read_json(path: str | Path, where: str, kind: type = dict) -> Any:
    """The value in the file.

    where  begins the message of an error
    kind   dict or list: what the value has to be
    Raises: UserError for a file that is too large or damaged, or holds another kind of value;
    OSError for one that cannot be opened.
    """
    try:
        if Path(path).stat().st_size > MAX_JSON_BYTES:
            raise ValueError(f"more than {MAX_JSON_BYTES >> 20} MB")
        value = json.loads(Path(path).read_text(encoding="utf-8"))
        if not isinstance(value, kind):
            raise ValueError(f"no JSON {_KINDS[kind]}")
    except (ValueError, RecursionError) as error:
        raise UserError(Problem(where, f"{str(path)!r} cannot be read ({error})")) from None
    return value


def write_json(path: str | Path, value: Any) -> None:
    """Replaces the file at once, or not at all."""
    atomic_write(path, json.dumps(value, indent=2, ensure_ascii=True).encode("utf-8"))
