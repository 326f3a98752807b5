"""`run_clm.py`: settings from flags and saved runs, then a dry run or a training run."""

import difflib
import importlib.util
import os
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from cs_lm.cli.errors import print_error, readable_errors
from cs_lm.cli.progress import ProgressLine
from cs_lm.config import (
    DEFAULT_MODEL,
    GPT_SIZES,
    OF_ONE_CALL,
    GPT2Config,
    ModelConfig,
    RunConfig,
    named_run,
)
from cs_lm.device import resolve_device
from cs_lm.flags import FlagParser, add_flags, config_from_flags, read_flags
from cs_lm.metrics import SPARE_HELP
from cs_lm.prepare import find_corpus, label_of, prepare
from cs_lm.run_folder import RunFolder, saved_config
from cs_lm.settings import flag_of, has_setting, replace, settings_of

DESCRIPTION = """\
Trains a Transformer language model on a text. A tokenizer and the encoded text are
made in data/ where they are missing; the run lands in runs/<label> or --out_dir.
Units stand in [brackets]."""
_FIXED_SETTINGS = {
    "model_name", "special_tokens", "vocab_path", "merges_path", "valid_path", "valid_fraction",
}  # fmt: skip
BAD_NUMBERS = 3  # exit status
# Settings that say what to do now rather than what the run is.
_OF_THIS_CALL = {*OF_ONE_CALL, "out_dir"}


@readable_errors
def main(argv: Sequence[str] | None = None) -> int:
    parser = FlagParser(prog="run_clm.py", description=DESCRIPTION)
    add_flags(parser, RunConfig)
    namespace = parser.parse_strictly(argv)
    given, wrong_values = read_flags(namespace, RunConfig)
    if given.get("resume"):
        return _resume(namespace, given, wrong_values)
    model_name = given.get("model_name", DEFAULT_MODEL)
    if model_name not in (DEFAULT_MODEL, *GPT_SIZES):  # what goes with it cannot be said
        names = (DEFAULT_MODEL, *GPT_SIZES)
        near = [name for name in names if name.startswith(model_name)]
        near = near or difflib.get_close_matches(model_name, names, n=1) or names
        raise ValueError(f"--model: got {model_name!r}, need one of {', '.join(near)}")
    base = named_run(model_name)
    config = config_from_flags(base, namespace, _problems_of_this_machine)
    folder = RunFolder(config.out_dir or Path("runs") / label_of(config))
    _check_writable(folder.path)
    folder.refuse_a_run()
    if config.dry_run:
        return _print_dry_run(config, folder)
    return _train(config, folder, None)


def _resume(namespace, given: dict[str, Any], wrong_values: list[str]) -> int:
    if wrong_values:
        raise ValueError("\n".join(wrong_values))
    asked = replace(RunConfig(), given)
    wrong_step = [line for line in asked.problems() if line.startswith("--resume_step")]
    if wrong_step:
        raise ValueError(wrong_step[0])
    folder = RunFolder(asked.out_dir or Path("runs") / label_of(asked))
    folder.require()
    with nullcontext() if asked.dry_run else folder.only_here():
        return _go_on(folder, namespace, given)


def _go_on(folder: RunFolder, namespace, given: dict[str, Any]) -> int:
    step = given.get("resume_step")
    checkpoint = folder.read("last" if step is None else str(step))
    saved = saved_config(checkpoint)
    _refuse_what_cannot_change(saved, given, began=checkpoint["iteration"] > 0)
    config = config_from_flags(saved, namespace, _problems_of_this_machine)
    for name in sorted(set(given) - _OF_THIS_CALL):
        before, now = _value(saved, name), given[name]
        if before != now:
            print(f"resume: --{name} is {now!r} from here on, it was {before!r}")
    if config.dry_run:
        return _print_dry_run(config, folder)
    return _train(config, folder, checkpoint)


def _refuse_what_cannot_change(saved: RunConfig, given: dict[str, Any], began: bool) -> None:
    """The model and its tokenizer are what they are, and so is the text that decides the best.

    began  False for an imported model, for which no text has decided anything yet
    """
    fixed = _FIXED_SETTINGS if began else _FIXED_SETTINGS - {"valid_path", "valid_fraction"}
    wrong = []
    for name, (owner, each) in settings_of(RunConfig).items():
        if name not in given or not has_setting(saved, name):
            continue
        if owner in (ModelConfig, GPT2Config) or name in fixed:
            before = _value(saved, name)
            if name != "drop_rate" and given[name] != before:
                wrong.append(
                    f"{flag_of(each)}: got {given[name]}, but the run to resume has {before}; "
                    "leave the flag out, or start a new run in another --out_dir"
                )
    if wrong:
        raise ValueError("\n".join(wrong))


def _value(config: RunConfig, name: str) -> Any:
    for part in (config, config.model, config.data, config.optim):
        if hasattr(part, name):
            return getattr(part, name)
    raise AssertionError(name)


def _problems_of_this_machine(config: RunConfig) -> list[str]:
    """What only shows when files and devices are looked at."""
    found = []
    checks = [lambda: resolve_device(config.device), lambda: find_corpus(config)]
    for check in checks:
        try:
            check()
        except (ValueError, OSError) as error:
            found.append(str(error))
    valid_path = config.data.valid_path
    if valid_path is not None and not Path(valid_path).is_file():
        found.append(f"--valid_path: got {valid_path!r}, which is not a file; check the path")
    if config.tensorboard and importlib.util.find_spec("tensorboard") is None:
        found.append(f"--tensorboard: needs the package tensorboard; {SPARE_HELP}")
    return found


def _check_writable(folder: Path) -> None:
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        why = "is not writable" if existing.is_dir() else "is a file"
        shown = os.path.relpath(existing)
        raise ValueError(
            f"--out_dir: got {str(folder)!r}, but {shown!r} {why}; name another folder"
        )


def _print_dry_run(config: RunConfig, folder: RunFolder) -> int:
    from cs_lm.dry_run import report

    print(report(config, folder.path))
    print("dry run: settings are fine, nothing was written")
    return 0


def _train(config: RunConfig, folder: RunFolder, checkpoint: dict[str, Any] | None) -> int:
    from cs_lm.train import Trainer

    tokenizer = folder.load_tokenizer() if checkpoint is not None else None
    progress = ProgressLine()

    def say(text: str) -> None:
        progress.close()
        print(text, flush=True)

    data = prepare(config, say, tokenizer, progress)
    if checkpoint is not None:
        return _fit(Trainer(config, data, folder, checkpoint))
    with folder.only_here():
        folder.refuse_a_run()  # one that began and ended meanwhile
        return _fit(Trainer(config, data, folder))


def _fit(trainer) -> int:
    from cs_lm.bad_numbers import BadNumbers

    if trainer.has_ended:
        print(
            f"resume: the run is at step {trainer.step} of {trainer.num_steps} already; raise "
            "--num_epochs or --max_steps to train on"
        )
        return 0
    try:
        return trainer.fit()
    except BadNumbers as error:
        print_error(error)
        return BAD_NUMBERS
