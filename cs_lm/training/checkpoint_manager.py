"""The checkpoints of a run. It keeps several, so that one damaged file does not end the run."""

import json
import logging
import math
import os
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch

from cs_lm.distributed.ranks import RankLostError, Ranks
from cs_lm.errors import UserError
from cs_lm.storage.atomic import WRITING, SyncingFile, replace_directory
from cs_lm.storage.manifest import (
    MANIFEST,
    FileEntry,
    HashingFile,
    check_file,
    read_manifest,
    write_manifest,
)
from cs_lm.training.checkpoint import read_checkpoint
from cs_lm.training.sharded_checkpoint import (
    INDEX,
    parts_of_state,
    read_parts,
    shard_name,
    united,
    wholly,
    write_index,
    write_shard,
)

STATE = "state.pt"
FORMAT_VERSION = 1
KINDS = ("step", "best")
_NAME = re.compile(r"(step|best)-(\d{8,15})")
_ASIDE = ".aside"

_log = logging.getLogger("cs_lm")


class Best(NamedTuple):
    """The best checkpoint: loss [nats per token]; measured_on None if an old version wrote it."""

    step: int
    loss: float
    measured_on: dict[str, Any] | None


class Found(NamedTuple):
    """A checkpoint: the step and kind of its folder, and its content."""

    step: int
    kind: str
    content: dict[str, Any]


