"""Files that are there whole or not at all."""

import os
from pathlib import Path


def write_whole(path: str | Path, content: bytes) -> None:
    """Puts the content in the file's place at once, under its name only when it is on the disk."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    writing = path.with_name(path.name + ".writing")
    with open(writing, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(writing, path)
