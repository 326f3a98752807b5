"""`python -m cs_lm convert`: a copy of a run, with its checkpoint in another form.

    single  one file, as one process writes it
    parts   a file for each of --num_parts processes, as --parallel fsdp writes them
    dcp     torch.distributed.checkpoint, for other programs; it can be converted back

Any form can be resumed, alone or by any number of processes: convert only to move, to share or to
edit. Tensors are copied one by one.
"""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cs_lm.cli._errors import readable_errors
from cs_lm.cli._fit import check_writable
from cs_lm.config.fields import not_positive, setting
from cs_lm.config.flags import parse_config
from cs_lm.config.shared import checkpoint_setting, validate_checkpoint
from cs_lm.errors import Problem, UserError, missing
from cs_lm.training.convert import write_in_parts, write_single
from cs_lm.training.run_dir import RunFolder

FORMATS = ("single", "parts", "dcp")


@dataclass(frozen=True)
class ConvertConfig:
    out_dir: str = setting("", "folder of the run, or one that was written as dcp; required")
    checkpoint: str = checkpoint_setting("last")
    target: str = setting("", "folder to make; required", flag="--to")
    file_format: str = setting("single", "form of the copy", flag="--format", choices=FORMATS)
    num_parts: int | None = setting(None, "with --format parts: number of files; default: 2")

    def validate(self) -> list[Problem]:
        found = missing({"--out_dir": self.out_dir, "--to": self.target})
        if self.num_parts is not None and self.file_format != "parts":
            what = f"has no effect with --format {self.file_format}"
            found.append(Problem("--num_parts", what, fix="leave it out"))
        return [*found, *not_positive(self), *validate_checkpoint(self.checkpoint)]


@readable_errors
def main(argv: Sequence[str] | None = None) -> int:
    config = parse_config(ConvertConfig, "python -m cs_lm convert", __doc__, argv)
    from cs_lm.training.dcp import SIDE_FILE, read_dcp, write_dcp  # takes a second to import

    source, target = Path(config.out_dir), Path(config.target)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(Problem("--to", f"{config.target!r} is there already", fix="name another"))
    if target.resolve().is_relative_to(source.resolve()):
        what = f"{config.target!r} is inside of --out_dir"
        raise UserError(Problem("--to", what, fix="name another folder"))
    check_writable(target)
    if not (source / SIDE_FILE).is_file():
        content = RunFolder(source).read(config.checkpoint, lazily=True)
    else:
        content = read_dcp(source)
        if config.checkpoint not in ("last", str(content["iteration"])):
            what = f"got {config.checkpoint}, but this export holds step {content['iteration']}"
            raise UserError(Problem("--checkpoint", what, fix="leave it out"))
    checkpoints = RunFolder(target).checkpoints
    try:
        if config.file_format == "dcp":
            target.mkdir(parents=True, exist_ok=True)
            write_dcp(content, target)
        elif config.file_format == "parts":
            write_in_parts(content, checkpoints, config.num_parts or 2)
        else:
            write_single(content, checkpoints)
        for name in ("tokenizer", "metrics.jsonl"):
            if (source / name).is_dir():
                shutil.copytree(source / name, target / name)
            elif (source / name).is_file():
                shutil.copyfile(source / name, target / name)
    except BaseException:
        shutil.rmtree(target, ignore_errors=True)  # there was nothing in it
        raise
    print(f"wrote step {content['iteration']} to {config.target} ({config.file_format})")
    return 0