class CheckpointManager:
    """Checkpoint folders: the newest `step-00000080`, and `best-00000040` with the lowest loss.

    Each has `state.pt`, or the files of sharded_checkpoint.py, and a manifest with their lengths
    and checksums, written last. A folder gets its name when all of it is on the disk. The best one
    is a hard link if the disk supports it.

    keep_last  number of newest checkpoints to keep, 2 or more
    """

    def __init__(self, folder: str | Path, keep_last: int = 2):
        self.folder = Path(folder)
        self.keep_last = keep_last

    # ---- reading ----

    def steps(self, kind: str = "step") -> list[int]:
        """The steps that have a checkpoint of this kind, newest first."""
        if not self.folder.is_dir():
            return []
        own = [path for path in self.folder.iterdir() if not path.is_symlink()]
        found = [_NAME.fullmatch(path.name) for path in own]
        return sorted(
            (int(match[2]) for match in found if match and match[1] == kind), reverse=True
        )

    def path(self, step: int, kind: str = "step") -> Path:
        return self.folder / f"{kind}-{step:08d}"

    def read(
        self, step: int, kind: str = "step", lazily: bool = False, verify: bool = True
    ) -> dict[str, Any]:
        """The content of one checkpoint, after its checksum is verified.

        lazily  tensors that stay in the files until they are used, and `StoredTensor`s
        verify  False: check the length, not the checksum, which another process has verified
        Raises: FileNotFoundError, or UserError naming the damaged file.
        """
        path = self.path(step, kind)
        if not path.is_dir():
            have = sorted({step for kind in KINDS for step in self.steps(kind)}, reverse=True)
            raise FileNotFoundError(
                f"checkpoint: {str(path)!r} does not exist; checkpoints exist for steps: "
                f"{', '.join(map(str, have)) or 'none'}"
            )
        try:
            files, _ = self._verify(path, step, verify)
            if files[0].name == STATE:
                content = read_checkpoint(path / STATE, mapped=lazily)
            else:
                content = read_parts(path) if lazily else wholly(read_parts(path))
            if content["iteration"] != step:
                raise UserError(f"it is of step {content['iteration']}")
        except (ValueError, OSError) as error:
            raise UserError(f"checkpoint: {str(path)!r} does not verify: {error}") from None
        return content

    def read_newest(self, kinds: Sequence[str] = KINDS, lazily: bool = False) -> dict[str, Any]:
        """The newest checkpoint that verifies; logs a warning for each that does not.

        Raises: FileNotFoundError if there is none, UserError if none verifies.
        """
        return self.find_newest(kinds, lazily).content

    def find_newest(self, kinds: Sequence[str] = KINDS, lazily: bool = False) -> Found:
        """As `read_newest`, with the step and the kind of what it has found."""
        found = sorted(((step, kind) for kind in kinds for step in self.steps(kind)), reverse=True)
        if not found:
            raise FileNotFoundError(
                f"checkpoint: {str(self.folder)!r} has no checkpoint of kind {' or '.join(kinds)}"
            )
        for step, kind in found:
            try:
                return Found(step, kind, self.read(step, kind, lazily))
            except ValueError as error:
                _log.warning("SKIPPED %s", error)
        raise UserError(
            f"checkpoint: none of the {len(found)} in {str(self.folder)!r} verifies; restore one "
            "from a copy, or start a new run in another --out_dir"
        )

    # ---- writing ----

    def save(self, content: dict[str, Any]) -> None:
        """Writes the checkpoint of its iteration, then removes those beyond `keep_last`.

        Raises: OSError if the disk cannot store it; the existing checkpoints stay unchanged.
        """
        self.save_files(content["iteration"], lambda folder: [_write_state(folder, content)])

    def save_files(self, step: int, write: Callable[[Path], list[FileEntry]]) -> None:
        """As `save`; `write` writes the files into the folder and returns their entries."""
        with _writing_folder(self.path(step)) as writing:
            facts = {"format_version": FORMAT_VERSION, "iteration": step}
            write_manifest(writing, write(writing), facts)
        self._remove_old()

    def _remove_old(self) -> None:
        for old in self.steps()[self.keep_last :]:
            _remove(self.path(old))

    def save_parts(self, content: dict[str, Any], ranks: Ranks) -> None:
        """As `save`, by all ranks together: each writes its parts. All of them must call it.

        Raises: OSError at all ranks if one of them cannot write; the existing checkpoints stay.
        """
        step = content["iteration"]
        writing = self.path(step).with_name(self.path(step).name + WRITING)
        try:
            _together(ranks, lambda: _begin(writing, ranks), step)
            written = _together(ranks, lambda: write_shard(writing, ranks.rank, content))
            whole = united(content, _together(ranks, lambda: parts_of_state(content)))
            _together(ranks, lambda: self._name(writing, whole, written, ranks))
        except Exception:
            if ranks.is_first:
                shutil.rmtree(writing, ignore_errors=True)
            raise

    def _name(self, writing: Path, content: dict[str, Any], written: list, ranks: Ranks) -> None:
        if not ranks.is_first:
            return
        index = write_index(writing, content, [table for _, table in written])
        facts = {"format_version": FORMAT_VERSION, "iteration": content["iteration"]}
        write_manifest(writing, [index, *(FileEntry(*entry) for entry, _ in written)], facts)
        replace_directory(writing, self.path(content["iteration"]))
        self._remove_old()

    def save_best(
        self, step: int, valid_loss: float, measured_on: dict[str, Any] | None = None
    ) -> bool:
        """Keeps that step's checkpoint as the best if its loss is lowest; returns whether it is.

        measured_on  the measure of the loss; a best checkpoint of another measure is replaced
        Raises: OSError or UserError when the step has no sound checkpoint.
        """
        if not self.is_better(valid_loss, measured_on):
            return False
        source = self.path(step)
        files, facts = self._verify(source, step, completely=False)
        facts = {**facts, "valid_loss": valid_loss, "measured_on": measured_on}
        with _writing_folder(self.path(step, "best")) as writing:
            for entry in files:
                _link(source / entry.name, writing / entry.name)
            write_manifest(writing, files, facts)
        for old in self.steps("best"):
            if old != step:
                _remove(self.path(old, "best"))
        return True

    def best(self) -> Best | None:
        """The checkpoint with the lowest validation loss, or None; checks lengths, not contents."""
        for step in self.steps("best"):
            try:
                _, facts = self._verify(self.path(step, "best"), step, completely=False)
                if math.isfinite(facts["valid_loss"]):
                    return Best(step, float(facts["valid_loss"]), facts.get("measured_on"))
            except (ValueError, OSError, KeyError, TypeError):
                continue
        return None

    def is_better(self, valid_loss: float, measured_on: dict[str, Any] | None) -> bool:
        """Whether a validation loss is lower than the best one of the same measure so far."""
        best = self.best()
        is_rival = best is not None and best.measured_on in (None, measured_on)
        return math.isfinite(valid_loss) and not (is_rival and valid_loss >= best.loss)

    def set_best_aside(self) -> None:
        """Renames the best checkpoint, because later losses cannot be compared with its loss."""
        for step in self.steps("best"):
            self._set_aside(self.path(step, "best"))

    def discard_after(self, step: int) -> None:
        """Renames checkpoints after that step, and damaged best ones, so that nobody reads them.

        Removes folders that a crash left half written or half removed.
        """
        for kind in KINDS:
            for other in self.steps(kind):
                if other > step or (kind == "best" and not self._verifies(other, kind)):
                    self._set_aside(self.path(other, kind))
        for path in list(self.folder.iterdir()) if self.folder.is_dir() else []:
            if path.name.endswith(WRITING) and _NAME.fullmatch(path.name.partition(".")[0]):
                shutil.rmtree(path, ignore_errors=True)

    def _set_aside(self, path: Path) -> None:
        aside = path.with_name(path.name + _ASIDE)
        shutil.rmtree(aside, ignore_errors=True)
        os.replace(path, aside)

    def _verifies(self, step: int, kind: str) -> bool:
        try:
            self._verify(self.path(step, kind), step)
        except (ValueError, OSError):
            return False
        return True

    def _verify(self, path: Path, step: int, completely: bool = True):
        files, facts = read_manifest(path)
        if facts.get("format_version") != FORMAT_VERSION or facts.get("iteration") != step:
            raise UserError(f"{str(path / MANIFEST)!r} is of another checkpoint or version")
        names = [entry.name for entry in files]
        if names != [STATE] and names != [INDEX, *map(shard_name, range(len(names) - 1))]:
            raise UserError(f"{str(path / MANIFEST)!r} names other files than {STATE}")
        for entry in files:
            check_file(path, entry, completely)
        return files, facts


def _write_state(folder: Path, content: dict[str, Any]) -> FileEntry:
    with open(folder / STATE, "wb") as file:
        syncing = SyncingFile(file)
        hashing = HashingFile(syncing)
        try:
            torch.save(content, hashing)
        except RuntimeError as error:  # torch hides a disk error behind it
            raise hashing.error or error from None
        syncing.sync()
    return hashing.entry(STATE)


def _together(ranks: Ranks, work: Callable[[], Any], same: Any = None) -> list[Any]:
    """What the work gives at each rank, as JSON values.

    same  a value that has to be the same at all ranks
    Raises: OSError at all ranks if it fails at one, whatever the reason.
    """
    try:
        found = json.dumps({"done": work(), "same": same})
    except RankLostError:
        raise
    except Exception as error:  # the others wait for the result of this one
        found = json.dumps({"failed": f"rank {ranks.rank}: {error or type(error).__name__}"})
    every = [json.loads(text) for text in ranks.texts(found)]
    if failed := [one["failed"] for one in every if "failed" in one]:
        raise OSError(failed[0])
    values = [one["same"] for one in every]
    if any(value != values[0] for value in values):
        raise OSError(f"the ranks are at different steps: {', '.join(map(str, values))}")
    return [one["done"] for one in every]


def _begin(writing: Path, ranks: Ranks) -> None:
    if ranks.is_first:
        _make_empty(writing)


def _make_empty(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


@contextmanager
def _writing_folder(path: Path) -> Iterator[Path]:
    """A folder to write into. It gets its name if the block ends without an exception."""
    writing = path.with_name(path.name + WRITING)
    _make_empty(writing)
    try:
        yield writing
        replace_directory(writing, path)
    except BaseException:
        shutil.rmtree(writing, ignore_errors=True)
        raise


def _remove(path: Path) -> None:
    """Renames before deleting, so that an interrupted delete leaves no half-empty checkpoint."""
    nameless = path.with_name(path.name + WRITING)
    shutil.rmtree(nameless, ignore_errors=True)
    os.replace(path, nameless)
    shutil.rmtree(nameless, ignore_errors=True)


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # a file system without hard links
        shutil.copyfile(source, target)
        with open(target, "rb+") as file:
            os.fsync(file.fileno())
